# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What one pass will do to every weight, decided and checked before any of them is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.gradients import GRADIENT_STATISTICS
from ..calibration.offload import check_offload
from ..calibration.seam import AVAILABLE_SUMS
from ..configuration import SSMPrunerConfig
from ..errors import ConfigurationError
from ..families.base import Family
from ..families.matching import Target, declared_targets, select_targets
from ..methods import METHODS
from ..methods.base import WeightMethod
from ..sparsity.allocations import ALLOCATIONS
from ..sparsity.allocations.base import Allocation, Item
from ..sparsity.pattern import Pattern
from ..sparsity.selection import Selection
from .reconstruction import Reconstruction
from .unit_plan import UnitPlan, make_unit_plan


if TYPE_CHECKING:
    from .weights import WeightWork

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Task:
    """One target with what is known of it before calibration.

    Args:
        target (`Target`): the weight or row segment.
        size (`int`): entries in it.
        statistics (`tuple[str, ...]`): what the method needs to know of its input.
    """

    target: Target
    size: int
    statistics: tuple[str, ...]

    @property
    def item(self) -> Item:
        """The target as an allocation sees it."""
        target, kind = self.target, self.target.weight.kind
        if target.segment is None:
            return Item(target.name, target.block, self.size, kind, target.spellings[1:])
        whole = dataclasses.replace(target, segment=None)
        return Item(target.name, target.block, self.size, kind, (target.label,), whole.spellings[1:])


@dataclass
class Plan:
    """A checked pass: method, allocation, and the targets that it prunes.

    Args:
        config (`SSMPrunerConfig`): the pass.
        method (`WeightMethod`), allocation (`Allocation`): built from the config.
        pattern (`Pattern`): unstructured or N:M.
        scope (`str`): `"row"` or `"tensor"`.
        tasks (`list[Task]`): what will be pruned, in model order.
        unfit (`dict[str, str]`): labels of selected targets that the pattern does not fit, with the reason.
        reconstruction (`Reconstruction`): how blocks are tuned after pruning; 0 epochs: not at all.
    """

    config: SSMPrunerConfig
    method: WeightMethod
    allocation: Allocation
    pattern: Pattern
    scope: str
    tasks: list[Task]
    unfit: dict[str, str]
    reconstruction: Reconstruction

    def planning_statistics(self, task: Task) -> tuple[str, ...] | None:
        """Statistics that the allocation needs of a task before execution; `None` for none."""
        return self.allocation.statistics(task.target.weight.kind, task.statistics)

    @property
    def needs_planning(self) -> bool:
        """Whether a dense pass must come before the execution."""
        return any(self.planning_statistics(task) is not None for task in self.tasks)

    @property
    def needs_text(self) -> bool:
        """Whether any calibration text is needed at all."""
        return self.reconstruction.epochs > 0 or any(
            task.statistics or self.planning_statistics(task) for task in self.tasks
        )

    @property
    def gradient_parameters(self) -> dict[str, tuple[str, ...]]:
        """Parameters of which the method or the allocation needs statistics of the loss gradient, with their names."""
        wanted: dict[str, tuple[str, ...]] = {}
        for task in self.tasks:
            names = (*task.statistics, *(self.planning_statistics(task) or ()))
            if found := tuple(name for name in GRADIENT_STATISTICS if name in names):
                wanted[task.target.parameter] = found
        return wanted

    def work(
        self, model: nn.Module, removed: Mapping[str, Tensor], gradients: Mapping[str, Mapping[str, Tensor]]
    ) -> WeightWork:
        """What this plan does block by block. Arguments as in `WeightWork`."""
        from .weights import WeightWork

        return WeightWork(model, self, removed, gradients)

    def fill(self, kind: str) -> float:
        """The value that a removed entry holds."""
        memoryless = kind == "a_log" and self.config.a_log_fill == "memoryless"
        return self.config.memoryless_value if memoryless else 0.0

    def selection(self, count: int) -> Selection:
        """The selection that removes `count` entries of a tensor under this plan."""
        return Selection(count, self.scope, self.pattern)


def make_plan(model: nn.Module, family: Family, config: SSMPrunerConfig) -> Plan | UnitPlan:
    """Check a config against a model.

    Raises:
        ConfigurationError: a target matches nothing, the method cannot prune a selected weight, a statistic does not
            exist for this family, or the pattern fits none of the targets.
    """
    if config.structured:
        units = make_unit_plan(model, family, config)
        check_offload(model, units)
        return units
    method = METHODS.build(config.method, config.method_kwargs, "method_kwargs", seed=config.seed)
    pattern = Pattern.parse(config.pattern)
    method.check(pattern, config.scope)
    scope = "row" if pattern.is_n_m else config.scope or method.default_scope
    name = config.allocation or ("uniform" if pattern.is_n_m else method.default_allocation)
    if scope == "global":
        name, scope = "global", "tensor"
    allocation = ALLOCATIONS.build(name, config.allocation_kwargs, "allocation_kwargs")
    reconstruction = Reconstruction.planned(config, method.default_reconstruction_epochs)
    plan = Plan(config, method, allocation, pattern, scope, [], {}, reconstruction)
    chosen = select_targets(declared_targets(family, model), config.targets, config.exclude, method.default_targets)
    for target in chosen:
        _add(plan, target, model, family)
    if not plan.tasks:
        raise ConfigurationError(
            f"pattern {config.pattern!r} fits none of the targets: {next(iter(plan.unfit.values()))}"
        )
    allocation.check([task.item for task in plan.tasks], config.sparsity)
    check_offload(model, plan)
    _warn_about_a_log(plan)
    return plan


def _add(plan: Plan, target: Target, model: nn.Module, family: Family) -> None:
    kind, method = target.weight.kind, plan.config.method
    if kind not in plan.method.kinds:
        raise ConfigurationError(
            f"method {method!r} cannot prune {target.name} (a weight of kind {kind!r}); it prunes: "
            f"{', '.join(plan.method.kinds)}. Name other targets or exclude {target.name}"
        )
    statistics = plan.method.statistics(kind)
    for name in statistics if target.weight.site.end == "scan" else ():
        if name in GRADIENT_STATISTICS:
            continue
        if name not in AVAILABLE_SUMS[family.recurrence]:
            raise ConfigurationError(
                f"method {method!r} with method_kwargs={plan.config.method_kwargs} needs {name!r}, which the "
                f"{family.recurrence} recurrence does not give; it gives: {', '.join(AVAILABLE_SUMS[family.recurrence])}"
            )
    parameter = model.get_parameter(target.parameter)
    shape = parameter[target.rows].squeeze(1).shape if kind == "conv" else parameter[target.rows].shape
    if plan.pattern.is_n_m and (len(shape) != 2 or not plan.pattern.fits(shape[1])):
        plan.unfit[target.label] = (
            f"rows of {shape[1]} weights do not split into groups of {plan.pattern.group}"
            if len(shape) == 2
            else f"one number per head has no groups of {plan.pattern.group}"
        )
        return
    plan.tasks.append(Task(target, shape.numel(), statistics))


def _warn_about_a_log(plan: Plan) -> None:
    if not any(task.target.weight.kind == "a_log" for task in plan.tasks):
        for field in dataclasses.fields(plan.config):
            if field.name in ("a_log_fill", "memoryless_value") and getattr(plan.config, field.name) != field.default:
                value = getattr(plan.config, field.name)
                logger.warning(f"{field.name}={value!r} changes nothing: A_log is not among the targets")
        return
    fill = plan.method.fill("a_log")
    if fill not in (None, plan.config.a_log_fill):
        logger.warning(
            f"the scores of {plan.config.method!r} for A_log estimate the damage of a_log_fill={fill!r}, but the config "
            f"says {plan.config.a_log_fill!r}: expect a worse model"
        )
    if plan.config.scope == "global":
        logger.warning("scope='global' leaves A_log its uniform share: its scores are in other units than the others'")
    if plan.pattern.is_n_m:
        logger.warning(f"{plan.config.pattern} on A_log speeds up no kernel: A_log is not a matrix of a product")
