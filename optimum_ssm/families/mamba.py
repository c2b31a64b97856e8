# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba (Mamba-1): `MambaForCausalLM`. Inner channels I, states N, time step rank R."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from . import register_family
from .base import Family, PrunableWeight, Site


@register_family("mamba")
class Mamba(Family):
    """Rows of in_proj are [x, z], rows of x_proj are [dt, B, C]. A_log is (I, N)."""

    model_types: ClassVar[tuple[str, ...]] = ("mamba",)
    scan: ClassVar[str] = "mamba_selective_scan"
    recurrence: ClassVar[str] = "mamba"

    def weights(self, block: nn.Module) -> list[PrunableWeight]:
        inner, states = block.mixer.A_log.shape
        rank = block.mixer.dt_proj.weight.shape[1]
        return [
            PrunableWeight(
                "in_proj",
                "mixer.in_proj.weight",
                "linear",
                Site("mixer.in_proj", "input"),
                {"x": (0, inner), "z": (inner, 2 * inner)},
            ),
            # The conv1d module is never called: its weight meets the x half of what in_proj gives.
            PrunableWeight("conv1d", "mixer.conv1d.weight", "conv", Site("mixer.in_proj", "output", (0, inner))),
            PrunableWeight(
                "x_proj",
                "mixer.x_proj.weight",
                "linear",
                Site("mixer.x_proj", "input"),
                {"dt": (0, rank), "B": (rank, rank + states), "C": (rank + states, rank + 2 * states)},
            ),
            # Nor is dt_proj: its weight meets the first R columns of what x_proj gives.
            PrunableWeight("dt_proj", "mixer.dt_proj.weight", "linear", Site("mixer.x_proj", "output", (0, rank))),
            PrunableWeight("A_log", "mixer.A_log", "a_log", Site("mixer", "scan")),
            PrunableWeight("out_proj", "mixer.out_proj.weight", "linear", Site("mixer.out_proj", "input")),
        ]
