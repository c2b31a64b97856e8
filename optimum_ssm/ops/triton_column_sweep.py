# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The column sweep as one Triton kernel: what `column_sweep` runs on a GPU.

A program takes BLOCK_R rows through all columns with their weights in registers. Column j is read out of the tile by a
sum over columns that are masked to it, so that a step is three operations on the tile, and waits for nothing but a row
of U, which all programs share. Torch needs five launches a column, each of which moves the rest of the block.

Operations for R rows of C columns: 6 R C² (8 R C² with N:M), of which 2 R C² are the update itself; bytes: W read and
written, e written, the mask read or written, once each. Both take microseconds; the C dependent steps, some hundred
cycles each, take most of the time.
"""

import torch
import triton
import triton.language as tl

from ..sparsity.pattern import Pattern
from .backend import on_device_of


BLOCK_R = 16


def sweep(
    block: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, chosen: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Arguments and result as in `column_sweep.sweep_columns`; `factor` is (columns, columns), float32, as is `block`."""
    rows, columns = block.shape
    # Stored by columns: what the programs write at a step is contiguous, and the product that follows takes either order.
    errors = block.new_empty(columns, rows)
    with on_device_of(block):
        _sweep_kernel[(triton.cdiv(rows, BLOCK_R),)](
            block,
            factor,
            dead.view(torch.uint8),
            chosen.view(torch.uint8),
            errors,
            rows,
            columns,
            *block.stride(),
            *factor.stride(),
            *dead.stride(),
            *chosen.stride(),
            GROUP=pattern.group,
            REMOVED=pattern.group - pattern.keep,
            BLOCK_R=BLOCK_R,
            BLOCK_C=triton.next_power_of_2(columns),
            num_warps=4,
        )
    return errors.T


@triton.jit
def _sweep_kernel(
    # [rows, columns]; [columns, columns]; [columns]; [rows, columns]: any strides. [columns, rows] contiguous
    block,
    factor,
    dead,
    chosen,
    errors,
    rows,
    columns,
    block_row,
    block_column,
    factor_row,
    factor_column,
    dead_column,
    chosen_row,
    chosen_column,
    # 0 where `chosen` says what goes
    GROUP: tl.constexpr,
    REMOVED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    column = tl.arange(0, BLOCK_C)
    in_rows = row < rows
    in_columns = column < columns
    inside = in_rows[:, None] & in_columns[None, :]
    block_tile = block + row[:, None] * block_row + column[None, :] * block_column
    chosen_tile = chosen + row[:, None] * chosen_row + column[None, :] * chosen_column
    weight = tl.load(block_tile, mask=inside, other=0.0)
    if GROUP == 0:
        gone = tl.load(chosen_tile, mask=inside, other=0) != 0
    else:
        gone = tl.zeros((BLOCK_R, BLOCK_C), tl.int32) != 0
        diagonal = tl.load(factor + column * (factor_row + factor_column), mask=in_columns, other=1.0)
        alive = tl.load(dead + column * dead_column, mask=in_columns, other=1) == 0

    error_tile = errors + row
    for j in range(columns):
        if GROUP > 0:
            if j % GROUP == 0:
                # The rank of every entry of the group among its row's, equal ones in their order, as `selection` has it.
                score = weight / diagonal[None, :]
                score = tl.where(alive[None, :], score * score, 0.0)
                in_group = (column >= j) & (column < j + GROUP)
                for k in tl.static_range(GROUP):
                    is_own = column == j + k
                    own = tl.sum(tl.where(is_own[None, :], score, 0.0), 1)
                    lower = (score < own[:, None]) | ((score == own[:, None]) & (column < j + k)[None, :])
                    rank = tl.sum(tl.where(lower & in_group[None, :], 1, 0), 1)
                    gone = gone | (is_own[None, :] & (rank < REMOVED)[:, None])
        here = gone & (column == j)[None, :]
        error = tl.sum(tl.where(here, weight, 0.0), 1) / tl.load(factor + j * (factor_row + factor_column))
        tl.store(error_tile, error, mask=in_rows)
        error_tile += rows
        ahead = (column > j) & in_columns
        line = tl.load(factor + j * factor_row + column * factor_column, mask=ahead, other=0.0)
        weight = weight - error[:, None] * line[None, :]

    tl.store(block_tile, tl.where(gone, 0.0, weight), mask=inside)
    if GROUP > 0:
        tl.store(chosen_tile, gone.to(chosen.dtype.element_ty), mask=inside)
