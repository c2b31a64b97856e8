# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Merging of the B and C heads of Mamba-2: runs of consecutive groups share one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ConfigurationError
from ...registry import unknown
from . import register_structured_method
from ._assignment import assignment
from .base import StructuredMethod, Units


REDUCES = ("mean", "first", "random")


@register_structured_method("merge")
@dataclass
class MergeGroups(StructuredMethod):
    """Pools B and C of b = G / G' consecutive groups into those of one; heads, norm and output stay as they are.

    B and C are seen as (G, N) each. (The published code sees [B, C] as (G, 2N), which mixes heads of B with heads of C.)

    Args:
        reduce (`str`): `"mean"` of the run; `"first"` keeps the first group of it; `"random"` keeps one drawn at random,
            the paper's random drop.
        align (`bool`): the order of states inside a group is arbitrary, so match those of every group with those of the
            first of its run before the mean: the assignment with the largest sum of correlations of the filters
            (convolution ⊗ projection row) that make B_t and C_t. A proposal of this library.
        seed (`int`): seed of `"random"`.
    """

    summary: ClassVar[str] = "mean of the B and C heads of consecutive groups (Mamba-2 with more than one)"
    source: ClassVar[str] = "head merging of SSM-Pruner, arXiv 2502.18886"
    axes: ClassVar[tuple[str, ...]] = ("group",)
    merges: ClassVar[bool] = True

    reduce: str = "mean"
    align: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.reduce not in REDUCES:
            raise ConfigurationError(unknown("merge reduce", self.reduce, list(REDUCES)))
        if self.align and self.reduce != "mean":
            raise ConfigurationError(f"merge align=True changes nothing for reduce={self.reduce!r}. Allowed: 'mean'")

    def scores(self, units: Units) -> Tensor:
        """Share of every group in the one that its run becomes, (G); shares of a run sum to 1."""
        kept = units.count - units.remove
        run = units.count // kept
        if self.reduce == "mean":
            return torch.full((units.count,), 1 / run, dtype=torch.float64)
        chosen = torch.zeros(kept, dtype=torch.long)
        if self.reduce == "random":
            total = sum(part.double().abs().sum().item() for part in units.parts.values())  # blocks draw differently
            mixed = (self.seed * 2654435761 + int(total * 1e6)) % 2**32  # torch seeds the CPU by 32 bits
            generator = torch.Generator().manual_seed(mixed)
            chosen = torch.randint(run, (kept,), generator=generator)
        return F.one_hot(chosen, run).double().flatten()

    def order(self, units: Units) -> Tensor:
        """Which state of every group goes with state n of the first group of its run: int64, (G, N)."""
        states = next(iter(units.parts.values())).shape[1]
        order = torch.arange(states).repeat(units.count, 1)
        run = units.count // (units.count - units.remove)
        for group in range(units.count) if self.align else ():
            first = group - group % run
            if group != first:
                order[group] = assignment(sum(_alike(units, side, first, group) for side in ("B", "C")))
        return order


def _alike(units: Units, side: str, first: int, other: int) -> Tensor:
    """Cosine of the filters of two groups' states, (N, N): that of an outer product is the product of the cosines."""
    alike = torch.ones((), dtype=torch.float64)
    for name in (f"in_proj.{side}", f"conv1d.{side}"):
        rows = F.normalize(units.parts[name].double(), dim=-1).cpu()
        alike = alike * (rows[first] @ rows[other].T)
    return alike
