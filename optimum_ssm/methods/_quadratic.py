# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The squared output error of one weight as a quadratic form, and what its solvers share.

Shapes: a weight is (rows, n). Its Gram matrix is (n, n), shared by all rows, or (rows, n, n), one per row (depthwise
convolutions). Everything here works on both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Quadratic:
    """tr((B - B⁰) A (B - B⁰)ᵀ) with B = W E, where E scales every input to A_jj = 1 (or 1 + ridge).

    Entries of B are then in units of output error, and A is its own Jacobi-preconditioned form. Inputs that never fired
    have B⁰ = 0, a unit diagonal and no coupling: they score lowest, go first and cannot divide by zero.

    Args:
        matrix (`Tensor`): A, (n, n) or (rows, n, n), float64.
        scale (`Tensor`): diagonal of E, (n) or (rows, n), float64, positive.
        dead (`Tensor`): bool, (n) or (rows, n): inputs whose Gram diagonal is 0.
    """

    matrix: Tensor
    scale: Tensor
    dead: Tensor

    @classmethod
    def of(cls, gram: Tensor, damping: float = 0.0, ridge: float = 0.0) -> Quadratic:
        """From a Gram matrix.

        Args:
            gram (`Tensor`): Q, (n, n) or (rows, n, n), positive semi-definite, any float dtype.
            damping (`float`): added to the diagonal before scaling, as a share of its mean over live inputs.
            ridge (`float`): added to the unit diagonal after scaling.

        Raises:
            ValueError: Q holds non-finite values.
        """
        scale, dead = input_scale(gram, damping)
        matrix = gram.double() / (scale[..., :, None] * scale[..., None, :])
        matrix = (matrix + matrix.mT) / 2  # a sum over tokens in float32 is not exactly symmetric
        pair = dead[..., :, None] | dead[..., None, :]
        matrix = matrix.masked_fill(pair, 0)
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1 + ridge)
        return cls(matrix, scale, dead)

    def enter(self, weight: Tensor) -> Tensor:
        """B⁰ = W E, 0 at dead inputs; dtype of `weight`."""
        return (weight * self.scale.to(weight.dtype)).masked_fill(self.dead, 0)

    def leave(self, values: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        """B E⁻¹ with exact zeros in `mask`. Where a dead input survives, its weight stays: nothing was learnt of it.

        Raises:
            ValueError: a value is not finite.
        """
        result = torch.where(self.dead, weight, values / self.scale.to(values.dtype)).masked_fill(mask, 0)
        if not torch.isfinite(result).all():
            raise ValueError("the solver left the finite numbers; give it more damping or more calibration tokens")
        return result

    def error(self, values: Tensor, dense: Tensor) -> Tensor:
        """Squared output error of every row, (rows)."""
        gap = values - dense
        return (gap * times(gap, self.matrix.to(gap.dtype))).sum(1)


def input_scale(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Root of the damped Gram diagonal (1 at dead inputs) in float64, and the dead inputs; arguments as `Quadratic.of`.

    Raises:
        ValueError: the Gram matrix holds non-finite values.
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix holds non-finite values")
    diagonal = gram.diagonal(dim1=-2, dim2=-1).double()
    dead = diagonal <= 0
    mean = diagonal.sum(-1, keepdim=True) / (~dead).sum(-1, keepdim=True).clamp_min(1)
    return (diagonal + damping * mean).masked_fill(dead, 1).sqrt(), dead


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """`rows @ matrix` for a shared matrix, row by row for one matrix per row: (rows, n) -> (rows, n)."""
    if matrix.dim() == 2:
        return rows @ matrix
    return torch.bmm(rows.unsqueeze(1), matrix).squeeze(1)


def conjugate_gradients(
    start: Tensor, dense: Tensor, mask: Tensor, matrix: Tensor, steps: int, tolerance: float = 1e-4
) -> Tensor:
    """Minimise tr((B - B⁰) A (B - B⁰)ᵀ) over the kept entries, every row by itself.

    It works on the difference to B⁰, which float32 resolves better than A B = A B⁰.

    Args:
        start (`Tensor`): (rows, n), zero in `mask`.
        dense (`Tensor`): B⁰, (rows, n).
        mask (`Tensor`): bool, (rows, n), `True` = pruned.
        matrix (`Tensor`): A, (n, n) or (rows, n, n), dtype of `start`.
        steps (`int`): most iterations.
        tolerance (`float`): stop when the masked residual has fallen to this share of the masked A B⁰.

    Returns:
        `Tensor`: (rows, n), zero in `mask`.
    """
    values = start.clone()
    residual = times(dense - values, matrix).masked_fill(mask, 0)
    goal = tolerance * times(dense, matrix).masked_fill(mask, 0).norm()
    direction = residual.clone()
    squared = residual.square().sum(1, keepdim=True)
    tiny = torch.finfo(values.dtype).tiny  # rows that are done, or keep nothing, divide 0 by this
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
    """The kept weights that minimise tr((W - W') Q (W - W')ᵀ): Q_SS w'_S = (Q w)_S for every row.

    Needs rows·n² numbers: for small matrices and tests.

    Args:
        weight (`Tensor`): W, (rows, n).
        mask (`Tensor`): bool, (rows, n), `True` = pruned.
        gram (`Tensor`): Q, (n, n) or (rows, n, n), positive definite on the kept inputs of every row.

    Returns:
        `Tensor`: W', (rows, n), zero in `mask`, dtype of `weight`.
    """
    gram = gram.double()
    kept = (~mask).double()
    system = gram * kept[:, :, None] * kept[:, None, :] + torch.diag_embed(mask.double())
    right = times(weight.double(), gram) * kept
    return torch.linalg.solve(system, right.unsqueeze(2)).squeeze(2).masked_fill(mask, 0).to(weight.dtype)
