# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..sparsity.selection import Selection
from . import register_method
from .base import Statistics, WeightMethod


@register_method("magnitude")
@dataclass
class Magnitude(WeightMethod):
    """Scores are |W|. Needs no calibration.

    Args:
        largest (`bool`): for `A_log` only, prune the *largest* entries instead. Their decay exp(-exp(A_log) dt) is
            nearly 0 already, so this is the data-free choice under `a_log_fill="memoryless"`, where plain magnitude
            removes the slowest states and ruins the model.
    """

    summary: ClassVar[str] = "absolute value of the weight; no calibration"
    source: ClassVar[str] = "the classic baseline; the `largest` order for A_log follows from dA = exp(-exp(A_log) dt)"

    largest: bool = False

    def fill(self, kind: str) -> str | None:
        if kind != "a_log":
            return None
        return "memoryless" if self.largest else "zero"

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        if kind == "a_log" and self.largest:
            return -weight
        return weight.abs()
