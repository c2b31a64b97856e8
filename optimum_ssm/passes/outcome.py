# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What one pass did: to a target, to the units of an axis, and to a block."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from ..calibration.placement import to_main_memory
from ..families.matching import Target
from ..surgery.cut import Kept, sliced
from ..surgery.merge import Merged


@dataclass(frozen=True)
class Outcome:
    """What happened to one target.

    Args:
        target (`Target`): the weight or row segment.
        mask (`Tensor`): bool, (rows, …) of the target as stored, in main memory; `True` = removed.
        error (`float`, *optional*; a tensor of one number until the block is done): relative squared output error of the weight on its calibration inputs,
            tr((W-W') Q (W-W')ᵀ) / tr(W Q Wᵀ), where the method collected Q.
    """

    target: Target
    mask: Tensor
    error: float | Tensor | None

    def at_home(self) -> Outcome:
        """The same in main memory and as Python numbers, which waits for an accelerator."""
        return replace(self, mask=to_main_memory(self.mask), error=None if self.error is None else float(self.error))

    def mark(self, masks: dict[str, Tensor]) -> None:
        """Add what was removed to the masks of whole parameters."""
        masks[self.target.parameter][self.target.rows] |= self.mask

    def sliced(self, parameter: str, mask: Tensor | None) -> Tensor | None:
        """An earlier mask of a parameter (path inside the block) in its new shape: here the same."""
        return mask


@dataclass(frozen=True)
class UnitOutcome:
    """What happened to the units of one axis in one block.

    Args:
        axis (`str`): the axis.
        block (`int`): index of the block when the pass began.
        units (`int`): how many there were.
        removed (`list[int]`): which are gone.
        kept (`Kept`): what is left of which dimension of which parameter (path inside the block).

    Class attributes:
        reason: why the rest of a changed parameter is still there.
    """

    reason: ClassVar[str] = "in units with higher scores than the removed ones"

    axis: str
    block: int
    units: int
    removed: list[int]
    kept: Kept = field(default_factory=dict)

    def at_home(self) -> UnitOutcome:
        """The same: all of it is."""
        return self

    def mark(self, masks: dict[str, Tensor]) -> None:
        """Nothing: what is gone has no entries."""

    def sliced(self, parameter: str, mask: Tensor | None) -> Tensor | None:
        """An earlier mask of a parameter (path inside the block) in its new shape."""
        return mask if mask is None or parameter not in self.kept else sliced(mask, self.kept[parameter])


@dataclass(frozen=True)
class MergeOutcome(UnitOutcome):
    """What happened to the groups of one block that were merged.

    Args:
        merged (`Merged`): what was pooled of what.
    """

    reason: ClassVar[str] = "pooled of the merged groups, or no part of B and C"

    merged: Merged | None = None

    def sliced(self, parameter: str, mask: Tensor | None) -> Tensor | None:
        return mask if mask is None or self.merged is None else self.merged.mask(parameter, mask)


@dataclass(frozen=True)
class DropOutcome:
    """One dropped block or SSM.

    Args:
        unit (`str`): `"block"` or `"ssm"`.
        block (`int`): index of the block when the pass began.
        rank (`int`): which one it was in the order in which they went, from 0.
        score (`float`): its keep-score when it went.
        zeroed (`dict[str, Tensor]`): of an SSM, by path inside the block, the entries that are zero now.
    """

    unit: str
    block: int
    rank: int
    score: float
    zeroed: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockOutcome:
    """What happened to one block.

    Args:
        index (`int`): its place in the model when the pass began.
        outcomes (`list[Outcome]`, `list[UnitOutcome]` or `list[DropOutcome]`): its targets, its axes, or itself.
        error (`float`, *optional*): with calibration, the relative error of the block's output on its own inputs.
        seconds (`float`): wall time.
        reconstruction (`tuple[float, float, float]`, *optional*): relative distance from the dense model's output before
            and after tuning the kept weights, and the seconds of that.
    """

    index: int
    outcomes: list
    error: float | None
    seconds: float
    reconstruction: tuple[float, float, float] | None = None
