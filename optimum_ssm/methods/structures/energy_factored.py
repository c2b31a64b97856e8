# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""State energy from factors that need no recurrence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import register_structured_method
from .base import SCAN, StructuredMethod, Units


@register_structured_method("energy_factored")
@dataclass
class EnergyFactored(StructuredMethod):
    """Σ over the channels or heads h that read a state of ‖Δ_h B_n‖₂ ‖C_n‖₂, norms over tokens.

    UniQL's matrix root reduces to this; its code takes Δ before the softplus, here it is the step itself.
    """

    summary: ClassVar[str] = "norm of a state's input times norm of its output map; no recurrence"
    source: ClassVar[str] = "UniQL, arXiv 2512.03383"
    axes: ClassVar[tuple[str, ...]] = ("state",)

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return (SCAN, "dt_b_energy"), (SCAN, "c_energy")

    def scores(self, units: Units) -> Tensor:
        into = units.by_group(units.statistics[SCAN, "dt_b_energy"].double().sqrt())
        return into * units.statistics[SCAN, "c_energy"].double().flatten().sqrt()
