# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Random pruning: the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..sparsity.selection import Selection
from . import register_method
from .base import Statistics, WeightMethod


@register_method("random")
@dataclass
class Random(WeightMethod):
    """Scores are drawn uniformly.

    Args:
        seed (`int`): seed of the draw. The draw also depends on the tensor's values, so that two tensors of one shape
            get different masks without the method knowing their names.
    """

    summary: ClassVar[str] = "uniformly random scores; the control"
    source: ClassVar[str] = "control"

    seed: int = 0

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        digest = int(weight.double().abs().sum().item() * 1e6) % (2**31)
        mixed = (self.seed * 2654435761 + digest) % 2**32  # torch seeds the CPU by 32 bits
        generator = torch.Generator().manual_seed(mixed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)
