# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Group-aware pruning of heads and head dims by the activation of x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from . import register_structured_method
from .base import StructuredMethod, Units


@register_structured_method("minitron")
@dataclass
class Minitron(StructuredMethod):
    """Norms of the activation of the x rows of in_proj, before the convolution (x beats z and dt, say the authors).

    With a(h, p) the norm over sequences of the mean absolute activation: a head scores ‖a(h, ·)‖₂ and competes inside its
    group of B and C; a head dim scores ‖a(·, p)‖₂, the same in every head, so that all heads keep the same dims. The paper
    prunes dims first and scores heads on the kept ones: a recipe of two passes. It distils afterwards; without that,
    quality collapses.
    """

    summary: ClassVar[str] = "activation norm of x, the same dims in every head, equal heads in every group"
    source: ClassVar[str] = "Minitron-SSM, arXiv 2504.11409"
    axes: ClassVar[tuple[str, ...]] = ("head", "head_dim")

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return (("in_proj.x", "sequence_activity"),)

    def scores(self, units: Units) -> Tensor:
        activity = units.statistics["in_proj.x", "sequence_activity"].double()
        if units.axis == "head":
            return activity.norm(dim=1)
        by_head = activity.reshape(units.groups, -1)  # the groups of this axis are the heads
        return by_head.norm(dim=0).repeat(units.groups)
