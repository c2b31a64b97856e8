# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ADMM with a mask that grows to its budget over the first iterations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..sparsity.selection import lowest, round_half_up
from . import register_method
from ._quadratic import Quadratic, input_scale, times
from .base import WeightMethod


@register_method("admm_grad")
@dataclass
class ADMMGrad(WeightMethod):
    damping: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    mask_steps: int = 15
    gradual: bool = True

    summary: ClassVar[str] = "operator splitting on a gradually growing mask; kept weights are updated"
    source: ClassVar[str] = "Bo\u017ea, arXiv 2401.02938, Algorithms 1 and 2"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    updates_weights: ClassVar[bool] = True

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("conv_gram",) if kind == "conv" else ("gram",)

    def score(self, weight, statistics, kind, selection):
        scale, dead = input_scale(statistics["conv_gram" if kind == "conv" else "gram"], 0.0)
        return (weight.abs() * scale.to(weight.dtype)).masked_fill(dead, 0)

    def prune(self, weight, statistics, kind, selection):
        if not selection.pattern.is_n_m and selection.count == 0:
            return weight, torch.zeros_like(weight, dtype=torch.bool)
        problem = Quadratic.of(statistics["conv_gram" if kind == "conv" else "gram"], ridge=self.damping)
        dense = problem.enter(weight)
        m = problem.matrix
        shifted = m + self.rho * torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted)).to(weight.dtype)
        dual = torch.zeros_like(dense)
        current = dense
        for step in range(self.iterations):
            lifted = current + dual
            if step < self.mask_steps:
                mask = self._mask(lifted.abs(), step, selection)
            kept = lifted.masked_fill(mask, 0)
            dual = lifted - kept
            current = dense + times(self.rho * (kept - dual - dense), inverse)
        values = (current + dual).masked_fill(mask, 0)
        return problem.leave(values, weight, mask), mask

    def _mask(self, scores, step, selection):
        share = 1 - (1 - (step + 1) / self.mask_steps) ** 3 if self.gradual else 1.0
        if not selection.pattern.is_n_m:
            return selection.narrow(round_half_up(share * selection.count)).mask(scores)
        mask = selection.mask(scores)
        if share < 1 and self.gradual:
            cnt = round_half_up(share * int(mask.sum()))
            mask = lowest(torch.where(mask, scores, torch.inf), cnt)
        return mask
