# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Minimise the summed measured error: weights that can be rebuilt from their neighbours lose more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigurationError
from ...methods import METHODS
from ...methods.base import output_error
from ..selection import Selection, round_half_up
from . import register_allocation
from .base import Allocation, Evidence, Item
from .budget import exact_counts


@register_allocation("error")
@dataclass
class Error(Allocation):
    """Error curves from a solver, then greedy steps of least error per removed weight until the budget is met.

    For every weight the relative squared output error E(r) = tr((W-W_r) Q (W-W_r)ᵀ) / tr(W Q Wᵀ) is measured with
    `solver` at `points` ratios between sparsity - `spread` and sparsity + `spread`, on dense activations. Curves are made
    convex, so that greedy steps minimise Σ E over all weights on the grid. The count is exact: the last step is taken in
    part. Small weights whose error is as large as that of big ones (x_proj, dt_proj) keep more, at little cost.

    Args:
        solver (`str`): method that makes the curves; it must prune by a Gram matrix or less.
        spread (`float`): largest deviation of a ratio from the sparsity.
        points (`int`): points on a curve, at least 2.
    """

    summary: ClassVar[str] = "least summed relative output error, measured with a solver on a grid of ratios"
    source: ClassVar[str] = "this library's; marginal-error greedy as in classic optimal bit allocation"

    solver: str = "sparsegpt"
    spread: float = 0.25
    points: int = 9

    def __post_init__(self) -> None:
        if not 0 < self.spread < 1 or self.points < 2:
            raise ConfigurationError(
                f"error needs spread in (0, 1) and points >= 2, got {self.spread} and {self.points}"
            )
        self._solver = METHODS.build(self.solver, {}, "allocation_kwargs solver")

    def statistics(self, kind: str, of_method: tuple[str, ...]) -> tuple[str, ...] | None:
        gram = {"linear": "gram", "conv": "conv_gram"}.get(kind)
        return tuple(dict.fromkeys((gram, *self._solver.statistics(kind)))) if gram is not None else None

    def summarise(self, block: list[Evidence], sparsity: float) -> list[Any]:
        low, high = max(0.0, sparsity - self.spread), min(1.0, sparsity + self.spread)
        grid = [low + (high - low) * i / (self.points - 1) for i in range(self.points)]
        return [self._curve(evidence, grid) for evidence in block]

    def _curve(self, evidence: Evidence, grid: list[float]) -> list[tuple[int, float]]:
        """(removed entries, relative error) on the grid of ratios, made convex."""
        weight, kind = evidence.weight, evidence.item.kind
        curve = []
        for ratio in grid:
            count = round_half_up(ratio * weight.numel())
            selection = Selection(count, self._solver.default_scope)
            pruned, mask = self._solver.prune(weight, evidence.statistics, kind, selection)
            curve.append((count, float(output_error(weight, pruned.masked_fill(mask, 0), evidence.statistics))))
        return _convex(curve)

    def ratios(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[float]:
        counts = self.shared_counts(items, summaries, sparsity)
        return [count / item.size for count, item in zip(counts, items)]

    def shared_counts(self, items: list[Item], summaries: list[Any], sparsity: float) -> list[int]:
        counts = [curve[0][0] for curve in summaries]
        total = round_half_up(sparsity * sum(item.size for item in items))
        steps = [
            ((error - before) / (count - start), i, count - start)
            for i, curve in enumerate(summaries)
            for (start, before), (count, error) in zip(curve, curve[1:])
        ]
        for _, i, size in sorted(steps):  # convex curves: a weight's own steps come in their order
            taken = min(size, total - sum(counts))
            counts[i] += max(0, taken)
        # Rounding at the ends of the grid can leave the budget out of its reach, by an entry a weight at most.
        return exact_counts([count / item.size for count, item in zip(counts, items)], [i.size for i in items], total)


def _convex(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of a curve, which keeps its ends."""
    hull: list[tuple[int, float]] = []
    for point in curve:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (point[0] - x1) < (point[1] - y1) * (x1 - x0):
                break
            hull.pop()
        if not hull or point[0] > hull[-1][0]:
            hull.append(point)
    return hull
