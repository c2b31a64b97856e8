# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a structured method is: the tensors that units own and statistics go in, one keep-score per unit comes out.

A method never sees a module, a device or a file. It sees parts, named as the family names them:

| part | shape | meaning |
|---|---|---|
| what units own | (units, width, rest) | e.g. `in_proj.B` of a state is (units, 1, hidden), `out_proj` of a head (units, P, hidden) |
| what is there to read | (channels, 1, rest) | on the state axis `in_proj.z` and `out_proj` of every inner channel |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


SCAN = "scan"


@dataclass(frozen=True)
class Units:
    """The units of one axis in one block, as a method sees them.

    Args:
        axis (`str`): the axis.
        count (`int`): units.
        groups (`int`): equal runs of consecutive units, of which each keeps the same number.
        remove (`int`): units that will go; only methods that vote need it.
        parts (`Mapping[str, Tensor]`): float32 tensors by name, shapes as above.
        kinds (`Mapping[str, str]`): kind of every owned part: `"linear"`, `"conv"`, `"a_log"` or `"vector"`.
        statistics (`Mapping[tuple[str, str], Tensor]`): by part and name: statistics of activations (…, units, width),
            of gradients as the part; sums of the scan under the part `"scan"`, raw.
    """

    axis: str
    count: int
    groups: int
    remove: int
    parts: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    statistics: Mapping[tuple[str, str], Tensor]

    def linear(self) -> list[str]:
        """Names of the owned parts of linear weights."""
        return [name for name, kind in self.kinds.items() if kind == "linear"]

    def by_group(self, rows: Tensor) -> Tensor:
        """Sum (rows, units per group) over the rows of each group to (units).

        Rows are channels or heads in order, and those of a group are consecutive: Mamba-1 has (I, N) and one group,
        Mamba-2 (H, N) and G groups.
        """
        return rows.reshape(self.groups, -1, rows.shape[-1]).sum(1).flatten()


@dataclass
class StructuredMethod(ABC):
    """Base of the structured methods. A subclass is a dataclass: its fields are what `method_kwargs` may name.

    Class attributes:
        summary: one sentence for `optimum-cli ssm methods` and the docs.
        source: paper and equation, or where else the formula comes from.
        axes: axes that it scores; the first one that a family has is the default.
        default_allocation: how units are spread over blocks where `uniform_sizes=False` allows to choose.
        merges: units are not cut out but pooled with their neighbours; the scores are then their shares, and
            `order(units)` says which of their members belong together.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    axes: ClassVar[tuple[str, ...]]
    default_allocation: ClassVar[str] = "uniform"
    merges: ClassVar[bool] = False

    def needs(self, axis: str, parts: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """(part, statistic) pairs that `scores` reads.

        Args:
            axis (`str`): the axis.
            parts (`Mapping[str, str]`): names of the owned parts with their kinds.
        """
        return ()

    @abstractmethod
    def scores(self, units: Units) -> Tensor:
        """Keep-scores (units), float32 or float64: higher means keep."""
