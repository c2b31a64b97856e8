# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What one pass did: to a target, and to a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..families.matching import Target


@dataclass(frozen=True)
class Outcome:
    """What happened to one target.

    Args:
        target (`Target`): the weight or row segment.
        mask (`Tensor`): bool, (rows, …) of the target as stored, in main memory; `True` = removed.
        error (`float`, *optional*): relative squared output error of the weight on its calibration inputs,
            tr((W-W') Q (W-W')ᵀ) / tr(W Q Wᵀ), where the method collected Q.
    """

    target: Target
    mask: Tensor
    error: float | None


@dataclass(frozen=True)
class BlockOutcome:
    """What happened to one block.

    Args:
        index (`int`): its place in the model.
        outcomes (`list[Outcome]`): its targets.
        error (`float`, *optional*): with calibration, the relative error of the block's output on its own inputs.
        seconds (`float`): wall time.
        reconstruction (`tuple[float, float]`, *optional*): relative distance from the dense model's output before and
            after tuning the kept weights.
    """

    index: int
    outcomes: list[Outcome]
    error: float | None
    seconds: float
    reconstruction: tuple[float, float] | None = None
