# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ALPS: operator splitting finds which weights stay, conjugate gradients find their values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..sparsity.selection import Selection
from . import register_method
from ._quadratic import (
    Quadratic,
    backed_off,
    best_subsets,
    conjugate_gradients,
    exact_solve,
    input_scale,
    squared_error,
)
from ._sharing import once_per_matrix
from .base import Statistics, WeightMethod


LEAST_STEPS, SETTLED = 30, 3e-4  # from this iteration on, a change of this share of the support ends the search
LARGEST_RHO = 1e6


@register_method("alps")
@dataclass
class ALPS(WeightMethod):
    """Minimises the damped output error ‖X (W' - W)ᵀ‖² + λ‖W' - W‖² over all masks of the budget at once.

    ADMM alternates between two copies of the weight: one solves the quadratic problem exactly, the other keeps its
    largest entries (or the largest of each N:M group); a multiplier draws them together, with a penalty ρ that grows
    while the support still changes. Inputs are scaled to unit energy first. On the support that it ends with,
    conjugate gradients re-solve the kept weights. If dense weights cut by their Wanda scores are better than that
    (they can be where inputs are almost uncorrelated), their support is re-solved instead.

    Depthwise convolutions have one taps x taps problem per channel, small enough to try every subset of the taps.

    Args:
        damping (`float`): λ as a share of the mean Gram diagonal over live inputs. It grows tenfold, at most five
            times, when the Gram matrix is not positive definite.
        rho0 (`float`): first penalty ρ. It falls fivefold, and the search starts again, until the support moves.
        iterations (`int`): most ADMM iterations; about 35 are the rule.
        update_every (`int`): iterations between two looks at the support, which may change ρ or end the search.
        cg_steps (`int`): most conjugate gradient iterations.
    """

    summary: ClassVar[str] = "ADMM for the mask, conjugate gradients for the kept weights; lowest output error"
    source: ClassVar[str] = "Meng et al., arXiv 2406.07831, Algorithms 1 and 2"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    updates_weights: ClassVar[bool] = True

    damping: float = 0.01
    rho0: float = 0.1
    iterations: int = 300
    update_every: int = 3
    cg_steps: int = 10

    def __post_init__(self) -> None:
        if not (self.damping > 0 and 0 < self.rho0 <= LARGEST_RHO):
            raise ConfigurationError(
                f"alps needs damping > 0 and rho0 in (0, {LARGEST_RHO:g}], got {self.damping} and {self.rho0}"
            )
        if self.iterations < 1 or self.update_every < 1 or self.cg_steps < 0:
            raise ConfigurationError(
                "alps needs iterations >= 1, update_every >= 1 and cg_steps >= 0, got "
                f"{self.iterations}, {self.update_every} and {self.cg_steps}"
            )

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("conv_gram",) if kind == "conv" else ("gram",)

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        """|B⁰|, from which the search starts: the root of the damped output error of pruning one entry alone."""
        scale, dead = input_scale(statistics[self.statistics(kind)[0]], self.damping)
        return (weight.abs() * scale.to(weight.dtype)).masked_fill(dead, 0)

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        if not selection.pattern.is_n_m and selection.count == 0:
            return weight, torch.zeros_like(weight, dtype=torch.bool)
        problem, values, vectors = _decompose(statistics[self.statistics(kind)[0]], self.damping)
        dense, matrix = problem.enter(weight), problem.matrix.to(weight.dtype)
        if kind == "conv":
            mask = best_subsets(dense, problem.matrix, selection)
            return problem.leave(exact_solve(dense, mask, problem.matrix), weight, mask), mask
        wanda = selection.mask(dense.abs())
        found = self._search(dense, wanda, values.to(weight.dtype), vectors.to(weight.dtype), selection)
        mask = selection.mask(found.abs())
        solved = self._solve(found.masked_fill(mask, 0), dense, mask, matrix)
        cut = dense.masked_fill(wanda, 0)
        if squared_error(cut, dense, matrix).sum() < squared_error(solved, dense, matrix).sum():
            mask, solved = wanda, self._solve(cut, dense, wanda, matrix)
        return problem.leave(solved, weight, mask), mask

    def reconstruct(self, weight: Tensor, mask: Tensor, statistics: Statistics, kind: str = "linear") -> Tensor:
        """Conjugate gradients alone, on a given mask (`True` = pruned), so that they can follow any criterion."""
        problem = Quadratic.of(statistics[self.statistics(kind)[0]], self.damping)
        dense = problem.enter(weight)
        solved = self._solve(dense.masked_fill(mask, 0), dense, mask, problem.matrix.to(weight.dtype))
        return problem.leave(solved, weight, mask)

    def _solve(self, start: Tensor, dense: Tensor, mask: Tensor, matrix: Tensor) -> Tensor:
        """Algorithm 2; a row that rounding has made worse keeps its start."""
        solved = conjugate_gradients(start, dense, mask, matrix, self.cg_steps)
        worse = squared_error(solved, dense, matrix) > squared_error(start, dense, matrix)
        return torch.where(worse[:, None], start, solved)

    def _search(self, dense: Tensor, first: Tensor, values: Tensor, vectors: Tensor, selection: Selection) -> Tensor:
        """Algorithm 1: the last solution of the quadratic step, (rows, n), whose largest entries are the support.

        With D the pruned copy and Z the multiplier, `lifted` is B + Z/ρ, and D keeps its largest entries. Then Z/ρ
        becomes `lifted` - D, and the quadratic step is B = B⁰ + ρ(A + ρ)⁻¹ (D - Z/ρ - B⁰).
        """
        rho, moved = self.rho0, False
        apply = _shrink(rho, values, vectors, len(dense), self.update_every)
        budget = first.numel() - int(first.sum())
        kept, excess, seen = dense * ~first, torch.zeros_like(dense), first  # excess is Z/ρ
        for step in range(1, self.iterations + 1):
            solution = dense + apply(kept - excess - dense)
            lifted = solution + excess
            mask = selection.mask(lifted.abs())
            kept = lifted * ~mask
            excess = lifted - kept
            if step % self.update_every:
                continue
            changed = int((mask ^ seen).sum())
            if (moved and changed == 0) or (step > LEAST_STEPS and changed <= SETTLED * budget):
                break
            seen, before = mask, rho
            moved = moved or changed > 0.005 * budget
            if not moved:
                rho /= 5
                if changed:
                    kept, excess, seen = dense * ~first, torch.zeros_like(dense), first
            else:
                rho *= 1.3 if changed > 0.1 * budget else 1.2 if changed > 0.005 * budget else 1.1
                rho = min(rho, LARGEST_RHO)
            excess *= before / rho
            apply = _shrink(rho, values, vectors, len(dense), self.update_every)
        return solution


@once_per_matrix
def _decompose(gram: Tensor, damping: float) -> tuple[Quadratic, Tensor, Tensor]:
    """The damped problem, and eigenvalues (..., n) and eigenvectors (..., n, n) of its matrix in float64."""
    for raised in backed_off(damping):
        problem = Quadratic.of(gram, raised)
        try:
            values, vectors = torch.linalg.eigh(problem.matrix)
        except torch.linalg.LinAlgError:  # no convergence: more damping helps that too
            continue
        if (values > 0).all():
            break
    return problem, values, vectors


def _shrink(rho: float, values: Tensor, vectors: Tensor, rows: int, uses: int) -> Callable[[Tensor], Tensor]:
    """Multiplication by ρ(A + ρ)⁻¹, which is formed where that pays for `uses` products with (rows, n)."""
    factor = rho / (values + rho)
    if len(vectors) < uses * rows:
        matrix = (vectors * factor) @ vectors.T
        return lambda x: x @ matrix
    return lambda x: (x @ vectors * factor) @ vectors.T
