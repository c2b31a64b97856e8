# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a weight method is: a tensor and its statistics go in, scores or a reconstructed tensor come out.

A method never sees a module, a name, a device or a file. Three kinds of tensor exist:

| kind | shape | input statistics |
|---|---|---|
| `linear` | (out, in) | `col_energy` (in), `gram` (in, in) |
| `conv` (depthwise) | (channels, taps) | `conv_gram` (channels, taps, taps) |
| `a_log` | (channels, states), or (heads) | sums over the recurrence, see `calibration/statistics.py` |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..sparsity.pattern import Pattern
from ..sparsity.selection import Selection


Statistics = Mapping[str, Tensor]
KINDS = ("linear", "conv", "a_log")


@dataclass
class WeightMethod(ABC):
    """Base of the weight methods. A subclass is a dataclass: its fields are what `method_kwargs` may name.

    Class attributes:
        summary: one sentence for `optimum-cli ssm methods` and the docs.
        source: paper and equation, or where else the formula comes from.
        kinds: kinds of tensor that the method can prune.
        default_targets: short weight names pruned when the config names none; those that a family lacks are left out.
        default_scope: comparison group of the scores, as published.
        default_allocation: allocation used when the config names none.
        default_reconstruction_epochs: passes that tune a block's kept weights when the config does not say.
        updates_weights: whether kept weights change.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = KINDS
    default_targets: ClassVar[tuple[str, ...]] = ("in_proj", "x_proj", "dt_proj", "out_proj")
    default_scope: ClassVar[str] = "tensor"
    default_allocation: ClassVar[str] = "uniform"
    default_reconstruction_epochs: ClassVar[int] = 0
    updates_weights: ClassVar[bool] = False

    def statistics(self, kind: str) -> tuple[str, ...]:
        """Names of the statistics that `score` and `prune` read for a tensor of this kind."""
        return ()

    def fill(self, kind: str) -> str | None:
        """For `a_log`: the `a_log_fill` whose damage the score estimates, or `None` where it estimates neither."""
        return None

    def check(self, pattern: Pattern, scope: str | None) -> None:
        """Refuse a pattern or a scope that the method's parameters contradict, before any work is done.

        Args:
            pattern (`Pattern`): unstructured or N:M.
            scope (`str`, *optional*): what the config names; `None` where it names none.

        Raises:
            ConfigurationError: naming the parameter and what is allowed.
        """

    @abstractmethod
    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        """Keep-scores of a tensor: higher means keep.

        Args:
            weight (`Tensor`): float32, shape by kind as in the table above.
            statistics (`Mapping[str, Tensor]`): those that `statistics(kind)` names.
            kind (`str`): `"linear"`, `"conv"` or `"a_log"`.
            selection (`Selection`): the budget; only methods that vote need it.

        Returns:
            `Tensor`: shape of `weight`.
        """

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        """The pruned tensor and the mask of removed entries (`True` = pruned). Arguments as in `score`."""
        mask = selection.mask(self.score(weight, statistics, kind, selection))
        return weight.masked_fill(mask, 0), mask


def output_error(before: Tensor, after: Tensor, statistics: Statistics) -> Tensor | None:
    """Relative squared error of a weight's output on its calibration inputs: tr((W-W') Q (W-W')ᵀ) / tr(W Q Wᵀ).

    Args:
        before, after (`Tensor`): W and W', (out, in), or (channels, taps) for a convolution; float32.
        statistics (`Mapping[str, Tensor]`): with `gram` or `conv_gram`, not damped.

    Returns:
        `Tensor`: one number, float64, where W is: reading it would wait for an accelerator. `None` where the statistics hold
        no Gram matrix; 0 where the output is zero anyway.
    """
    if "gram" in statistics:
        lost, whole = (((w @ statistics["gram"]) * w).sum(dtype=torch.float64) for w in (before - after, before))
    elif "conv_gram" in statistics:
        gram = statistics["conv_gram"]
        lost, whole = (torch.einsum("ck,ckj,cj->", w, gram, w).double() for w in (before - after, before))
    else:
        return None
    return torch.where(whole > 0, lost / whole, 0.0)
