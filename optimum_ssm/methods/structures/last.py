# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LAST's H-infinity score of a state, on selective state-space models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import register_structured_method
from .base import SCAN, StructuredMethod, Units
from .state_energy import downstream


@register_structured_method("last")
@dataclass
class Last(StructuredMethod):
    """B̂_n² Ĉ_n² Σ_c w_c f(Δ̂_c, α_{c,n})² with f(Δ, α) = Δ / (1 - exp(-αΔ)), Δ̂ the mean step, B̂ and Ĉ root mean squares.

    LAST is published for time-invariant systems; this is its extension to the time-varying recurrence: f at the largest
    step bounds the peak-to-peak gain. In Mamba-2 all states of a head share their pole, so the score ranks states of a
    group like ‖B̂‖ ‖Ĉ‖: there only LAST's normalisation across blocks adds something, which is `allocation="last"` with
    `state_energy`.

    Args:
        weighted (`bool`): w_c = E[x_c²] E[silu(z_c)²] ‖W_out column‖², else 1.
    """

    summary: ClassVar[str] = "H-infinity norm of a state, squared"
    source: ClassVar[str] = "Gwak et al., LAST, arXiv 2411.02824, extended to time-varying steps"
    axes: ClassVar[tuple[str, ...]] = ("state",)
    default_allocation: ClassVar[str] = "last"

    weighted: bool = False

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        scan = tuple((SCAN, name) for name in ("tokens", "dt", "b_energy", "c_energy"))
        return (*scan, (SCAN, "x_energy"), ("in_proj.z", "gate_energy")) if self.weighted else scan

    def scores(self, units: Units) -> Tensor:
        tokens = units.statistics[SCAN, "tokens"].double()
        step = units.statistics[SCAN, "dt"].double() / tokens
        states = units.count // units.groups
        gain = self.gain(step[:, None], decay_rates(units, len(step), states))
        if self.weighted:
            inputs = units.statistics[SCAN, "x_energy"].double() / tokens
            gain = gain * (inputs * downstream(units, len(step)))[:, None]
        b, c = (units.statistics[SCAN, name].double().flatten() / tokens for name in ("b_energy", "c_energy"))
        return b * c * units.by_group(gain)

    @staticmethod
    def gain(step: Tensor, rate: Tensor) -> Tensor:
        """f(Δ, α)²; 1/α² as αΔ goes to 0. Shapes broadcast."""
        return (step / -torch.expm1(-rate * step)).square()


def decay_rates(units: Units, rows: int, states: int) -> Tensor:
    """α = exp(A_log) of every channel or head and state, (rows, states), float64."""
    log = units.parts["A_log"].double()
    if log.shape[0] == units.count and units.kinds.get("A_log") == "a_log":
        return log.reshape(units.count, rows).T.exp()  # Mamba-1: a state owns its column
    return log.reshape(rows, 1).expand(rows, states).exp()
