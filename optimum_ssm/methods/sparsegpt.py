# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SparseGPT: the optimal brain surgeon, one column after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.utils import logging

from ..errors import ConfigurationError
from ..ops.column_sweep import saliency, sweep_columns
from ..sparsity.pattern import Pattern
from ..sparsity.selection import Selection, split_evenly
from . import register_method
from ._sharing import once_per_matrix
from .base import Statistics, WeightMethod


logger = logging.get_logger(__name__)

SOLVED_WHOLE = 256  # largest triangular blocks that are inverted by solving


@register_method("sparsegpt")
@dataclass
class SparseGPT(WeightMethod):
    """Prunes by (W_ij / U_jj)^2 and moves the error of each pruned column to the columns on its right.

    U is the upper Cholesky factor of the inverse damped Hessian H = 2 (Q + damping). The mask of 128 columns is chosen
    when the sweep reaches them, on weights that already carry the errors from the left; with N:M, group by group. The
    depthwise convolution is solved with one taps x taps Hessian per channel: channels do not mix.

    Args:
        blocksize (`int`): columns per lazy update and per comparison group.
        percdamp (`float`): damping as a share of the mean Hessian diagonal over live inputs. It grows tenfold, at most
            five times, when the Hessian does not factor.
    """

    summary: ClassVar[str] = "optimal brain surgeon column by column; kept weights are updated"
    source: ClassVar[str] = "Frantar and Alistarh, arXiv 2301.00774, Algorithm 1"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    updates_weights: ClassVar[bool] = True

    blocksize: int = 128
    percdamp: float = 0.01

    def __post_init__(self) -> None:
        if self.blocksize < 1 or not self.percdamp > 0:
            raise ConfigurationError(
                f"sparsegpt needs blocksize >= 1 and percdamp > 0, got {self.blocksize} and {self.percdamp}"
            )

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("conv_gram",) if kind == "conv" else ("gram",)

    def check(self, pattern: Pattern, scope: str | None) -> None:
        if pattern.is_n_m and self.blocksize % pattern.group:
            raise ConfigurationError(
                f"sparsegpt blocksize={self.blocksize} must be a multiple of the pattern's {pattern.group}"
            )

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        """(W_ij / U_jj)^2 on the dense weight: what the sweep starts from, and what a global threshold compares."""
        factor, dead = self._factor(statistics, kind)
        return saliency(weight, factor.diagonal(dim1=-2, dim2=-1).to(weight.dtype), dead)

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        self.check(selection.pattern, selection.scope)
        if not selection.pattern.is_n_m and selection.count == 0:
            return weight, torch.zeros_like(weight, dtype=torch.bool)
        factor, dead = self._factor(statistics, kind)
        return _sweep(weight, factor, dead, self.blocksize, selection=selection)

    def reconstruct(self, weight: Tensor, mask: Tensor, statistics: Statistics, kind: str = "linear") -> Tensor:
        """The same sweep on a given mask (`True` = pruned), so that it can follow any other criterion."""
        factor, dead = self._factor(statistics, kind)
        return _sweep(weight, factor, dead, self.blocksize, mask=mask)[0]

    def _factor(self, statistics: Statistics, kind: str) -> tuple[Tensor, Tensor]:
        gram = statistics["conv_gram" if kind == "conv" else "gram"]
        return _of_gram(gram, self.percdamp)


@once_per_matrix
def _of_gram(gram: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    return inverse_factor(2 * gram.double(), percdamp)


def inverse_factor(hessian: Tensor, percdamp: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse of a damped Hessian.

    Args:
        hessian (`Tensor`): (..., n, n), float64, positive semi-definite; batched for depthwise convolutions.
        percdamp (`float`): damping relative to the mean of the live diagonal.

    Returns:
        `tuple`: U (..., n, n) with Uᵀ U = (H + damping)⁻¹, and the dead inputs (..., n), those that never fired.

    Raises:
        ValueError: H does not factor with 10⁵ times the damping either, or holds non-finite values.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian holds non-finite values")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    live = (~dead).sum(-1, keepdim=True).clamp_min(1)
    damping = percdamp * diagonal.sum(-1, keepdim=True) / live
    # Reversed, H is L Lᵀ, so H is R Rᵀ with R upper triangular, and U = R⁻¹: no inverse of H is formed, whose
    # condition is the square of L's.
    for attempt in range(6):
        raised = torch.where(dead, 1.0, diagonal) + damping * 10**attempt
        damped = hessian.flip(-2, -1)
        damped.diagonal(dim1=-2, dim2=-1).copy_(raised.flip(-1))
        lower, info = torch.linalg.cholesky_ex(damped)
        if not info.any():
            if attempt:
                logger.warning(
                    f"a Hessian of {hessian.shape[-1]} inputs factors only with {10**attempt} times the damping "
                    f"percdamp={percdamp:g}; more calibration text makes it better conditioned"
                )
            return triangular_inverse(lower).flip(-2, -1), dead
    raise ValueError(f"the Hessian does not factor, not even with {percdamp * 10**5:g} times its mean as damping")


def triangular_inverse(lower: Tensor) -> Tensor:
    """L⁻¹ of lower triangular matrices (..., n, n): of small blocks on the diagonal all at once, then of ever larger ones by
    two products each, which is a third of the operations of solving for the columns of the identity."""
    n, halvings = lower.shape[-1], 0
    while n > SOLVED_WHOLE << halvings:
        halvings += 1
    size = -(-n >> halvings)  # rounded up
    padded = torch.nn.functional.pad(lower, (0, (size << halvings) - n) * 2)
    padded.diagonal(dim1=-2, dim2=-1)[..., n:] = 1
    unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
    blocks = _diagonal_blocks(padded, size)
    inverse = torch.linalg.solve_triangular(blocks, unit.expand_as(blocks), upper=False)
    for _ in range(halvings):
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        below = _diagonal_blocks(padded, 2 * size)[..., size:, :size]
        inverse = first.new_zeros(*first.shape[:-2], 2 * size, 2 * size)
        inverse[..., :size, :size], inverse[..., size:, size:] = first, second
        inverse[..., size:, :size] = second @ (below @ first).neg_()
        size *= 2
    return inverse[..., 0, :n, :n]


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The square blocks of one size on the diagonal, (..., blocks, size, size)."""
    parts = matrix.unflatten(-2, (-1, size)).unflatten(-1, (-1, size))  # (..., blocks, size, blocks, size)
    return parts.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _sweep(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    blocksize: int,
    selection: Selection | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The column sweep, on a given mask or choosing one as it goes.

    `factor` is (in, in) and `dead` (in); or, where every row has its own Hessian, (rows, in, in) and (rows, in), all in
    one block of columns.
    """
    weight, factor = weight.clone(), factor.to(weight.dtype)
    columns = weight.shape[1]
    blocksize = columns if factor.dim() == 3 else blocksize
    starts = range(0, columns, blocksize)
    widths = [min(blocksize, columns - start) for start in starts]
    chosen = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask.clone()
    pattern = Pattern() if mask is not None else selection.pattern
    counts = [0] * len(widths) if mask is not None else _block_counts(selection, widths, len(weight))
    for start, width, count in zip(starts, widths, counts):
        stop = start + width
        block, part = weight[:, start:stop], chosen[:, start:stop]
        inner, asleep = factor[..., start:stop, start:stop], dead[..., start:stop]
        if mask is None and not pattern.is_n_m:
            scores = saliency(block, inner.diagonal(dim1=-2, dim2=-1), asleep)
            # unchecked: looking for a NaN would wait for the device at every block. One that comes up is kept, as the
            # highest score, and seen in what the caller gets.
            part.copy_(selection.narrow(count).unchecked_mask(scores))
        errors = sweep_columns(block, inner, asleep, part, pattern)
        if stop < columns:
            weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return weight, chosen


def _block_counts(selection: Selection, widths: list[int], rows: int) -> list[int]:
    """Entries to remove from each block of columns, so that the tensor, and with `scope="row"` every row, has its share."""
    if selection.scope != "row" or selection.pattern.is_n_m:
        return split_evenly(selection.count, widths)
    of_row, extra = divmod(selection.count, rows)
    shares = split_evenly(of_row, widths)
    counts = [rows * share for share in shares]
    if extra:  # one block alone may take one entry more of some rows: rows then differ by one at most
        counts[max(i for i, share in enumerate(shares) if share < widths[i])] += extra
    return counts
