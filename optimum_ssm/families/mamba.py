# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba (Mamba-1): `MambaForCausalLM`. Inner channels I, states N, time step rank R."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from . import register_family
from .axes import Axis, Owned, join, present, runs
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

    def axes(self, block: nn.Module) -> dict[str, Axis]:
        inner, states = block.mixer.A_log.shape
        rank = block.mixer.dt_proj.weight.shape[1]
        channels, u = runs(0, inner), Site("mixer.out_proj", "input")
        out_proj = Owned("out_proj", "mixer.out_proj.weight", 1, channels, site=u)
        z = Owned("in_proj.z", "mixer.in_proj.weight", 0, channels + inner, site=_in_proj(inner, 2 * inner))
        x = Owned("in_proj.x", "mixer.in_proj.weight", 0, channels, site=_in_proj(0, inner), masks=True)
        state = (
            Owned("x_proj.B", "mixer.x_proj.weight", 0, runs(rank, states)),
            Owned("x_proj.C", "mixer.x_proj.weight", 0, runs(rank + states, states), masks=True),
            Owned("A_log", "mixer.A_log", 1, runs(0, states), "a_log"),
        )
        channel = (
            x,
            z,
            Owned("conv1d", "mixer.conv1d.weight", 0, channels, "conv"),
            Owned("conv1d.bias", "mixer.conv1d.bias", 0, channels, "vector", masks=True),
            Owned("x_proj", "mixer.x_proj.weight", 1, channels, site=Site("mixer.x_proj", "input")),
            Owned("dt_proj", "mixer.dt_proj.weight", 0, channels),
            Owned("dt_proj.bias", "mixer.dt_proj.bias", 0, channels, "vector"),
            Owned("A_log", "mixer.A_log", 0, channels, "a_log"),
            Owned("D", "mixer.D", 0, channels, "vector"),
            out_proj,
            Owned("in_proj.bias", "mixer.in_proj.bias", 0, join(channels, channels + inner), "vector", masks=True),
        )
        dt_rank = (
            Owned("x_proj.dt", "mixer.x_proj.weight", 0, runs(0, rank), masks=True),
            Owned("dt_proj", "mixer.dt_proj.weight", 1, runs(0, rank), site=Site("mixer.x_proj", "output", (0, rank))),
        )
        axes = (
            Axis("state", states, 1, state, read=(z, out_proj)),
            Axis("channel", inner, 1, channel, multiple=8),
            Axis("dt_rank", rank, 1, dt_rank),
        )
        return {axis.name: present(axis, block) for axis in axes}

    def sizes(self, block: nn.Module) -> dict[str, int]:
        inner, states = block.mixer.A_log.shape
        rank = block.mixer.dt_proj.weight.shape[1]
        return {"state_size": states, "intermediate_size": inner, "time_step_rank": rank}

    def sizes_after(self, sizes: dict[str, int], axis: Axis, kept: int) -> dict[str, int]:
        field = {"state": "state_size", "channel": "intermediate_size", "dt_rank": "time_step_rank"}[axis.name]
        return {**sizes, field: kept}

    def set_sizes(self, block: nn.Module, sizes: dict[str, int]) -> None:
        mixer, inner = block.mixer, sizes["intermediate_size"]
        mixer.ssm_state_size, mixer.intermediate_size = sizes["state_size"], inner
        mixer.time_step_rank = sizes["time_step_rank"]
        conv = mixer.conv1d
        conv.in_channels = conv.out_channels = conv.groups = inner

    def stock_fields(self, config: Any, sizes: dict[str, int]) -> dict[str, Any] | None:
        return dict(sizes)


def _in_proj(start: int, stop: int) -> Site:
    return Site("mixer.in_proj", "output", (start, stop))
