# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ADMM on a fixed penalty, with a mask that grows to its budget over the first iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..sparsity.selection import Selection, lowest, round_half_up
from . import register_method
from ._quadratic import Quadratic, backed_off, input_scale, times
from .base import Statistics, WeightMethod


@register_method("admm_grad")
@dataclass
class ADMMGrad(WeightMethod):
    """Alternates between solving the quadratic problem and keeping the largest entries, about as cheap as SparseGPT.

    Inputs are scaled to unit energy. In iteration i < m = `mask_steps` the mask holds the share 1 - (1 - (i+1)/m)³ of
    the budget, later it stays as it is. With N:M the largest N of every group are safe and the lowest of the others go
    first. Depthwise convolutions have one taps x taps problem per channel.

    Args:
        damping (`float`): ridge on the unit diagonal of the scaled Gram matrix. It grows tenfold, at most five times,
            when the matrix does not factor.
        rho (`float`): penalty ρ.
        iterations (`int`): ADMM iterations.
        mask_steps (`int`): iterations in which the mask is chosen anew.
        gradual (`bool`): `False`: the whole budget from the first iteration on, as the released code has it for
            unstructured masks.
    """

    summary: ClassVar[str] = "ADMM with a gradually growing mask; kept weights are updated"
    source: ClassVar[str] = "Boža, arXiv 2401.02938: ADMM weight update with gradual mask selection"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    updates_weights: ClassVar[bool] = True

    damping: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    mask_steps: int = 15
    gradual: bool = True

    def __post_init__(self) -> None:
        if not (self.damping > 0 and self.rho > 0):
            raise ConfigurationError(f"admm_grad needs damping > 0 and rho > 0, got {self.damping} and {self.rho}")
        if not 1 <= self.mask_steps <= self.iterations:
            raise ConfigurationError(
                f"admm_grad needs 1 <= mask_steps <= iterations, got {self.mask_steps} and {self.iterations}"
            )

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("conv_gram",) if kind == "conv" else ("gram",)

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        """|W_ij| sqrt(Q_jj), from which the iteration starts: the root of the output error of pruning one entry."""
        scale, dead = input_scale(statistics[self.statistics(kind)[0]])
        return (weight.abs() * scale.to(weight.dtype)).masked_fill(dead, 0)

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        if not selection.pattern.is_n_m and selection.count == 0:
            return weight, torch.zeros_like(weight, dtype=torch.bool)
        problem = Quadratic.of(statistics[self.statistics(kind)[0]])
        dense, shrink = problem.enter(weight), self._shrink(problem.matrix).to(weight.dtype)
        lifted = dense
        for step in range(self.iterations):
            if step < self.mask_steps:
                mask = self._mask(lifted.abs(), step, selection)
            kept = lifted * ~mask
            excess = lifted - kept  # the scaled multiplier
            lifted = dense + times(kept - excess - dense, shrink) + excess
        return problem.leave(lifted, weight, mask), mask

    def _shrink(self, matrix: Tensor) -> Tensor:
        """ρ(A + ridge + ρ)⁻¹, float64: it moves `dense` + x to `dense` + the solution of the quadratic step."""
        for ridge in backed_off(self.damping):
            damped = matrix.clone()
            damped.diagonal(dim1=-2, dim2=-1).add_(ridge + self.rho)
            factor, info = torch.linalg.cholesky_ex(damped)
            if not info.any():
                break
        return self.rho * torch.cholesky_inverse(factor)

    def _mask(self, scores: Tensor, step: int, selection: Selection) -> Tensor:
        """The mask of one iteration: a growing part of the budget, all of it in the last of `mask_steps`."""
        share = 1 - (1 - (step + 1) / self.mask_steps) ** 3 if self.gradual else 1.0
        if not selection.pattern.is_n_m:
            return selection.narrow(round_half_up(share * selection.count)).mask(scores)
        mask = selection.mask(scores)
        return lowest(scores.masked_fill(~mask, torch.inf), round_half_up(share * int(mask.sum())))
