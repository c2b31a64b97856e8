# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The output energy of a state: what the scan's output would lose without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import register_structured_method
from .base import SCAN, StructuredMethod, Units


@register_structured_method("state_energy")
@dataclass
class StateEnergy(StructuredMethod):
    """Σ over tokens, and over the channels or heads that read the state, of (C_t h_t)².

    The product is taken per token and then summed: means of C² and h² apart lose their correlation. For one state it is
    exactly the squared change of the scan's output when that state is removed.

    Args:
        weighted (`bool`): weigh every channel by what follows it, E[silu(z)²] ‖W_out column‖², every head by the mean of
            that over its channels.
    """

    summary: ClassVar[str] = "energy of a state's contribution to the scan's output"
    source: ClassVar[str] = "GHOST, arXiv 2602.11408 (its S_n is the root of the mean)"
    axes: ClassVar[tuple[str, ...]] = ("state",)

    weighted: bool = False

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        gate = (("in_proj.z", "gate_energy"),) if self.weighted else ()
        return ((SCAN, "state_energy"), *gate)

    def scores(self, units: Units) -> Tensor:
        energy = units.statistics[SCAN, "state_energy"].double()
        if self.weighted:
            energy = energy * downstream(units, len(energy))[:, None]
        return units.by_group(energy)


def downstream(units: Units, rows: int) -> Tensor:
    """E[silu(z)²] ‖W_out column‖² of every channel, or its mean over the channels of each of `rows` heads, (rows), float64."""
    gate = units.statistics["in_proj.z", "gate_energy"].double().flatten()
    columns = units.parts["out_proj"].double().square().sum((1, 2))
    return (gate * columns).reshape(rows, -1).mean(1)
