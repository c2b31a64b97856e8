# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Second-order Taylor scores: what the loss would gain in error, by the diagonal of the empirical Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import ConfigurationError
from ...registry import unknown
from . import register_structured_method
from .base import StructuredMethod, Units


@register_structured_method("taylor")
@dataclass
class Taylor(StructuredMethod):
    """Squared change of the loss along the weights that a unit owns, from gradients of the next-token loss.

    Σ over the rows and columns that the unit owns of mean(W² F), F the mean over sequences of the squared gradient: joint
    over all linear weights of the unit (on states the rows of B and C), so that nothing is ranked apart. It needs backward
    passes through the whole model, and one shot above 50 % it can diverge.

    Args:
        only (`list[str]`): names of the parts to take, such as `["x_proj.C"]`; default all linear ones.
    """

    summary: ClassVar[str] = "empirical Fisher of all weights that a unit owns"
    source: ClassVar[str] = "arXiv 2502.18886 (`taylor_second`, without its factor 1/2)"
    axes: ClassVar[tuple[str, ...]] = ("state", "head", "head_dim", "channel", "group", "dt_rank")

    only: list | None = None

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return tuple((name, "fisher") for name in self._chosen(parts))

    def scores(self, units: Units) -> Tensor:
        total = 0.0
        for name in self._chosen(units.kinds):
            total = total + (units.parts[name].double().square() * units.statistics[name, "fisher"]).mean(2).sum(1)
        return total

    def _chosen(self, kinds: Mapping[str, str]) -> list[str]:
        linear = [name for name, kind in kinds.items() if kind == "linear"]
        for name in self.only or ():
            if name not in linear:
                raise ConfigurationError(unknown("taylor part", name, linear))
        return [name for name in linear if self.only is None or name in self.only]
