# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The same share of every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..selection import round_half_up
from . import register_allocation
from .base import Allocation, Item


@register_allocation("uniform")
@dataclass
class Uniform(Allocation):
    """Every tensor loses round(sparsity · size) entries."""

    summary: ClassVar[str] = "the same share of every weight"
    source: ClassVar[str] = "the classic baseline"

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        return [sparsity] * len(items)

    def shared_counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        return [round_half_up(sparsity * item.size) for item in items]
