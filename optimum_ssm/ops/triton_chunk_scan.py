# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 scan of bfloat16 inputs by matrix products of chunks in Triton.

One program walks the chunks of T time steps of one head of one sequence (arXiv 2405.21060, Section 6) for BLOCK_P rows of
the head dim, with the state in registers. With d(t, s) the decay from step s to step t and t, s inside the chunk:

    y_t = Σ_{s<=t} (C_t·B_s) d(t, s) Δ_s x_s + d(t, start) C_t h_start,   h_end = d(end, start) h_start + Σ_s d(end, s) Δ_s B_s x_sᵀ

x, B and C are bfloat16, so tensor cores multiply them exactly and add in float32. What meets them, decayed weights, states
and inputs, is float32: it is cut into two bfloat16 numbers, which together hold 16 of its 24 bits, and multiplied twice. So
results are within 1e-5 of float32 arithmetic, at (T N + 2 T P + 4 N P) multiply-adds per token and head on tensor cores in
place of 3 N P and the reductions of the recurrence (`triton_state_space_dual.py`) on other units.

d(t, s) is 2 to a difference of sums of log2 dA from the start of the chunk. A kernel before computes these once, in two parts
whose differences lose nothing. Sums over time, where asked for, are a pass of their own (`triton_chunk_sums.py`): together
with the output they would not fit the registers.
"""

import torch
import triton
import triton.language as tl

from .backend import on_device_of
from .triton_chunk_sums import add_chunk_sums


# Time steps of a chunk.
CHUNK = 64
_LOG2_E = tl.constexpr(1.4426950408889634)
# 2 to it is 0. Without the bound a memoryless head (A = -exp(38)) would make cumulative sums infinite.
_MIN_LOG_DECAY = tl.constexpr(-1e3)
# Log decays are split into multiples of 1/256 and a rest: float32 holds sums and differences of 64 of the former exactly.
_COARSE = tl.constexpr(256.0)
# What the kernel takes, and no more. Of other sizes and of strides whose loads are not whole vectors Triton 3.6 makes, for some
# tiles, code for sm_90 that reads beyond its shared memory; each of these was run on such a GPU and compared.
STATE_SIZES, HEAD_DIMS, ALIGNMENT = (32, 64, 128), (16, 32, 64, 128), 16


def suits(x: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> bool:
    """Whether the scan of such inputs can run here: bfloat16 in rows of neighbours, of sizes that published models have."""
    return all(
        tensor.dtype == torch.bfloat16
        and tensor.shape[3] in sizes
        and tensor.stride(3) == 1
        and not tensor.data_ptr() % ALIGNMENT
        and not any(stride % ALIGNMENT for stride in tensor.stride()[:3])
        for tensor, sizes in ((x, HEAD_DIMS), (B, STATE_SIZES), (C, STATE_SIZES))
    )


def scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    sums: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, L, H, P] and the last state [B, H, P, N], both float32, of what `triton_state_space_dual.scan` has checked; adds
    to `sums`."""
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    y = x.new_empty(x.shape, dtype=torch.float32)
    state = x.new_empty(batch, heads, head_dim, state_size, dtype=torch.float32)
    sizes = block_sizes(state_size, head_dim)
    # The interpreter, which runs on a CPU, multiplies the bits of bfloat16 numbers as if they were integers.
    operand = tl.bfloat16 if x.is_cuda else tl.float32
    with on_device_of(x):
        steps = chunk_steps(delta, A)
        _chunk_kernel[(triton.cdiv(head_dim, sizes["BLOCK_P"]), heads, batch)](
            x,
            *steps,
            B,
            C,
            D,
            initial_states,
            y,
            state,
            heads,
            head_dim,
            groups,
            state_size,
            length,
            steps[0].shape[2],
            *x.stride(),
            *B.stride(),
            *C.stride(),
            OPERAND=operand,
            T=CHUNK,
            **sizes,
        )
        if sums:
            add_chunk_sums(x, steps, CHUNK, B, C, initial_states, sums, operand)
    return y, state


def chunk_steps(delta: torch.Tensor, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Δ, and log2 of the decay from the start of its chunk up to every step, that step included, in two parts: [B, H, L]
    each, with L rounded up to whole chunks. Beyond the end Δ is 0 and nothing decays."""
    batch, length, heads = delta.shape
    padded = triton.cdiv(length, CHUNK) * CHUNK
    steps = tuple(delta.new_empty(batch, heads, padded) for _ in range(3))
    block = min(32, triton.next_power_of_2(heads))
    _steps_kernel[(padded // CHUNK, triton.cdiv(heads, block), batch)](
        delta, A, *steps, heads, length, padded, T=CHUNK, BLOCK_H=block, num_warps=4
    )
    return steps


def block_sizes(state_size: int, head_dim: int) -> dict[str, int]:
    """BLOCK_N, BLOCK_P and the number of warps: matrix products need 16 of everything; a state of 4,096 entries leaves
    registers for the rest and room for a second program beside it."""
    return {"BLOCK_N": state_size, "BLOCK_P": min(head_dim, 4096 // state_size, 64), "num_warps": 4}


@triton.jit
def _steps_kernel(
    # [B, L, H], [H] float32; [B, H, padded] each
    delta,
    A,
    delta_out,
    coarse_out,
    fine_out,
    heads,
    length,
    padded,
    T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0) * T + tl.arange(0, T)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sequence = tl.program_id(2).to(tl.int64)
    in_heads = head < heads
    inside = (t < length)[:, None] & in_heads[None, :]
    step = tl.load(delta + (sequence * length + t[:, None]) * heads + head[None, :], mask=inside, other=0.0)
    rate = tl.load(A + head, mask=in_heads, other=0.0).to(tl.float32) * _LOG2_E
    log_decay = step * rate[None, :]
    log_decay = tl.where(log_decay < _MIN_LOG_DECAY, _MIN_LOG_DECAY, log_decay)  # not tl.maximum: it hides a NaN
    log_decay = tl.where((step == 0.0), 0.0, log_decay)  # also of a rate that is infinite
    coarse = tl.floor(log_decay * _COARSE) / _COARSE
    offsets = (sequence * heads + head[None, :]) * padded + t[:, None]
    tl.store(delta_out + offsets, step, mask=in_heads[None, :])
    tl.store(coarse_out + offsets, tl.cumsum(coarse, 0), mask=in_heads[None, :])
    tl.store(fine_out + offsets, tl.cumsum(log_decay - coarse, 0), mask=in_heads[None, :])


@triton.jit
def _high(value, OPERAND: tl.constexpr):
    """The bfloat16 number next to a float32 one."""
    return value.to(tl.bfloat16).to(OPERAND)


@triton.jit
def _low(value, OPERAND: tl.constexpr):
    """What `_high` leaves: together they hold 16 bits."""
    return (value - value.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(OPERAND)


@triton.jit
def _chunk_kernel(
    # [B, L, H, P] with any strides; [B, H, padded] float32 each
    x,
    delta,
    coarse,
    fine,
    # [B, L, G, N] with any strides; [H], [B, H, P, N] float32 or None
    B,
    C,
    D,
    initial_states,
    # [B, L, H, P], [B, H, P, N]
    y,
    last_state,
    heads,
    head_dim,
    groups,
    state_size,
    length,
    padded,
    x_batch,
    x_step,
    x_head,
    x_row,
    B_batch,
    B_step,
    B_group,
    B_state,
    C_batch,
    C_step,
    C_group,
    C_state,
    OPERAND: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    group = (head // (heads // groups)).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, T)
    in_rows = p < head_dim
    in_states = n < state_size
    earlier = t[:, None] >= t[None, :]

    x_tile = x + sequence * x_batch + head.to(tl.int64) * x_head + p[None, :].to(tl.int64) * x_row
    y_tile = y + sequence * length * heads * head_dim + head * head_dim + p[None, :]
    line = (sequence * heads + head) * padded
    B_tile = B + sequence * B_batch + group * B_group + n[None, :].to(tl.int64) * B_state
    C_tile = C + sequence * C_batch + group * C_group + n[None, :].to(tl.int64) * C_state
    state_offsets = ((sequence * heads + head) * head_dim + p[None, :]) * state_size + n[:, None]
    in_state = in_states[:, None] & in_rows[None, :]
    if initial_states is not None:
        state = tl.load(initial_states + state_offsets, mask=in_state, other=0.0)
    else:
        state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)

    for start in range(0, length, T):
        step = (start + t).to(tl.int64)
        in_time = step < length
        in_x = in_time[:, None] & in_rows[None, :]
        in_maps = in_time[:, None] & in_states[None, :]
        x_now = tl.load(x_tile + step[:, None] * x_step, mask=in_x, other=0.0).to(OPERAND)
        B_now = tl.load(B_tile + step[:, None] * B_step, mask=in_maps, other=0.0).to(OPERAND)
        C_now = tl.load(C_tile + step[:, None] * C_step, mask=in_maps, other=0.0).to(OPERAND)
        delta_now = tl.load(delta + line + step)
        coarse_now = tl.load(coarse + line + step)
        fine_now = tl.load(fine + line + step)
        coarse_end = tl.load(coarse + line + start + T - 1)
        fine_end = tl.load(fine + line + start + T - 1)

        # Before the exponential, which would overflow for later steps.
        gap = (coarse_now[:, None] - coarse_now[None, :]) + (fine_now[:, None] - fine_now[None, :])
        gap = tl.where(earlier, gap, float("-inf"))
        weights = tl.dot(C_now, tl.trans(B_now)) * tl.exp2(gap) * delta_now[None, :]
        output = tl.dot(C_now, _high(state, OPERAND))
        output = tl.dot(C_now, _low(state, OPERAND), output) * tl.exp2(coarse_now + fine_now)[:, None]
        output = tl.dot(_high(weights, OPERAND), x_now, output)
        output = tl.dot(_low(weights, OPERAND), x_now, output)
        x_wide = x_now.to(tl.float32)
        if D is not None:
            output += skip * x_wide
        tl.store(y_tile + step[:, None] * (heads * head_dim), output, mask=in_x)

        to_end = tl.exp2((coarse_end - coarse_now) + (fine_end - fine_now))
        arriving = x_wide * (delta_now * to_end)[:, None]
        turned = tl.trans(B_now)
        state = tl.dot(turned, _high(arriving, OPERAND), state * tl.exp2(coarse_end + fine_end))
        state = tl.dot(turned, _low(arriving, OPERAND), state)

    tl.store(last_state + state_offsets, state, mask=in_state)
