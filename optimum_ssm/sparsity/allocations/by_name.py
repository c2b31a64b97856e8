# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Shares that the user gives, weight by weight or segment by segment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers.utils import logging

from ...errors import ConfigurationError
from ...families.matching import matches
from ...registry import unknown
from ..selection import round_half_up
from . import register_allocation
from .base import Allocation, Item
from .budget import exact_counts


logger = logging.get_logger(__name__)


@register_allocation("by_name")
@dataclass
class ByName(Allocation):
    """Weights that `shares` names lose round(share · size) entries in every block, the others share what is left of the budget.

    So that z, x, B, C and dt of in_proj have each their own share, make them targets and name them:

    ```python
    SSMPrunerConfig(
        method="sparsegpt", sparsity=0.5, targets=["in_proj.*", "out_proj"], allocation="by_name",
        allocation_kwargs={"shares": {"in_proj.z": 0.6, "in_proj.x": 0.5, "in_proj.B": 0.3, "in_proj.dt": 0}},
    )
    ```

    `sparsity` stays the share of all targets together: here in_proj.C and out_proj lose what is missing to one half. Shares
    that cannot meet it are refused, with the sparsity that they can meet. Where `A_log` is named it loses that share,
    otherwise `sparsity`; it has no part in the budget of the others.

    Names are written as in `targets`: short or qualified ones, globs and `re:…`. The nearest entry decides: one that names the
    segment before one that names its weight, an exact name before a pattern, a qualified name before a short one. A pattern
    that fits a weight names the weight, also where it fits its segments. Two patterns as near as each other with different
    shares are refused, and so is an entry that decides nothing.

    Args:
        shares (`dict[str, float]`): share to remove by target name, such as `in_proj.z` or `in_proj.*`; the name of a weight
            stands for all of its segments that have no entry of their own. Left out, all weights lose the same share, with
            a warning.
    """

    summary: ClassVar[str] = "a share of its own for every weight or segment that is named, the rest for the others"
    source: ClassVar[str] = "this library's"

    shares: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not isinstance(name, str) or not number or not 0 <= share <= 1:
                raise ConfigurationError(
                    f"allocation_kwargs shares: {name!r}: {share!r} is no name with a share in [0, 1]"
                )

    def check(self, items: list[Item], sparsity: float) -> None:
        if not self.shares:
            logger.warning(
                "allocation='by_name' without allocation_kwargs shares gives all weights the same share; name some, such as "
                f"shares={{{items[0].name!r}: {sparsity:g}}}, or give allocation='uniform'"
            )
        self.counts(items, [None] * len(items), sparsity)

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        return [count / item.size for count, item in zip(self.counts(items, summaries, sparsity), items)]

    def counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        for name in self.shares:
            if not any(matches(name, names) for item in items for names in _names(item)):
                raise ConfigurationError(_unknown_target(name, items))
        deciding = [self._deciding(item) for item in items]
        for name in self.shares:
            if not any(name in names for names in deciding):
                raise ConfigurationError(
                    f"allocation_kwargs shares: {name!r} decides nothing, all that it matches has a nearer entry; leave "
                    "it out"
                )
        wished = [self.shares[names[0]] if names else None for names in deciding]
        counts = [
            round_half_up((sparsity if share is None else share) * item.size) for share, item in zip(wished, items)
        ]
        common = [i for i, item in enumerate(items) if item.kind != "a_log"]
        others = [i for i in common if wished[i] is None]
        size, free = (sum(items[i].size for i in part) for part in (common, others))
        named = sum(counts[i] for i in common if wished[i] is not None)
        left = round_half_up(sparsity * size) - named
        if not 0 <= left <= free:
            low, high = _share(named, size), _share(named + free, size)
            raise ConfigurationError(
                f"allocation_kwargs shares={self.shares} do not fit sparsity={sparsity}: with them all targets together "
                + (f"lose {low}" if low == high else f"can lose {low} to {high}")
            )
        if others:
            shared = exact_counts([sparsity] * len(others), [items[i].size for i in others], left)
            for i, count in zip(others, shared):
                counts[i] = count
        return counts

    def _deciding(self, item: Item) -> list[str]:
        """The entries of `shares` that decide a target: an exact name, or patterns that say the same.

        Raises:
            ConfigurationError: patterns that say different things.
        """
        own, weight = _names(item)
        of_weight = [name for name in self.shares if matches(name, weight)]
        of_own = [name for name in self.shares if name not in of_weight and matches(name, own)]
        for names, patterns in ((own, of_own), (weight, of_weight)):
            exact = [name for name in names if name in self.shares]
            if exact:
                return exact[:1]
            if len({self.shares[name] for name in patterns}) > 1:
                said = " and ".join(f"{name!r}: {self.shares[name]}" for name in patterns)
                raise ConfigurationError(
                    f"allocation_kwargs shares: {said} all match {own[0]}; give it an entry of its own"
                )
            if patterns:
                return patterns
        return []


def _names(item: Item) -> tuple[list[str], list[str]]:
    """What a share may call a target, and, of a segment, its weight; qualified names first."""
    weight, _, segment = item.name.partition(".")
    return [*item.qualified, item.name], [*item.whole, *([weight] if segment else [])]


def _unknown_target(name: str, items: list[Item]) -> str:
    """The message for a name that matches nothing; that of a segment whose weight is one target needs other targets."""
    known = {item.name for item in items}
    allowed = sorted(known | {short.split(".")[0] for short in known})
    where, more = "target in allocation_kwargs shares", "; also globs, qualified names and 're:…'"
    stem = name.rpartition(".")[0]
    for item in items if stem and not name.startswith("re:") else ():
        if "." not in item.name and matches(stem, _names(item)[0]):
            return (
                f"unknown {where} {name!r}: {item.name} is one target of this pass; if it has segments, "
                f'targets=["{item.name}.*"], beside what else is to be pruned, makes them targets. '
                f"Allowed: {', '.join(allowed)}{more}"
            )
    return unknown(where, name, allowed) + more


def _share(count: int, size: int) -> float:
    """The shortest decimal number p with round(p · size) = count."""
    candidates = (float(f"{count / size:.{digits}g}") for digits in range(1, 18))
    return next(p for p in candidates if round_half_up(p * size) == count)
