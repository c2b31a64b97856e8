# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SparseSSM's structured score: whole columns of A_log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...registry import unknown
from ...sparsity.selection import lowest
from . import register_structured_method
from .base import SCAN, StructuredMethod, Units


VARIANTS = ("v1", "l2")


@register_structured_method("sparsessm")
@dataclass
class SparseSSMStates(StructuredMethod):
    """Saliency of a column of A_log, M_t(n) = Σ_c A_log² Σ_s h²_{t-1}, over time. Mamba-1 only.

    `"v1"`: minus the number of steps at which the state is among the lowest that will go, ties by Σ_t M_t. `"l2"`: Σ_t M_t.
    Both estimate the damage of A_log -> 0, but a structured pass removes the state: `state_energy` is the exact measure of
    that.

    Args:
        variant (`str`): `"v1"` (frequency voting, as published) or `"l2"`.
    """

    summary: ClassVar[str] = "time-aggregated saliency of whole columns of A_log"
    source: ClassVar[str] = "Tuo and Wang, arXiv 2506.09613"
    axes: ClassVar[tuple[str, ...]] = ("state",)

    variant: str = "v1"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigurationError(unknown("sparsessm variant", self.variant, list(VARIANTS)))

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return ((SCAN, "state_prev" if self.variant == "v1" else "state_prev_total"),)

    def scores(self, units: Units) -> Tensor:
        squared = units.parts["A_log"].double().reshape(units.count, -1).T.square()  # (I, N)
        if self.variant == "l2":
            return (squared * units.statistics[SCAN, "state_prev_total"]).sum(0)
        saliency = torch.einsum("cn,tcn->tn", squared, units.statistics[SCAN, "state_prev"].double())
        votes = sum(lowest(at_t, units.remove).double() for at_t in saliency[1:])  # no state before step 0
        total = saliency[1:].sum(0)
        return total / (total.max() * 1.000001).clamp_min(torch.finfo(total.dtype).tiny) - votes
