# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Magnitude of what a unit owns. No calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import ConfigurationError
from ...registry import unknown
from . import register_structured_method
from .base import StructuredMethod, Units


NORMS = ("product", "sum_abs")


@register_structured_method("magnitude")
@dataclass
class UnitMagnitude(StructuredMethod):
    """Norms of the linear weights that a unit owns.

    On states this is worse than a random choice in most published cells: use it as a baseline only.

    Args:
        norm (`str`): on states `"product"`, ‖B row‖₂ ‖C row‖₂, or `"sum_abs"`, Σ abs(B row) + Σ abs(C row). On the other
            axes the root of the sum of squares, or with `"sum_abs"` the sum of absolute values, over all linear weights.
    """

    summary: ClassVar[str] = "norm of the linear weights that a unit owns; no calibration"
    source: ClassVar[str] = "the classic baseline; on states arXiv 2502.18886"
    axes: ClassVar[tuple[str, ...]] = ("state", "head", "head_dim", "channel", "group", "dt_rank")

    norm: str = "product"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ConfigurationError(unknown("magnitude norm", self.norm, list(NORMS)))

    def scores(self, units: Units) -> Tensor:
        parts = [units.parts[name].double() for name in units.linear()]
        if self.norm == "sum_abs":
            return sum(part.abs().sum((1, 2)) for part in parts)
        squares = [part.square().sum((1, 2)) for part in parts]
        if units.axis == "state":
            return (squares[0] * squares[1]).sqrt()
        return sum(squares).sqrt()
