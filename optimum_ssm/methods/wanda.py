# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Wanda: weight times the norm of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..sparsity.pattern import Pattern
from ..sparsity.selection import Selection, lowest
from . import register_method
from .base import Statistics, WeightMethod


@register_method("wanda")
@dataclass
class Wanda(WeightMethod):
    """Scores are |W_ij| sqrt(q_j), q_j the mean square of input j per token (arXiv 2306.11695, Eq. 1).

    Weights of one output compete with each other (`scope="row"`). Kept weights are not changed. On the depthwise
    convolution q is the mean square of each tap's own input.

    Args:
        use_variant (`bool`): per row, prune the longest prefix of ascending scores whose sum is at most alpha times
            the row's sum, with one alpha for the tensor that meets its budget exactly (the released code bisects alpha
            to a sparsity error of 1e-3). Rows then lose different shares.
    """

    summary: ClassVar[str] = "|W| times the root mean square of the weight's input"
    source: ClassVar[str] = "Sun et al., arXiv 2306.11695, Eq. 1; on state-space models arXiv 2502.18886"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")
    default_scope: ClassVar[str] = "row"

    use_variant: bool = False

    def statistics(self, kind: str) -> tuple[str, ...]:
        return ("conv_gram",) if kind == "conv" else ("col_energy",)

    def check(self, pattern: Pattern, scope: str | None) -> None:
        if self.use_variant and (pattern.is_n_m or scope not in (None, "row")):
            raise ConfigurationError(
                "wanda use_variant=True chooses prefixes of rows: it goes with unstructured and scope='row' alone"
            )

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        if kind == "conv":
            energy = statistics["conv_gram"].diagonal(dim1=1, dim2=2)
        else:
            energy = statistics["col_energy"]
        return weight.abs() * energy.to(weight.dtype).sqrt()

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        if not self.use_variant:
            return super().prune(weight, statistics, kind, selection)
        scores = self.score(weight, statistics, kind, selection)
        mask = _prefix_mask(scores, selection.count)
        return weight.masked_fill(mask, 0), mask


def _prefix_mask(scores: Tensor, count: int) -> Tensor:
    """Per row the longest prefix of ascending scores with sum <= alpha * row sum, alpha such that `count` entries go.

    The released code bisects alpha. Its limit needs no search: an entry is inside the prefix when its share of the
    cumulative row sum is at most alpha, so the `count` lowest shares are the prefixes of the exact alpha.
    """
    ordered, order = scores.double().sort(dim=1, stable=True)
    share = ordered.cumsum(1) / ordered.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, lowest(share, count))
