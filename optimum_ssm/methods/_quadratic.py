# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The output error of one weight as a quadratic form, and what the solvers of it share.

Shapes: a weight is (rows, n). Its Gram matrix is (n, n) where all rows have the same input, or (rows, n, n) where
every row has its own (depthwise convolutions). Everything here works on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from ..sparsity.selection import Selection


MOST_TAPS = 10  # 2^taps subsets are tried

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Quadratic:
    """tr((B - B⁰) A (B - B⁰)ᵀ) with B = W E, where E scales every input to A_jj = 1.

    Entries of B are in units of output error: what |B⁰| ranks is Wanda's score. A equals its own Jacobi
    preconditioning. Inputs that never fired get B⁰ = 0, A_jj = 1 and no coupling: they score lowest, so that they go
    first, and nothing divides by their zero.

    Args:
        matrix (`Tensor`): A, (n, n) or (rows, n, n), float64.
        scale (`Tensor`): diagonal of E, (n) or (rows, n), float64, positive.
        dead (`Tensor`): bool, (n) or (rows, n): inputs whose Gram diagonal is 0.
    """

    matrix: Tensor
    scale: Tensor
    dead: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float = 0.0) -> Quadratic:
        """From a Gram matrix.

        Args:
            gram (`Tensor`): Q, (n, n) or (rows, n, n), any float dtype.
            damping (`float`): added to the diagonal before the scaling, as a share of its mean over live inputs.

        Raises:
            ValueError: Q holds non-finite values.
        """
        if not torch.isfinite(gram).all():
            raise ValueError("the Gram matrix holds non-finite values")
        scale, dead = input_scale(gram, damping)
        matrix = gram.double() / (scale[..., :, None] * scale[..., None, :])
        matrix = (matrix + matrix.mT) / 2  # sums in float32 need not be symmetric to the last bit
        matrix.masked_fill_(dead[..., :, None] | dead[..., None, :], 0)
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1)
        return cls(matrix, scale, dead)

    def enter(self, weight: Tensor) -> Tensor:
        """B⁰ = W E, 0 at dead inputs; (rows, n), dtype of `weight`."""
        return (weight * self.scale.to(weight.dtype)).masked_fill(self.dead, 0)

    def leave(self, values: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """W' = B E⁻¹, exactly 0 in `mask`. A dead input that survives keeps its weight: nothing speaks for another.

        Raises:
            ValueError: W' is not finite.
        """
        result = torch.where(self.dead, weight, values / self.scale.to(values.dtype)).masked_fill(mask, 0)
        if not torch.isfinite(result).all():
            raise ValueError("the solver left the finite numbers; use more damping or more calibration tokens")
        return result


def input_scale(gram: Tensor, damping: float = 0.0) -> tuple[Tensor, Tensor]:
    """Root of the damped Gram diagonal, float64, 1 at dead inputs; and the dead inputs. Arguments as in `of`."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1).double()
    dead = diagonal == 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    return (diagonal + damping * mean).masked_fill(dead, 1).sqrt(), dead


def backed_off(damping: float) -> Iterator[float]:
    """`damping`, then tenfold, at most five times: for a loop that ends at the first one that works.

    Raises:
        ValueError: none of them worked.
    """
    for attempt in range(6):
        if attempt:
            logger.warning(f"the Gram matrix is not positive definite: damping raised to {damping * 10**attempt:g}")
        yield damping * 10**attempt
    raise ValueError(
        f"the Gram matrix is not positive definite, not even with {damping * 10**5:g} times its mean as damping"
    )


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Every row of (rows, n) times the shared (n, n) matrix, or times its own of (rows, n, n)."""
    return rows @ matrix if matrix.dim() == 2 else torch.bmm(rows.unsqueeze(1), matrix).squeeze(1)


def squared_error(values: Tensor, dense: Tensor, matrix: Tensor) -> Tensor:
    """(b - b⁰) A (b - b⁰)ᵀ of every row: (rows)."""
    gap = values - dense
    return (gap * times(gap, matrix)).sum(1)


def conjugate_gradients(
    start: Tensor, dense: Tensor, mask: Tensor, matrix: Tensor, steps: int, tolerance: float = 1e-4
) -> Tensor:
    """Minimise (b - b⁰) A (b - b⁰)ᵀ over the kept entries of every row, each row with its own step lengths.

    The system is A (b - b⁰) = 0 on the kept entries: differences to B⁰ suit float32 better than A b = A b⁰.

    Args:
        start (`Tensor`): first B, (rows, n), zero in `mask`.
        dense (`Tensor`): B⁰, (rows, n).
        mask (`Tensor`): bool, (rows, n), `True` = pruned.
        matrix (`Tensor`): A, (n, n) or (rows, n, n), dtype of `start`.
        steps (`int`): most iterations.
        tolerance (`float`): stop when the residual on kept entries is at most this share of A b⁰ on kept entries.

    Returns:
        `Tensor`: (rows, n), zero in `mask`.
    """
    values = start.clone()
    residual = times(dense - values, matrix).masked_fill(mask, 0)
    goal = tolerance * times(dense, matrix).masked_fill(mask, 0).norm()
    direction = residual.clone()
    squared = residual.square().sum(1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny  # rows that are solved, or keep nothing, divide 0 by this
    for _ in range(steps):
        if squared.sum().sqrt() <= goal:
            break
        image = times(direction, matrix).masked_fill(mask, 0)
        length = squared / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        values += length * direction
        residual -= length * image
        before, squared = squared, residual.square().sum(1, keepdim=True)
        direction = residual + squared / before.clamp_min(tiny) * direction
    return values


def exact_solve(weight: Tensor, mask: Tensor, gram: Tensor) -> Tensor:
    """The kept weights that minimise tr((W - W') Q (W - W')ᵀ): Q_SS w'_S = (Q w)_S in every row, S its kept inputs.

    It takes rows·n² numbers: for small matrices and tests.

    Args:
        weight (`Tensor`): W, (rows, n).
        mask (`Tensor`): bool, (rows, n), `True` = pruned.
        gram (`Tensor`): Q, (n, n) or (rows, n, n), positive definite on the kept inputs of every row.

    Returns:
        `Tensor`: W', (rows, n), zero in `mask`, dtype of `weight`.
    """
    gram, kept = gram.double(), (~mask).double()
    system = gram * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(1 - kept)
    right = times(weight.double(), gram) * kept
    return torch.linalg.solve(system, right.unsqueeze(2)).squeeze(2).masked_fill(mask, 0).to(weight.dtype)


def best_subsets(weight: Tensor, gram: Tensor, selection: Selection) -> Tensor:
    """The mask with the least error after re-solving, found by trying every subset of the taps of every channel.

    With N:M and with `scope="row"` nothing is better. With `scope="tensor"` channels compete by the lower convex hulls
    of their error curves: nothing is better but for the last few entries of the budget.

    Args:
        weight (`Tensor`): (channels, taps).
        gram (`Tensor`): (channels, taps, taps), positive definite.
        selection (`Selection`): the budget.

    Returns:
        `Tensor`: bool, (channels, taps), `True` = pruned.

    Raises:
        ValueError: there are more than 10 taps.
    """
    taps, group = weight.shape[1], selection.pattern.group
    if taps > MOST_TAPS:
        raise ValueError(
            f"all subsets of {taps} taps are too many to try; at most {MOST_TAPS} taps can be solved exactly"
        )
    subsets = torch.cartesian_prod(*[torch.tensor([False, True], device=weight.device)] * taps).reshape(-1, taps)
    removed, double = subsets.sum(1), weight.double()
    solved = (exact_solve(double, subset.expand_as(weight), gram) for subset in subsets)
    errors = torch.stack([squared_error(values, double, gram.double()) for values in solved], 1)
    if selection.pattern.is_n_m:
        in_groups = subsets.reshape(len(subsets), -1, group).sum(2)
        allowed = (in_groups == group - selection.pattern.keep).all(1).expand_as(errors)
    else:
        curves = torch.stack([errors[:, removed == count].amin(1) for count in range(taps + 1)], 1)
        counts = selection.mask(_convex_steps(curves)).sum(1, keepdim=True)
        allowed = removed == counts
    return subsets[errors.masked_fill(~allowed, torch.inf).argmin(1)]


def _convex_steps(curves: Tensor) -> Tensor:
    """Ascending steps of the lower convex hull of every row: (rows, n + 1) -> (rows, n)."""
    n = curves.shape[1] - 1
    steps = []
    for step in range(1, n + 1):
        means = [
            torch.stack([(curves[:, stop] - curves[:, start]) / (stop - start) for stop in range(step, n + 1)]).amin(0)
            for start in range(step)
        ]
        steps.append(torch.stack(means).amax(0))
    return torch.stack(steps, 1).cummax(1).values  # rounding must not put a step before an earlier one
