# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ALPS: ADMM finds which weights stay, conjugate gradients find their values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..sparsity.selection import Selection
from . import register_method
from ._quadratic import Quadratic, conjugate_gradients, input_scale, times
from .base import Statistics, WeightMethod


LARGEST_RHO = 1e6


@register_method("alps")
@dataclass
class ALPS(WeightMethod):
    damping: float = 0.01
    rho0: float = 0.1
    iterations: int = 300
    update_every: int = 3
    cg_steps: int = 10
    guard: bool = True

    summary: ClassVar[str] = "operator splitting for the support, conjugate gradients for the kept weights"
    source: ClassVar[str] = "Meng et al., arXiv 2406.07831, Algorithms 1 and 2"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    updates_weights: ClassVar[bool] = True

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("conv_gram",) if kind == "conv" else ("gram",)

    def score(self, weight, statistics, kind, selection):
        scale, dead = input_scale(statistics["conv_gram" if kind == "conv" else "gram"], self.damping)
        return (weight.abs() * scale.to(weight.dtype)).masked_fill(dead, 0)

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        if not selection.pattern.is_n_m and selection.count == 0:
            return weight, torch.zeros_like(weight, dtype=torch.bool)
        problem = Quadratic.of(statistics["conv_gram" if kind == "conv" else "gram"], self.damping)
        dense = problem.enter(weight)
        matrix = problem.matrix.to(weight.dtype)
        cands = [self._admm(dense, problem, selection)]
        if self.guard:
            cands.append(dense)
        best = None
        for c in cands:
            mask = selection.mask(c.abs())
            start = c.masked_fill(mask, 0)
            v = conjugate_gradients(start, dense, mask, matrix, self.cg_steps)
            e0, e1 = problem.error(start, dense), problem.error(v, dense)
            v = torch.where((e1 < e0)[:, None], v, start)
            e = float(torch.minimum(e0, e1).sum())
            if best is None or e < best[0]:
                best = e, v, mask
        return problem.leave(best[1], weight, best[2]), best[2]

    def _admm(self, dense, problem, selection):
        values, vectors = torch.linalg.eigh(problem.matrix)
        values, vectors = values.to(dense.dtype), vectors.to(dense.dtype)
        size = dense.shape[1]
        explicit = problem.matrix.dim() == 2 and size < 3 * dense.shape[0]

        def solver(rho):
            if explicit:
                inv = (vectors / (values + rho)) @ vectors.T
                return lambda m: m @ inv
            return lambda m: times(times(m, vectors) / (values + rho), vectors.mT)

        rho = self.rho0
        checked = selection.mask(dense.abs())
        total = checked.numel() - int(checked.sum())
        current, kept, dual = dense, dense.masked_fill(checked, 0), torch.zeros_like(dense)
        first = checked
        grown = False
        solve = solver(rho)
        for step in range(1, self.iterations + 1):
            current = dense + solve(rho * (kept - dense) - dual)
            lifted = current + dual / rho
            mask = selection.mask(lifted.abs())
            kept = lifted.masked_fill(mask, 0)
            dual = rho * (lifted - kept)
            if step % self.update_every:
                continue
            changed = int((mask ^ checked).sum())
            checked = mask
            if step > 30 and changed <= 3e-4 * total:
                break
            if changed > 0.1 * total:
                rho, grown = rho * 1.3, True
            elif changed > 0.005 * total:
                rho, grown = rho * 1.2, True
            elif not grown:
                rho /= 5
                if changed:
                    kept, dual, checked = dense.masked_fill(first, 0), torch.zeros_like(dense), first
            elif changed:
                rho *= 1.1
            else:
                break
            rho = min(rho, LARGEST_RHO)
            solve = solver(rho)
        self.stats = (step, rho)
        return current
