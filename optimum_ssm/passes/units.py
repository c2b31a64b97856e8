# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Removal of whole units, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.gradients import GRADIENT_STATISTICS
from ..calibration.sites import Need
from ..errors import CalibrationError
from ..families.axes import Owned
from ..families.base import Site
from ..methods.structures.base import SCAN, Units
from ..sparsity.allocations.units import rank_energies, removed_units, round_sizes, total_size, uniform_size
from ..surgery import norm
from ..surgery.cut import cut
from .outcome import UnitOutcome
from .unit_plan import UnitPlan, UnitTask
from .work import Place, Values, Work


logger = logging.get_logger(__name__)


class UnitWork(Work[UnitTask]):
    """What `plan` does to the blocks of `model`.

    Args:
        model (`nn.Module`): cut in place; its config is settled by the caller at the end.
        plan (`UnitPlan`): from `make_unit_plan`.
        removed (`Mapping[str, Tensor]`): parameter name to bool mask of what earlier passes removed.
        gradients (`Mapping[str, Mapping[str, Tensor]]`): parameter name to statistics of the loss gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: UnitPlan,
        removed: Mapping[str, Tensor],
        gradients: Mapping[str, Mapping[str, Tensor]],
    ):
        self.model, self.plan, self.removed, self.gradients = model, plan, removed, gradients
        self.tasks = {task.block: [task] for task in plan.tasks}
        self._keep: dict[UnitTask, int] = {}

    def label(self, task: UnitTask) -> str:
        return task.label

    def decided(self) -> dict[str, Any]:
        return {task.label: kept for task, kept in self._keep.items()}

    def resume(self, decided: dict[str, Any]) -> None:
        self._keep = {task: decided[task.label] for task in self.plan.tasks}

    def needs(self, task: UnitTask) -> dict[str, Need]:
        parts = {part.name: part for part in (*task.axis.owned, *task.axis.read)}
        scan = Site(self.plan.family.mixer_name, "scan")
        found = {}
        for part, statistic in task.needs:
            if part == SCAN:
                found[f"{part} {statistic}"] = Need(scan, statistic)
            elif statistic not in GRADIENT_STATISTICS:
                found[f"{part} {statistic}"] = Need(parts[part].site, statistic)
        return found

    def planning_needs(self, task: UnitTask) -> dict[str, Need] | None:
        return None if self.plan.uniform else self.needs(task)

    def summarise(self, place: Place, values: dict[UnitTask, Values]) -> dict[UnitTask, Any]:
        return {
            task: rank_energies(self._scores(place, task, found, 0), task.axis.groups)
            for task, found in values.items()
        }

    def decide(self, summaries: dict[UnitTask, Any]) -> None:
        plan, tasks = self.plan, self.plan.tasks
        share, sizes = plan.config.sparsity, [task.axis.group_size for task in tasks]
        if plan.uniform:
            kept = [uniform_size(size, share, plan.multiple) if share else size for size in sizes]
        else:
            keep = total_size(sizes, share, plan.multiple)
            kept = round_sizes(plan.allocation.kept_units([summaries[t] for t in tasks], keep), sizes, plan.multiple)
        self._keep = dict(zip(tasks, kept))
        reached = 1 - sum(kept) / sum(sizes)
        if abs(reached - share) > 0.5 / min(sizes):
            logger.warning(
                f"axis {plan.axis!r}: {reached:.2%} of the units go, not {share:.2%}: kept units come in multiples of "
                f"{plan.multiple}; multiple_of=1 is exact"
            )

    def apply(self, place: Place, task: UnitTask, values: Values) -> UnitOutcome:
        axis, config = task.axis, self.plan.config
        remove = (axis.group_size - self._keep[task]) * axis.groups
        scores = self._scores(place, task, values, remove)
        removed = removed_units(scores, axis.groups, self._keep[task])
        if not remove:
            return UnitOutcome(axis.name, task.block, axis.units, [])
        energy = axis.norm is not None and config.norm_rescale == "energy"
        before = self._root_mean_square(place, axis.norm) if energy else None
        channels = place.block.get_parameter(axis.norm).numel() if axis.norm else 0
        kept = cut(self.plan.family, place.block, axis, removed)
        if axis.norm and config.norm_rescale == "mask":
            left = place.block.get_parameter(axis.norm).numel()
            norm.rescale(place.block, axis.norm, norm.mask_factor(channels, left))
        elif energy:
            after = self._root_mean_square(place, axis.norm)
            norm.rescale(place.block, axis.norm, torch.where(before > 0, after / before, 1.0))
        outcome = UnitOutcome(axis.name, task.block, axis.units, removed.nonzero().flatten().tolist(), kept)
        if config.compensation is not None:
            output = self.plan.family.output
            gone = outcome.sliced(f"{output}.weight", self.removed.get(f"{task.name}.{output}.weight"))
            place.compensate(config.compensation, output, gone)
        return outcome

    def _scores(self, place: Place, task: UnitTask, values: Values, remove: int) -> Tensor:
        axis = task.axis
        owned = {part.name: part for part in (*axis.owned, *axis.read)}
        parts = {name: _gather(place.read(part.parameter), part) for name, part in owned.items()}
        statistics: dict[tuple[str, str], Tensor] = {}
        for part, statistic in task.needs:
            if statistic in GRADIENT_STATISTICS:
                gradient = self.gradients[f"{task.name}.{owned[part].parameter}"][statistic]
                statistics[part, statistic] = _gather(gradient, owned[part])
            elif part == SCAN:
                statistics[part, statistic] = values[f"{part} {statistic}"]
            else:
                start = owned[part].site.columns[0] if owned[part].site.columns else 0
                value = values[f"{part} {statistic}"]
                index = (owned[part].index - start).to(value.device)
                statistics[part, statistic] = value[..., index]
        kinds = {part.name: part.kind for part in axis.owned}
        units = Units(axis.name, axis.units, axis.groups, remove, parts, kinds, statistics)
        scores = self.plan.method.scores(units)
        if scores.shape != (axis.units,):
            raise ValueError(f"{type(self.plan.method).__name__} gave scores of shape {tuple(scores.shape)}")
        if not scores.isfinite().all():
            raise CalibrationError(f"{task.label}: scores are not finite")
        return scores

    def _root_mean_square(self, place: Place, path: str) -> Tensor:
        """Mean over tokens of the norm's root mean square, of each of its groups, float64."""
        module = place.block.get_submodule(path.rpartition(".")[0])
        watched = norm.RootMeanSquare(module, norm.norm_groups(module))
        try:
            for x in place.stream.hidden:
                place.stream.forward(place.block)(x)
        finally:
            total, tokens = watched.close()
        return place.ranks.sum_(total) / max(1, *place.ranks.sums(tokens))


def _gather(tensor: Tensor, part: Owned) -> Tensor:
    """(units, width, rest): what every unit owns of a tensor."""
    index = part.index.to(tensor.device)
    rows = tensor.index_select(part.dim, index.flatten()).movedim(part.dim, 0)
    return rows.reshape(*index.shape, -1)
