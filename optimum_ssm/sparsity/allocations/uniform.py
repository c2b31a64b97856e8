# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The same share of every weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..selection import round_half_up, split_evenly
from . import register_allocation
from .base import Allocation, Item


@register_allocation("uniform")
@dataclass
class Uniform(Allocation):
    """Every tensor loses round(sparsity · size) entries, every block the same number of units."""

    summary: ClassVar[str] = "the same share of every weight"
    source: ClassVar[str] = "the classic baseline"
    spreads: ClassVar[tuple[str, ...]] = ("weights", "units")

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        return [sparsity] * len(items)

    def shared_counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        return [round_half_up(sparsity * item.size) for item in items]

    def kept_units(self, energies: list[Tensor], keep: int) -> list[int]:
        return split_evenly(keep, [len(energy) for energy in energies])
