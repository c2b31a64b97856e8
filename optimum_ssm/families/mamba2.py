# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba-2: `Mamba2ForCausalLM`. Heads H of dimension P (inner size I = H·P), states N, groups G."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from . import register_family
from .base import Family, PrunableWeight, Site


@register_family("mamba2")
class Mamba2(Family):
    """Rows of in_proj are [z, x, B, C, dt], channels of conv1d are [x, B, C]. A_log is (H)."""

    model_types: ClassVar[tuple[str, ...]] = ("mamba2",)
    scan: ClassVar[str] = "mamba2_chunk_scan"
    recurrence: ClassVar[str] = "mamba2"

    def weights(self, block: nn.Module) -> list[PrunableWeight]:
        inner = block.mixer.out_proj.weight.shape[1]
        conv = block.mixer.conv1d.weight.shape[0]
        bc = (conv - inner) // 2  # G·N rows each of B and C
        edges = [0, inner, 2 * inner, 2 * inner + bc, 2 * inner + 2 * bc, block.mixer.in_proj.weight.shape[0]]
        return [
            PrunableWeight(
                "in_proj",
                "mixer.in_proj.weight",
                "linear",
                Site("mixer.in_proj", "input"),
                dict(zip(("z", "x", "B", "C", "dt"), zip(edges, edges[1:]))),
            ),
            # The conv1d module is never called: its weight meets the x, B, C columns of what in_proj gives.
            PrunableWeight(
                "conv1d",
                "mixer.conv1d.weight",
                "conv",
                Site("mixer.in_proj", "output", (inner, inner + conv)),
                {"x": (0, inner), "B": (inner, inner + bc), "C": (inner + bc, conv)},
            ),
            PrunableWeight("A_log", "mixer.A_log", "a_log", Site("mixer", "scan")),
            PrunableWeight("out_proj", "mixer.out_proj.weight", "linear", Site("mixer.out_proj", "input")),
        ]
