# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Shares that the user gives, weight by weight or segment by segment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import ConfigurationError
from ...registry import unknown
from ..selection import round_half_up
from . import register_allocation
from .base import Allocation, Item
from .budget import exact_counts


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

    Args:
        shares (`dict[str, float]`): share to remove by target name, such as `in_proj.z`; the name of a weight stands for
            all of its segments that have no entry of their own.
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
        self.counts(items, [None] * len(items), sparsity)

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        return [count / item.size for count, item in zip(self.counts(items, summaries, sparsity), items)]

    def counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        known = {item.name for item in items}
        allowed = sorted(known | {name.split(".")[0] for name in known})
        for name in self.shares:
            if name not in allowed:
                raise ConfigurationError(unknown("target in allocation_kwargs shares", name, allowed))
        wished = [self.shares.get(item.name, self.shares.get(item.name.split(".")[0])) for item in items]
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


def _share(count: int, size: int) -> float:
    """The shortest decimal number p with round(p · size) = count."""
    candidates = (float(f"{count / size:.{digits}g}") for digits in range(1, 18))
    return next(p for p in candidates if round_half_up(p * size) == count)
