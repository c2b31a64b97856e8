# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What an allocation is: facts about every target go in, exact counts come out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..selection import round_half_up
from .budget import exact_counts


if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Item:
    """One target as an allocation sees it.

    Args:
        name (`str`): short name, such as `in_proj` or `in_proj.z`.
        block (`int`): index of the block.
        size (`int`): number of entries.
        kind (`str`): `"linear"`, `"conv"` or `"a_log"`.
        qualified (`tuple[str, ...]`): names that no other block has, such as `backbone.layers.3.mixer.in_proj.z`.
        whole (`tuple[str, ...]`): of a segment, those of the weight that it is a part of.
    """

    name: str
    block: int
    size: int
    kind: str
    qualified: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """What the plan pass, a dense forward over all blocks, can tell of one target.

    Args:
        item (`Item`): which target.
        weight (`Tensor`): float32, shape by kind.
        statistics (`Mapping[str, Tensor]`): those that the allocation asked for.
        score (`Callable[[], Tensor]`): the method's keep-scores on these statistics.
    """

    item: Item
    weight: Tensor
    statistics: Mapping[str, Tensor]
    score: Callable[[], Tensor]


@dataclass
class Allocation(ABC):
    """Base of the allocations. A subclass is a dataclass: its fields are what `allocation_kwargs` may name.

    `A_log` always keeps the uniform share: its scores are in other units than those of the linear weights.

    Class attributes:
        summary: one sentence for the docs and the command line.
        source: where the rule comes from.
        spreads: `"weights"`, `"units"` of a structural axis, or both.
    """

    summary: ClassVar[str]
    source: ClassVar[str]
    spreads: ClassVar[tuple[str, ...]] = ("weights",)

    def statistics(self, kind: str, of_method: tuple[str, ...]) -> tuple[str, ...] | None:
        """Statistics that `summarise` reads for a tensor of this kind; `None` where no plan pass is needed.

        Args:
            kind (`str`): kind of tensor.
            of_method (`tuple[str, ...]`): what the method itself needs, for allocations that use its scores.
        """
        return None

    def check(self, items: list[Item], sparsity: float) -> None:
        """Refuse, before anything is calibrated, a budget or parameters that do not fit the targets.

        Raises:
            ConfigurationError: they do not.
        """

    def summarise(self, block: list[Evidence], sparsity: float) -> list[Any]:
        """Reduce the evidence on the targets of one block to one summary each, in the same order.

        Args:
            block (`list[Evidence]`): the targets of one block that `statistics` asked for.
            sparsity (`float`): the budget that `ratios` will be asked for.
        """
        return [None] * len(block)

    @abstractmethod
    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        """Wished share to remove from each item; `counts` brings the shares to the exact budget."""

    def counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        """Entries to remove from each item.

        `A_log` loses round(sparsity · size) entries per tensor, the other weights exactly round(sparsity · Σ size)
        together.
        """
        counts = [round_half_up(sparsity * item.size) for item in items]
        rest = [i for i, item in enumerate(items) if item.kind != "a_log"]
        if rest:
            shared = self.shared_counts([items[i] for i in rest], [summaries[i] for i in rest], sparsity)
            for i, count in zip(rest, shared):
                counts[i] = count
        return counts

    def shared_counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        """Counts of the items that share one budget."""
        sizes = [item.size for item in items]
        return exact_counts(self.ratios(items, summaries, sparsity), sizes, round_half_up(sparsity * sum(sizes)))

    def kept_units(self, energies: list[Tensor], keep: int) -> list[int]:
        """Units of a structural axis that every block keeps, summing to `keep`.

        Args:
            energies (`list[Tensor]`): per block its keep-scores in descending order; with groups, the sums over groups of
                the r-th best score of each.
            keep (`int`): units to keep in all blocks together, at least one for each.

        Raises:
            NotImplementedError: the allocation spreads weights only.
        """
        raise NotImplementedError(f"{type(self).__name__} does not spread units")
