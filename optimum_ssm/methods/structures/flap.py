# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""FLAP's fluctuation scores on the input of the output projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...errors import CalibrationError, ConfigurationError
from ...registry import unknown
from . import register_structured_method
from .base import StructuredMethod, Units


METRICS = ("WIFV", "IFV", "WIFN")


@register_structured_method("flap")
@dataclass
class Flap(StructuredMethod):
    """How much the inputs u of out_proj fluctuate about their mean, which a bias can stand in for.

    | `metric` | of channel c |
    |---|---|
    | `WIFV` | Var(u_c) ‖W_out column‖² |
    | `IFV` | Var(u_c) |
    | `WIFN` | mean over outputs of abs(W_out) times the root mean square of u_c |

    A unit's score is the mean over its channels of the squared metric, standardised over the channels of its block. Inside
    a block that ranks units like the sum (UL-UM); with `uniform_sizes=False` and the default allocation `global` it is the
    published AL-AM. `compensation="bias"` is the method's other half.

    Args:
        metric (`str`): one of the above.
    """

    summary: ClassVar[str] = "fluctuation of the inputs of out_proj, made up for by a bias"
    source: ClassVar[str] = "FLAP, arXiv 2312.11983; on state-space models arXiv 2502.18886"
    axes: ClassVar[tuple[str, ...]] = ("head", "head_dim", "channel", "group")
    default_allocation: ClassVar[str] = "global"

    metric: str = "WIFV"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigurationError(unknown("flap metric", self.metric, list(METRICS)))

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        return (("out_proj", "col_energy" if self.metric == "WIFN" else "moments"),)

    def scores(self, units: Units) -> Tensor:
        metric = self._metric(units).square()
        spread = metric.std()
        if not spread > 0:
            raise CalibrationError(f"flap: the {self.metric} of all channels is the same; nothing tells units apart")
        return ((metric - metric.mean()) / spread).mean(1)

    def _metric(self, units: Units) -> Tensor:
        """(units, width), float64."""
        columns = units.parts["out_proj"].double()
        if self.metric == "WIFN":
            return columns.abs().mean(2) * units.statistics["out_proj", "col_energy"].double().sqrt()
        variance = units.statistics["out_proj", "moments"][1].double()
        return variance * columns.square().sum(2) if self.metric == "WIFV" else variance
