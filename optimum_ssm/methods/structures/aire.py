# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The H2 form of LAST's score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import register_structured_method
from .last import Last


@register_structured_method("aire")
@dataclass
class Aire(Last):
    """B̂_n² Ĉ_n² Σ_c w_c Δ̂_c² / (1 - exp(-2 α_{c,n} Δ̂_c)): the energy of the impulse response, not its largest gain.

    What is said of Mamba-2 under `last` holds here too.

    Args:
        weighted (`bool`): w_c = E[x_c²] E[silu(z_c)²] ‖W_out column‖², else 1.
    """

    summary: ClassVar[str] = "H2 norm of a state, squared"
    source: ClassVar[str] = "AIRE-Prune, arXiv 2602.00534, extended to time-varying steps"

    @staticmethod
    def gain(step: Tensor, rate: Tensor) -> Tensor:
        """Δ² / (1 - exp(-2αΔ)). Shapes broadcast."""
        return step.square() / -torch.expm1(-2 * rate * step)
