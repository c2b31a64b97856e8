# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Channels by how fast they move: the mean time step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import register_structured_method
from .base import SCAN, StructuredMethod, Units


@register_structured_method("delta_activity")
@dataclass
class DeltaActivity(StructuredMethod):
    """The mean over tokens of the step Δ: a channel or head with a small step neither takes in nor forgets much.

    The idea is PerfMamba's; its exact score is not published in readable form.
    """

    summary: ClassVar[str] = "mean time step of a channel or head"
    source: ClassVar[str] = "after PerfMamba, arXiv 2511.22849"
    axes: ClassVar[tuple[str, ...]] = ("channel", "head")

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return (SCAN, "dt"), (SCAN, "tokens")

    def scores(self, units: Units) -> Tensor:
        return units.statistics[SCAN, "dt"].double() / units.statistics[SCAN, "tokens"].double()
