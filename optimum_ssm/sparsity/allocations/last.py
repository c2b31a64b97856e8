# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Layer-adaptive state pruning: scores normalised by the energy of the better units of their own block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ConfigurationError
from . import register_allocation
from .base import Allocation, Item
from .units import highest


@register_allocation("last")
@dataclass
class Last(Allocation):
    """Keeps the globally largest s_(k) = e_(k) / Σ_{j<=k} e_(j), e sorted in descending order inside each block.

    The energies must not be negative and should be squared norms. The first unit of a block has s = 1 and s_(k) <= 1/k, so
    no block is emptied; the scale of a block does not matter (arXiv 2411.02824, Sec. 4.2).
    """

    summary: ClassVar[str] = "one threshold over energies normalised within each block"
    source: ClassVar[str] = "Gwak et al., LAST, arXiv 2411.02824"
    spreads: ClassVar[tuple[str, ...]] = ("units",)

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        raise ConfigurationError("allocation 'last' spreads units of a structural axis, not weights")

    def kept_units(self, energies: list[Tensor], keep: int) -> list[int]:
        return highest([last_scores(energy) for energy in energies], keep)


def last_scores(energies: Tensor) -> Tensor:
    """s_(k) of energies in descending order, float64; zeros score zero.

    Raises:
        ConfigurationError: an energy is negative.
    """
    energies = energies.double()
    if (energies < 0).any():
        raise ConfigurationError("allocation 'last' needs energies, and this method's scores can be negative")
    total = energies.cumsum(0)
    return (energies / total).where(total > 0, total)
