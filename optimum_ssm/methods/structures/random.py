# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Random units: the control that every score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import register_structured_method
from .base import StructuredMethod, Units


@register_structured_method("random")
@dataclass
class RandomUnits(StructuredMethod):
    """Scores are drawn uniformly.

    Args:
        seed (`int`): seed of the draw. The draw also depends on the units' weights, so that two blocks differ without the
            method knowing their names.
    """

    summary: ClassVar[str] = "uniformly random scores; the control"
    source: ClassVar[str] = "control"
    axes: ClassVar[tuple[str, ...]] = ("state", "head", "head_dim", "channel", "group", "dt_rank", "block")

    seed: int = 0

    def scores(self, units: Units) -> Tensor:
        total = sum(part.double().abs().sum().item() for part in units.parts.values())
        digest = int(total * 1e6) % (2**31)
        mixed = (self.seed * 2654435761 + digest) % 2**32  # torch seeds the CPU by 32 bits
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(units.count, generator=generator)
