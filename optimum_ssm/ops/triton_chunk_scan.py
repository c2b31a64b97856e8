# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 scan of bfloat16 inputs by matrix products of chunks, as one Triton kernel: for calls that ask for no sums.

One program walks the chunks of T time steps of one head of one sequence (arXiv 2405.21060, Section 6) for BLOCK_P rows of
the head dim, with the state in registers. With d(t, s) the decay from step s to step t and t, s inside the chunk:

    y_t = Σ_{s<=t} (C_t·B_s) d(t, s) Δ_s x_s + d(t, start) C_t h_start,   h_end = d(end, start) h_start + Σ_s d(end, s) Δ_s B_s x_sᵀ

x, B and C are bfloat16, so tensor cores multiply them exactly and add in float32. What meets them, decayed weights, states
and inputs, is float32: it is cut into two bfloat16 numbers, which together hold 16 of its 24 bits, and multiplied twice. So
results are within 1e-5 of float32 arithmetic, at (T N + 2 T P + 4 N P) multiply-adds per token and head on tensor cores in
place of 3 N P and the reductions of the recurrence (`triton_state_space_dual.py`) on other units. d(t, s) comes from a
difference of sums of log dA: a head that forgets as fast as dA = e^-30 a step has it to 1e-4 only, which is far below the
rounding of its bfloat16 inputs.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl


# exp of it is 0. Without the bound a memoryless head (A = -exp(38)) would make cumulative sums infinite.
_MIN_LOG_DECAY = tl.constexpr(-1e3)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, L, H, P] and the last state [B, H, P, N], both float32, of what `triton_state_space_dual.scan` has checked."""
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    y = x.new_empty(x.shape, dtype=torch.float32)
    state = x.new_empty(batch, heads, head_dim, state_size, dtype=torch.float32)
    sizes = block_sizes(state_size, head_dim)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _chunk_kernel[(triton.cdiv(head_dim, sizes["BLOCK_P"]), heads, batch)](
            x,
            delta,
            A,
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
            *x.stride(),
            *B.stride(),
            *C.stride(),
            # The interpreter, which runs on a CPU, multiplies the bits of bfloat16 numbers as if they were integers.
            OPERAND=tl.bfloat16 if x.is_cuda else tl.float32,
            **sizes,
        )
    return y, state


def block_sizes(state_size: int, head_dim: int) -> dict[str, int]:
    """T, BLOCK_N, BLOCK_P and the number of warps: matrix products need 16 of everything; a state of 4,096 entries leaves
    registers for the rest and room for a second program beside it."""
    return {"T": 64, "BLOCK_N": state_size, "BLOCK_P": min(head_dim, 4096 // state_size, 64), "num_warps": 4}


@triton.jit
def _high(value, OPERAND: tl.constexpr):
    return value.to(tl.bfloat16).to(OPERAND)


@triton.jit
def _low(value, OPERAND: tl.constexpr):
    return (value - value.to(tl.bfloat16).to(tl.float32)).to(tl.bfloat16).to(OPERAND)


@triton.jit
def _chunk_kernel(
    # [B, L, H, P] with any strides; [B, L, H], [H] float32; [B, L, G, N] with any strides; [H], [B, H, P, N] float32 or None
    x,
    delta,
    A,
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

    rate = tl.load(A + head).to(tl.float32)
    x_tile = x + sequence * x_batch + head.to(tl.int64) * x_head + p[None, :].to(tl.int64) * x_row
    y_tile = y + sequence * length * heads * head_dim + head * head_dim + p[None, :]
    delta_tile = delta + sequence * length * heads + head
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
        # Beyond the end a step of 0 leaves the state as it is.
        delta_now = tl.load(delta_tile + step * heads, mask=in_time, other=0.0)
        log_decay = delta_now * rate
        log_decay = tl.where(log_decay < _MIN_LOG_DECAY, _MIN_LOG_DECAY, log_decay)  # not tl.maximum: it hides a NaN
        so_far = tl.cumsum(log_decay, 0)
        whole = tl.sum(log_decay, 0)

        # Before the exponential, which would overflow for later steps.
        gap = tl.where(earlier, so_far[:, None] - so_far[None, :], float("-inf"))
        weights = tl.dot(C_now, tl.trans(B_now)) * tl.exp(gap) * delta_now[None, :]
        output = tl.dot(C_now, _high(state, OPERAND))
        output = tl.dot(C_now, _low(state, OPERAND), output) * tl.exp(so_far)[:, None]
        output = tl.dot(_high(weights, OPERAND), x_now, output)
        output = tl.dot(_low(weights, OPERAND), x_now, output)
        x_wide = x_now.to(tl.float32)
        if D is not None:
            output += skip * x_wide
        tl.store(y_tile + step[:, None] * (heads * head_dim), output, mask=in_x)

        arriving = x_wide * (delta_now * tl.exp(whole - so_far))[:, None]
        turned = tl.trans(B_now)
        state = tl.dot(turned, _high(arriving, OPERAND), state * tl.exp(whole))
        state = tl.dot(turned, _low(arriving, OPERAND), state)

    tl.store(last_state + state_offsets, state, mask=in_state)
