# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradient-aware magnitude: small weights that the loss does not pull on go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import ConfigurationError
from ..sparsity.selection import Selection
from . import register_method
from .base import Statistics, WeightMethod


@register_method("gradient_magnitude")
@dataclass
class GradientMagnitude(WeightMethod):
    """Scores are |W| |∂L/∂W|^alpha, compared over all selected weights at once (`scope="global"`).

    The gradient is that of the next-token loss, its absolute value averaged over batches (the source does not say which
    comes first). With alpha = 0 this is global magnitude pruning. The method was published with a cubic schedule over
    training; one shot is its weakest form.

    Args:
        alpha (`float`): exponent of the gradient, at least 0.
    """

    summary: ClassVar[str] = "|W| times a power of the loss gradient, one threshold over the model"
    source: ClassVar[str] = "Shihab, Akter and Sharma, arXiv 2505.08299"
    default_scope: ClassVar[str] = "global"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ConfigurationError(f"gradient_magnitude needs alpha >= 0, got {self.alpha}")

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("grad_abs",) if self.alpha else ()

    def fill(self, kind: str) -> str | None:
        return "zero" if kind == "a_log" else None

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        if not self.alpha:
            return weight.abs()
        return weight.abs() * statistics["grad_abs"].to(weight.dtype) ** self.alpha
