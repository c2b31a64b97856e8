# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Merging of groups, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.sites import Need
from ..methods.structures.base import Units
from ..sparsity.allocations.units import uniform_size
from ..surgery.merge import merge, merged_parts
from .outcome import MergeOutcome, UnitOutcome
from .unit_plan import UnitPlan, UnitTask
from .work import Place, Values, Work


logger = logging.get_logger(__name__)


class MergeWork(Work[UnitTask]):
    """What a plan of a merging method does to the blocks of `model`.

    Args:
        model (`nn.Module`): changed in place; its config is settled by the caller at the end.
        plan (`UnitPlan`): from `make_unit_plan`.
        removed (`Mapping[str, Tensor]`): parameter name to bool mask of what earlier passes removed.
    """

    def __init__(self, model: nn.Module, plan: UnitPlan, removed: Mapping[str, Tensor]):
        self.model, self.plan, self.removed = model, plan, removed
        self.tasks = {task.block: [task] for task in plan.tasks}

    def label(self, task: UnitTask) -> str:
        return task.label

    def decided(self) -> dict[str, Any]:
        return {}

    def resume(self, decided: dict[str, Any]) -> None:
        pass  # sizes are fixed by the plan

    def needs(self, task: UnitTask) -> dict[str, Need]:
        return {}

    def decide(self, summaries: dict[UnitTask, Any]) -> None:
        """Sizes are fixed by the plan; entries that come back are announced."""
        merged = {f"{task.name}.{part.parameter}" for task in self.plan.tasks for part in merged_parts(task.axis)}
        if self.plan.config.sparsity and any(name in self.removed for name in merged):
            logger.warning(
                "earlier passes removed entries of weights that are merged now: where groups differ in what is gone, the "
                "entry is back, and N:M patterns are lost"
            )

    def apply(self, place: Place, task: UnitTask, values: Values) -> UnitOutcome:
        axis, config = task.axis, self.plan.config
        kept = merged_groups(self.plan, task)
        if kept == axis.units:
            return UnitOutcome(axis.name, task.block, axis.units, [])
        parts = {}
        for part in axis.owned:
            weight = place.read(part.parameter)
            if part in merged_parts(axis):
                parts[part.name] = weight[part.index.to(weight.device)].reshape(*part.index.shape, -1)
        kinds = {part.name: part.kind for part in merged_parts(axis)}
        units = Units(axis.name, axis.units, axis.groups, axis.units - kept, parts, kinds, {})
        method = self.plan.method
        merged = merge(self.plan.family, place.block, axis, kept, method.scores(units), method.order(units))
        if config.compensation is not None:
            output = self.plan.family.output
            gone = self.removed.get(f"{task.name}.{output}.weight")  # not a part of B and C: its shape is what it was
            place.compensate(config.compensation, output, gone)
        run = axis.units // kept
        removed = [group for group in range(axis.units) if group % run]
        return MergeOutcome(axis.name, task.block, axis.units, removed, merged.kept, merged)


def merged_groups(plan: UnitPlan, task: UnitTask) -> int:
    """G': groups that are left of a block."""
    share = plan.config.sparsity
    return uniform_size(task.axis.units, share, plan.multiple) if share else task.axis.units
