# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Pruning of single weights, target by target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.gradients import GRADIENT_STATISTICS
from ..calibration.sites import Need
from ..errors import CalibrationError
from ..families.matching import Target
from ..methods.base import output_error
from ..sparsity.allocations.base import Evidence
from .outcome import Outcome
from .plan import Plan, Task
from .work import Place, Values, Work


logger = logging.get_logger(__name__)


class WeightWork(Work[Task]):
    """What `plan` does to the weights of `model`.

    Args:
        model (`nn.Module`): pruned in place.
        plan (`Plan`): from `make_plan`.
        removed (`Mapping[str, Tensor]`): parameter name to bool mask of what earlier passes removed. It stays removed,
            also where the method updates weights.
        gradients (`Mapping[str, Mapping[str, Tensor]]`): parameter name to statistics of the loss gradient.
    """

    independent = True

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        removed: Mapping[str, Tensor],
        gradients: Mapping[str, Mapping[str, Tensor]],
    ):
        self.model, self.plan, self.removed, self.gradients = model, plan, removed, gradients
        self.tasks: dict[int, list[Task]] = {}
        for task in plan.tasks:
            self.tasks.setdefault(task.target.block, []).append(task)
        self._counts: dict[Target, int] = {}
        self._finite: dict[str, Tensor] = {}  # of every task that is done and not settled: whether its result was

    def label(self, task: Task) -> str:
        return task.target.label

    def decided(self) -> dict[str, Any]:
        return {target.label: count for target, count in self._counts.items()}

    def resume(self, decided: dict[str, Any]) -> None:
        self._counts = {task.target: decided[task.target.label] for task in self.plan.tasks}

    def entries(self, task: Task) -> Tensor:
        return self.model.get_parameter(task.target.parameter)[task.target.rows]

    def cost(self, task: Task, values: Values) -> float:
        grams = [value for name, value in values.items() if name.endswith("gram")]  # updates and an inverse
        return task.size + sum(task.size * gram.shape[-1] + gram.numel() * gram.shape[-1] for gram in grams)

    def needs(self, task: Task) -> dict[str, Need]:
        return self._local(task, task.statistics)

    def planning_needs(self, task: Task) -> dict[str, Need] | None:
        names = self.plan.planning_statistics(task)
        return None if names is None else self._local(task, names)

    def _local(self, task: Task, names: tuple[str, ...]) -> dict[str, Need]:
        parameter = self.model.get_parameter(task.target.parameter)
        site = task.target.weight.site
        return {
            name: Need(site, name, parameter.shape[-1] if name == "conv_gram" else 0)
            for name in names
            if name not in GRADIENT_STATISTICS
        }

    def summarise(self, place: Place, values: dict[Task, Values]) -> dict[Task, Any]:
        self.check(list(values))
        evidence = [self._evidence(task, found) for task, found in values.items()]
        return dict(zip(values, self.plan.allocation.summarise(evidence, self.plan.config.sparsity)))

    def decide(self, summaries: dict[Task, Any]) -> None:
        plan = self.plan
        items = [task.item for task in plan.tasks]
        facts = [summaries.get(task) for task in plan.tasks]
        counts = plan.allocation.counts(items, facts, plan.config.sparsity)
        for task, count in zip(plan.tasks, counts):
            if count == task.size and plan.config.sparsity > 0:
                logger.warning(f"{task.target.label} loses all of its {count} entries")
            self._counts[task.target] = count

    def check(self, tasks: Sequence[Task]) -> None:
        finite = {task.target.label: self.entries(task).isfinite().all() for task in tasks}
        if label := _first_false(finite):
            raise CalibrationError(f"{label}: the weight holds non-finite values")

    def settle(self) -> None:
        finite, self._finite = self._finite, {}
        if label := _first_false(finite):
            raise CalibrationError(f"{label}: pruning left the finite numbers; load the model in a wider dtype")

    def apply(self, place: Place, task: Task, values: Values) -> Outcome:
        target, kind = task.target, task.target.weight.kind
        values = self._of_rows(task, values)
        before = self._read(target)
        try:
            selection = self.plan.selection(self._counts[target])
            after, mask = self.plan.method.prune(before, values, kind, selection)
        except ValueError as error:
            raise CalibrationError(f"{target.label}: {error}") from error
        parameter = self.model.get_parameter(target.parameter)
        if target.parameter in self.removed:
            earlier = self.removed[target.parameter][target.rows].to(mask.device).reshape(mask.shape)
            after = torch.where(earlier, before, after)  # a method may have moved errors into an entry that is gone
        after = after.to(parameter.dtype).masked_fill(mask, self.plan.fill(kind))
        self._finite[target.label] = finite = after.isfinite().all()  # as stored: a narrower dtype may not hold it
        shape = parameter[target.rows].shape
        parameter[target.rows] = torch.where(finite, after.reshape(shape), parameter[target.rows])
        return Outcome(target, mask.reshape(shape), output_error(before, after.float(), values))

    def _evidence(self, task: Task, values: Values) -> Evidence:
        weight, values = self._read(task.target), self._of_rows(task, values)
        kind, selection = task.target.weight.kind, self.plan.selection(0)
        return Evidence(task.item, weight, values, lambda: self.plan.method.score(weight, values, kind, selection))

    def _of_rows(self, task: Task, values: Values) -> Values:
        """The statistics of a task's own rows, in the shapes that methods see."""
        target = task.target
        if target.weight.kind == "conv":  # one Gram matrix per channel; other weights share theirs between rows
            values = {name: value[target.rows] for name, value in values.items()}
        shared = self.gradients.get(target.parameter, {})
        return {**values, **{name: _as_seen(value[target.rows], target) for name, value in shared.items()}}

    def _read(self, target: Target) -> Tensor:
        """A copy of the target's entries in float32, as methods see them."""
        weight = self.model.get_parameter(target.parameter).detach()[target.rows].to(torch.float32, copy=True)
        return _as_seen(weight, target)


def _first_false(flags: Mapping[str, Tensor]) -> str | None:
    """The first name whose flag, a bool of no dimensions, is not set. They are read at once."""
    if not flags or (found := torch.stack(list(flags.values()))).all():
        return None
    return list(flags)[found.tolist().index(False)]


def _as_seen(tensor: Tensor, target: Target) -> Tensor:
    """A convolution without its middle axis of one, as methods see it; anything else as it is."""
    return tensor.squeeze(1) if target.weight.kind == "conv" else tensor
