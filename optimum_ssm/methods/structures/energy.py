# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Output energy of channels: what the projections that read a channel would lose without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import register_structured_method
from .base import StructuredMethod, Units


READERS = ("out_proj", "x_proj")


@register_structured_method("energy")
@dataclass
class Energy(StructuredMethod):
    """Σ over a unit's channels of E[u_c²] ‖W_out column‖², and in Mamba-1 E[x_c²] ‖W_x column‖² on top.

    A channel of Mamba-1 feeds x_proj, that is every other channel's step, B and C, besides the output.
    """

    summary: ClassVar[str] = "energy that a unit's channels bring into the projections that read them"
    source: ClassVar[str] = "this library; the two-projection form of activation times weight norms"
    axes: ClassVar[tuple[str, ...]] = ("channel", "head", "head_dim", "group")

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, "col_energy") for name in READERS if name in parts)

    def scores(self, units: Units) -> Tensor:
        total = 0.0
        for name in READERS:
            if name in units.kinds:
                columns = units.parts[name].double().square().sum(2)
                total = total + (columns * units.statistics[name, "col_energy"]).sum(1)
        return total
