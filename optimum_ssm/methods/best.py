# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The combination that this library recommends for the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import register_method
from .alps import ALPS


@register_method("best")
@dataclass
class Best(ALPS):
    """ALPS, its budget spread by measured error, and two epochs of block reconstruction.

    The parts are `method="alps"`, `allocation="error"` (with N:M, whose counts are fixed, `uniform`) and
    `reconstruction_epochs=2`; each can be set by itself. Costs: the allocation solves every weight at several ratios on a
    dense pass of its own, the reconstruction runs forward and backward through every block.

    Args:
        damping, rho0, iterations, update_every, cg_steps: as in `alps`.
    """

    summary: ClassVar[str] = "ALPS with error allocation and block reconstruction: this library's recommendation"
    source: ClassVar[str] = "this library's combination; ALPS: Meng et al., arXiv 2406.07831"
    default_allocation: ClassVar[str] = "error"
    default_reconstruction_epochs: ClassVar[int] = 2
