# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The column sweep of the optimal brain surgeon over one block of columns (arXiv 2301.00774, Algorithm 1).

Rows do not see each other, so a kernel takes some of them at a time through all columns: in Triton on a GPU
(`triton_column_sweep.py`), in C on a CPU (`native_column_sweep.py`). In torch every column is a few operations on all rows.
"""

import torch
from torch import Tensor

from ..sparsity.pattern import Pattern
from ..sparsity.selection import Selection
from .backend import scan_backend


# Columns that a kernel holds at once, wider blocks are swept in parts; and the largest N:M group that it ranks.
KERNEL_COLUMNS, KERNEL_GROUP = 128, 16


def sweep_columns(
    block: Tensor,
    factor: Tensor,
    dead: Tensor,
    chosen: Tensor,
    pattern: Pattern = Pattern(),
    *,
    backend: str | None = None,
) -> Tensor:
    """Prune the columns of `block` from left to right; each moves its error to the columns on its right.

    With e_j = w_j / U_jj at the removed entries of column j and 0 elsewhere, W_{:,j:} -= e_j U_{j,j:}.

    Args:
        block (`Tensor`): W, (rows, columns), changed in place; removed entries become 0.
        factor (`Tensor`): U, upper triangular, (columns, columns), or (rows, columns, columns) where every row has its
            own.
        dead (`Tensor`): bool, (columns) or (rows, columns): inputs that never fired, which go first.
        chosen (`Tensor`): bool, (rows, columns), `True` = removed. With an N:M `pattern` it is written here: each group is
            chosen by (W_ij / U_jj)² when the sweep reaches it.
        pattern (`Pattern`): N:M, or unstructured for a `chosen` that is complete.
        backend (`str`, *optional*): "torch", "triton", "native" or "auto", as for Mamba's scan (`backend.scan_backend`).
            Factors of every row's own, float64 and groups of more than 16 are swept in torch. In C and in torch a block of
            up to 128 columns gets the same bits.

    Returns:
        `Tensor`: e, (rows, columns): what W to the right of the block still has to be corrected by.
    """
    suits = factor.dim() == 2 and block.dtype == torch.float32 and pattern.group <= KERNEL_GROUP
    kernel = scan_backend(block, 0, backend) if suits else "torch"
    if kernel == "torch":
        return _sweep(block, factor, dead, chosen, pattern)
    if kernel == "triton":
        from .triton_column_sweep import sweep
    else:
        from .native_column_sweep import sweep

    columns, width = block.shape[1], KERNEL_COLUMNS - KERNEL_COLUMNS % max(1, pattern.group)
    if columns <= width:
        return sweep(block, factor, dead, chosen, pattern)
    errors = torch.empty_like(block)
    for start in range(0, columns, width):
        part, after = slice(start, start + width), slice(start + width, columns)
        found = sweep(block[:, part], factor[part, part], dead[part], chosen[:, part], pattern)
        block[:, after].addmm_(found, factor[part, after], alpha=-1)
        errors[:, part] = found
    return errors


def saliency(weight: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """Squared output error that pruning one entry alone costs, (w / U_jj)²; nothing for inputs that never fire."""
    return (weight / diagonal).square().masked_fill(dead, 0)


def _sweep(block: Tensor, factor: Tensor, dead: Tensor, chosen: Tensor, pattern: Pattern) -> Tensor:
    diagonal, group = factor.diagonal(dim1=-2, dim2=-1), pattern.group
    errors = torch.zeros_like(block)
    for j in range(block.shape[1]):
        if group and j % group == 0:
            part = slice(j, j + group)
            scores = saliency(block[:, part], diagonal[..., part], dead[..., part])
            chosen[:, part] = Selection(0, pattern=pattern).mask(scores)
        removed = chosen[:, j]
        errors[:, j] = torch.where(removed, block[:, j], 0) / diagonal[..., j]
        block[:, j:] -= errors[:, j, None] * factor[..., j, j:]
        block[:, j].masked_fill_(removed, 0)
    return errors
