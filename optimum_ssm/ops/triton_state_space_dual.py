# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 scan with sums over time as one Triton kernel: what `state_space_dual` runs on a GPU.

One program walks the time steps of one head of one sequence for BLOCK_P rows of the head dim and all states, with the
state [BLOCK_P, N] in registers: the recurrence itself, in float32, without chunks.

Both sums need only q_t[n] = Σ_p h_{t,p,n}², which is additive over programs: state_energy_n = Σ_t C_n² q_t[n], and
decay_error = Σ_t dA_t² Σ_n C_n² q_{t-1}[n]. A product of squares, it is exact where dA_t is tiny.

Cost for B sequences of L steps, H heads of P rows, N states: per state and step a multiplication and a multiply-add for
h, one multiply-add for y, one for both sums, and 2.5 operations to add y up over the 32 threads that share n; compiled
for sm_90 at N = 128 that is 9 instructions, loads included. In bytes: x read and y written once, as B, C and Δ are
smaller by H P / (G N) and P. At P = 64, N = 128 arithmetic takes 13 times as long as memory on an H200.

Calls with bfloat16 inputs go to `triton_chunk_scan.py`: x, B and C are exact on tensor cores.

Why not chunks of T steps for the others, as in torch: with sums they need 2 T N + 2 T P + 3 P N multiply-adds per token and head, at
T = P = 64, N = 128 that is 6 P N, no less than the recurrence. Chunks would gain by tensor cores only, with three TF32
products for every float32 one. The recurrence subtracts nothing, which keeps the sums exact, and needs no scratch.
"""

import torch
import triton
import triton.language as tl

from . import triton_chunk_scan
from .backend import check_operands, on_device_of
from .scan_sums import add_partial_sums, partial_sums


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
    """y [B, L, H, P] and the last state [B, H, P, N], both float32; adds to `sums`.

    Arguments are as in `state_space_dual`, which has checked G and `sums`; `delta` is Δ after bias, softplus and limits,
    float32 [B, L, H]. L is at least 1.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    states, maps = (batch, heads, head_dim, state_size), (batch, length, groups, state_size)
    if initial_states is not None:
        initial_states = initial_states.to(x.device, torch.float32).contiguous()
    check_operands(x, {"dt": (delta, x.shape[:3]), "A": (A, (heads,)), "D": (D, (heads,))})
    check_operands(x, {"B": (B, maps), "C": (C, maps), "initial_states": (initial_states, states)})
    D = None if D is None else D.contiguous()
    operands = (x, delta.contiguous(), A.contiguous(), B, C, D, initial_states)
    if triton_chunk_scan.suits(x, B, C):
        return triton_chunk_scan.scan(*operands, sums)
    return _recur(*operands, sums)


def _recur(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    sums: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence, with sums. What has no more than H entries a step is contiguous."""
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    y = x.new_empty(x.shape, dtype=torch.float32)
    state = x.new_empty(batch, heads, head_dim, state_size, dtype=torch.float32)
    sizes = block_sizes(state_size, head_dim, batch * heads, x.device)
    blocks = triton.cdiv(head_dim, sizes["BLOCK_P"])
    partial = partial_sums(sums, (batch, blocks, heads, state_size), x.device)
    with on_device_of(x):
        _scan_kernel[(blocks, heads, batch)](
            x,
            delta,
            torch.exp(delta * A.to(delta.dtype)),
            # Rows over n: these are smaller than x by H P / (G N), and strided loads of them would cost more.
            B.contiguous(),
            C.contiguous(),
            D,
            initial_states,
            y,
            state,
            partial.get("decay_error"),
            partial.get("state_energy"),
            heads,
            head_dim,
            groups,
            state_size,
            length,
            *x.stride(),
            **sizes,
        )
    add_partial_sums(sums, partial)
    return y, state


def block_sizes(state_size: int, head_dim: int, sequences_and_heads: int, device: torch.device) -> dict[str, int]:
    """BLOCK_N, BLOCK_P and the number of warps. One warp, so that no step waits for another; a thread holds at most 64
    states, more would spill; and half of that where there would be fewer than 4 programs for a multiprocessor."""
    states = triton.next_power_of_2(state_size)
    rows = min(triton.next_power_of_2(head_dim), 32, max(8, 2048 // states))
    if device.type == "cuda":
        wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count
        while rows > 8 and sequences_and_heads * triton.cdiv(head_dim, rows) < wanted:
            rows //= 2
    return {"BLOCK_N": states, "BLOCK_P": rows, "num_warps": 1}


@triton.jit
def _scan_kernel(
    # [B, L, H, P] with any strides
    x,
    # [B, L, H] float32: Δ and dA
    delta,
    decay,
    # [B, L, G, N]; [H] or None; [B, H, P, N] or None. All contiguous, as are the outputs
    B,
    C,
    D,
    initial_states,
    # [B, L, H, P]; [B, H, P, N]
    y,
    last_state,
    # [B, programs of a head, H, N]; None where not asked for
    decay_error,
    state_energy,
    heads,
    head_dim,
    groups,
    state_size,
    length,
    x_batch,
    x_step,
    x_head,
    x_row,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    in_rows = p < head_dim
    in_states = n < state_size
    in_state = in_rows[:, None] & in_states[None, :]

    state_offsets = ((sequence * heads + head) * head_dim + p[:, None]) * state_size + n[None, :]
    if initial_states is not None:
        state = tl.load(initial_states + state_offsets, mask=in_state, other=0.0)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    if decay_error is not None:
        squares = tl.sum(state * state, 0)
        decay_error_sum = tl.zeros((BLOCK_N,), tl.float32)
    if state_energy is not None:
        state_energy_sum = tl.zeros((BLOCK_N,), tl.float32)

    x_row_offsets = p.to(tl.int64) * x_row
    x_tile = x + sequence * x_batch + head.to(tl.int64) * x_head + x_row_offsets
    y_tile = y + (sequence * length * heads + head) * head_dim + p
    delta_step = delta + sequence * length * heads + head
    decay_step = decay + sequence * length * heads + head
    group = head // (heads // groups)
    B_tile = B + (sequence * length * groups + group) * state_size + n
    C_tile = C + (sequence * length * groups + group) * state_size + n

    next_x = tl.load(x_tile, mask=in_rows, other=0.0)
    next_B = tl.load(B_tile, mask=in_states, other=0.0)
    next_C = tl.load(C_tile, mask=in_states, other=0.0)
    next_delta = tl.load(delta_step)
    next_decay = tl.load(decay_step)

    for step in range(length):
        x_now = next_x.to(tl.float32)
        B_now = next_B.to(tl.float32)
        C_now = next_C.to(tl.float32)
        delta_now = next_delta
        decay_now = next_decay
        # The next step is asked for before this one is computed; the last one is read twice.
        ahead = tl.where(step + 1 < length, 1, 0)
        x_tile += ahead * x_step
        B_tile += ahead * groups * state_size
        C_tile += ahead * groups * state_size
        delta_step += ahead * heads
        decay_step += ahead * heads
        next_x = tl.load(x_tile, mask=in_rows, other=0.0)
        next_B = tl.load(B_tile, mask=in_states, other=0.0)
        next_C = tl.load(C_tile, mask=in_states, other=0.0)
        next_delta = tl.load(delta_step)
        next_decay = tl.load(decay_step)

        state = decay_now * state + (delta_now * x_now)[:, None] * B_now[None, :]
        output = tl.sum(state * C_now[None, :], 1)
        if D is not None:
            output += skip * x_now
        tl.store(y_tile, output, mask=in_rows)
        y_tile += heads * head_dim

        if decay_error is not None:
            read = decay_now * C_now
            decay_error_sum += read * read * squares
            squares = tl.sum(state * state, 0)
            if state_energy is not None:
                state_energy_sum += C_now * C_now * squares
        elif state_energy is not None:
            state_energy_sum += C_now * C_now * tl.sum(state * state, 0)

    tl.store(last_state + state_offsets, state, mask=in_state)
    part = ((sequence * tl.num_programs(0) + block) * heads + head) * state_size + n
    if decay_error is not None:
        tl.store(decay_error + part, decay_error_sum, mask=in_states)
    if state_energy is not None:
        tl.store(state_energy + part, state_energy_sum, mask=in_states)
