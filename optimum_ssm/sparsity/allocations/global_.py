# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""One threshold over the scores of all weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..selection import lowest, round_half_up
from . import register_allocation
from .base import Allocation, Evidence, Item
from .units import highest


@register_allocation("global")
@dataclass
class Global(Allocation):
    """The lowest scores of the whole model go; every weight loses as many as it has among them.

    Scores are taken on dense activations and held in float32 in main memory, 4 bytes per selected weight. They must be
    comparable between weights: magnitudes are, and normalised errors; Wanda's products of a weight and its input are
    only where inputs have similar scales.
    """

    summary: ClassVar[str] = "one threshold over the scores of all selected weights"
    source: ClassVar[str] = "global magnitude pruning (Han et al., arXiv 1506.02626); arXiv 2505.08299"
    spreads: ClassVar[tuple[str, ...]] = ("weights", "units")

    def statistics(self, kind: str, of_method: tuple[str, ...]) -> tuple[str, ...] | None:
        return of_method

    def summarise(self, block: list[Evidence], sparsity: float) -> list[Any]:
        return [evidence.score().float().cpu() for evidence in block]

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        counts = self.shared_counts(items, summaries, sparsity)
        return [count / item.size for count, item in zip(counts, items)]

    def shared_counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        scores = torch.cat([summary.reshape(-1) for summary in summaries])
        mask = lowest(scores, round_half_up(sparsity * len(scores)))
        return [int(part.sum()) for part in mask.split([item.size for item in items])]

    def kept_units(self, energies: list[Tensor], keep: int) -> list[int]:
        return highest(energies, keep)
