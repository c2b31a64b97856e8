# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Whole blocks, or the SSMs in them, that the model misses least."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import ConfigurationError
from ...registry import unknown
from . import register_structured_method
from .base import StructuredMethod, Units


BLOCK = "block"
UNITS = ("block", "ssm")
SCORES = ("perplexity", "influence")


@register_structured_method("block_drop")
@dataclass
class BlockDrop(StructuredMethod):
    """Drops blocks or SSMs by what the model is like without them.

    Args:
        unit (`str`): `"block"`: the residual stream passes where the block was. `"ssm"`: only the scan goes, its output is
            its input (C = 0, D = 1), convolution, gate and projections stay; shapes stay too.
        score (`str`): `"perplexity"`: the calibration perplexity without the unit and those already dropped, one unit after
            another, Σ (U - i) evaluations for the i-th of U units. `"influence"`: 1 - E cos(with, without) of the
            block's output, the Block Influence of ShortGPT (arXiv 2403.03853) where the unit is the block: one pass for
            all.
    """

    summary: ClassVar[str] = "greedy leave-one-out of whole blocks or SSMs by calibration perplexity"
    source: ClassVar[str] = "Mamba-Shedder, arXiv 2501.17088"
    axes: ClassVar[tuple[str, ...]] = (BLOCK,)

    unit: str = "block"
    score: str = "perplexity"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigurationError(unknown("block_drop unit", self.unit, list(UNITS)))
        if self.score not in SCORES:
            raise ConfigurationError(unknown("block_drop score", self.score, list(SCORES)))

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return ((BLOCK, self.score),)

    def scores(self, units: Units) -> Tensor:
        return units.statistics[BLOCK, self.score]


def greedy(
    units: Sequence[int], count: int, scores: Callable[[list[int]], Sequence[float]]
) -> list[tuple[int, float]]:
    """Drop `count` units one after another, each time the one with the lowest keep-score among those that are left.

    Args:
        units (`Sequence[int]`): candidates; of equal scores the first one goes.
        count (`int`): how many go.
        scores (`Callable`): `scores(left)`, called once per dropped unit, gives the keep-score of each unit in `left`.

    Returns:
        `list[tuple[int, float]]`: dropped units in their order, with the score that each had then.
    """
    left, dropped = list(units), []
    for _ in range(count):
        found = [float(score) for score in scores(list(left))]
        lowest = min(range(len(left)), key=found.__getitem__)
        dropped.append((left.pop(lowest), found[lowest]))
    return dropped


def evaluations(units: int, count: int) -> int:
    """Leave-one-out evaluations of `greedy`: Σ over i < count of (units - i)."""
    return sum(units - i for i in range(count))
