# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sums over time of the Mamba-2 scan of bfloat16 inputs, by matrix products of chunks, as one Triton kernel.

They follow `state_space_dual._Chunk.add_sums`, with its last product turned round. There q_t[n] = Σ_p h_{t,p,n}² comes from its
sources s_r by before_t = Σ_{r<t} d(t, r)² s_r + d(t, start)² q_start, and both sums are Σ_t C_t² before_t, with s_t added to it
for "state_energy". Here that is

    Σ_r s_r (Σ_{t>r} d(t, r)² C_t²) + q_start Σ_t d(t, start)² C_t²,

where what is in brackets does not wait for s. Its last row, of r = T - 1, would be empty: it holds the last sum, with q_start
in place of s. One program walks the chunks of T steps of one head of one sequence for BLOCK_P rows of the head dim and BLOCK_N
states, with the state in registers; everything is additive over rows and apart for states.

Cost per token and head, multiply-adds on tensor cores: T P N / BLOCK_N + 3 T N + 2 N P. The outputs would need more
registers than there are, hence a pass of its own that computes the state once more.

x, B, C² (in two parts) and everything that is added up are exact or float32; |x|² on the diagonal, what most of s is, too. What
else enters a product, states, decays and products of different inputs, is one bfloat16 number: each with an error of up to
2^-9 that does not know of the others, so that a sum over 1,000 tokens is within 1e-3 and one over many closer still. Inputs
that cancel each other's traces in the state make it worse: the error is one of what was before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .scan_sums import add_partial_sums, partial_sums


def add_chunk_sums(
    x: torch.Tensor,
    steps: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    chunk: int,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_states: torch.Tensor | None,
    sums: dict[str, torch.Tensor],
    operand: tl.dtype,
) -> None:
    """Adds "decay_error" and "state_energy", where they are asked for, to `sums`.

    Arguments are as in `triton_chunk_scan.scan`; `steps` is from `chunk_steps`, for chunks of `chunk` time steps, and `operand`
    the dtype of products.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    squares = C.float().square()
    high = squares.bfloat16()
    low = (squares - high).bfloat16()
    sizes = block_sizes(state_size, head_dim)
    rows = triton.cdiv(head_dim, sizes["BLOCK_P"])
    partial = partial_sums(sums, (batch, rows, heads, state_size), x.device)
    _sums_kernel[(rows * triton.cdiv(state_size, sizes["BLOCK_N"]), heads, batch)](
        x,
        *steps,
        B,
        high,
        low,
        initial_states,
        partial.get("decay_error"),
        partial.get("state_energy"),
        heads,
        head_dim,
        groups,
        state_size,
        length,
        steps[0].shape[2],
        *x.stride(),
        *B.stride(),
        *high.stride(),
        OPERAND=operand,
        T=chunk,
        **sizes,
    )
    add_partial_sums(sums, partial)


def block_sizes(state_size: int, head_dim: int) -> dict[str, int]:
    """BLOCK_N, BLOCK_P, the number of warps and of stages. More of anything spills registers."""
    return {"BLOCK_N": min(64, state_size), "BLOCK_P": min(64, head_dim), "num_warps": 4, "num_stages": 1}


@triton.jit
def _sums_kernel(
    # [B, L, H, P] with any strides; [B, H, padded] float32 each
    x,
    delta,
    coarse,
    fine,
    # [B, L, G, N]: with any strides, and C² in two parts with the same strides; [B, H, P, N] float32 or None
    B,
    squares_high,
    squares_low,
    initial_states,
    # [B, blocks of rows, H, N]; None where not asked for
    decay_error,
    state_energy,
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
    squares_batch,
    squares_step,
    squares_group,
    squares_state,
    OPERAND: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    head = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    group = (head // (heads // groups)).to(tl.int64)
    blocks = tl.cdiv(head_dim, BLOCK_P)
    block = tl.program_id(0) % blocks
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(0) // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, T)
    in_rows = p < head_dim
    in_states = n < state_size
    is_last = t == T - 1

    x_tile = x + sequence * x_batch + head.to(tl.int64) * x_head + p[None, :].to(tl.int64) * x_row
    line = (sequence * heads + head) * padded
    B_tile = B + sequence * B_batch + group * B_group + n[None, :].to(tl.int64) * B_state
    squares_offsets = sequence * squares_batch + group * squares_group + n[None, :].to(tl.int64) * squares_state
    if initial_states is not None:
        state_offsets = ((sequence * heads + head) * head_dim + p[:, None]) * state_size + n[None, :]
        state = tl.load(initial_states + state_offsets, mask=in_rows[:, None] & in_states[None, :], other=0.0)
    else:
        state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    # Of every step of a chunk apart: one sum over the steps at the end.
    error_sum = tl.zeros((T, BLOCK_N), tl.float32)
    if state_energy is not None:
        energy_sum = tl.zeros((T, BLOCK_N), tl.float32)

    for start in range(0, length, T):
        step = (start + t).to(tl.int64)
        in_time = step < length
        in_maps = in_time[:, None] & in_states[None, :]
        x_now = tl.load(x_tile + step[:, None] * x_step, mask=in_time[:, None] & in_rows[None, :], other=0.0).to(
            OPERAND
        )
        B_now = tl.load(B_tile + step[:, None] * B_step, mask=in_maps, other=0.0).to(OPERAND)
        maps = squares_offsets + step[:, None] * squares_step
        high = tl.load(squares_high + maps, mask=in_maps, other=0.0).to(OPERAND)
        low = tl.load(squares_low + maps, mask=in_maps, other=0.0).to(OPERAND)
        delta_now = tl.load(delta + line + step)
        coarse_now = tl.load(coarse + line + step)
        fine_now = tl.load(fine + line + step)
        coarse_end = tl.load(coarse + line + start + T - 1)
        fine_end = tl.load(fine + line + start + T - 1)

        # s_r / (2 Δ_r): 2 stands for the pairs (r, t) and (t, r), hence half of the diagonal.
        products = tl.dot(x_now, tl.trans(x_now))
        norm = tl.sum(tl.where(t[:, None] == t[None, :], products, 0.0), 1)
        gap = (coarse_now[:, None] - coarse_now[None, :]) + (fine_now[:, None] - fine_now[None, :])
        gap = tl.where(t[:, None] > t[None, :], gap, float("-inf"))
        pairs = products * tl.exp2(gap) * delta_now[None, :]
        source = tl.dot(x_now, state.to(OPERAND)) * tl.exp2(coarse_now + fine_now)[:, None]
        source = tl.dot(pairs.to(OPERAND), B_now, source)
        B_wide = B_now.to(tl.float32)
        source = (source + (0.5 * norm * delta_now)[:, None] * B_wide) * B_wide

        # [r, t]: from step r on to a later step t, with 2 Δ_r; in the last row from the start.
        gap = (coarse_now[None, :] - coarse_now[:, None]) + (fine_now[None, :] - fine_now[:, None])
        gap = tl.where(t[:, None] < t[None, :], gap, float("-inf"))
        gap = tl.where(is_last[:, None], (coarse_now + fine_now)[None, :], gap)
        later = (tl.exp2(2.0 * gap) * tl.where(is_last, 1.0, 2.0 * delta_now)[:, None]).to(OPERAND)
        read = tl.dot(later, high)
        read = tl.dot(later, low, read)
        error_sum += tl.where(is_last[:, None], tl.sum(state * state, 0)[None, :], source) * read
        if state_energy is not None:
            energy_sum += source * (high.to(tl.float32) + low.to(tl.float32)) * (2.0 * delta_now)[:, None]

        to_end = tl.exp2((coarse_end - coarse_now) + (fine_end - fine_now))
        arriving = tl.trans(x_now.to(tl.float32) * (delta_now * to_end)[:, None])
        state = tl.dot(arriving.to(OPERAND), B_now, state * tl.exp2(coarse_end + fine_end))

    part = ((sequence * blocks + block) * heads + head) * state_size + n
    total = tl.sum(error_sum, 0)
    if decay_error is not None:
        tl.store(decay_error + part, total, mask=in_states)
    if state_energy is not None:
        tl.store(state_energy + part, total + tl.sum(energy_sum, 0), mask=in_states)
