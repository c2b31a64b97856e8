# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What one structured pass will do to every block, decided and checked before any of them is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.gradients import GRADIENT_STATISTICS
from ..calibration.seam import AVAILABLE_SUMS
from ..configuration import SSMPrunerConfig
from ..errors import ConfigurationError
from ..families.axes import Axis
from ..families.base import Family
from ..methods.structures import STRUCTURES
from ..methods.structures.base import SCAN, StructuredMethod
from ..sparsity.allocations import ALLOCATIONS
from ..sparsity.allocations.base import Allocation
from ..sparsity.allocations.units import total_size, uniform_size
from ..surgery.merge import check_groups, merged_sizes
from ..surgery.settle import stock_fields
from .drop_plan import BLOCK, DropPlan, make_drop_plan
from .reconstruction import Reconstruction


if TYPE_CHECKING:
    from .work import Work

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class UnitTask:
    """The units of one axis in one block.

    Args:
        block (`int`): index of the block.
        name (`str`): its qualified name.
        axis (`Axis`): the family's declaration.
        needs (`tuple[tuple[str, str], ...]`): (part, statistic) pairs that the method reads.
    """

    block: int
    name: str
    axis: Axis = dataclasses.field(compare=False)
    needs: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """Name for messages."""
        return f"{self.name}, axis {self.axis.name}"


@dataclass
class UnitPlan:
    """A checked structured pass.

    Args:
        config (`SSMPrunerConfig`): the pass.
        family (`Family`): the model's description.
        method (`StructuredMethod`), allocation (`Allocation`): built from the config.
        axis (`str`): which units go.
        multiple (`int`): what the kept units of a group are a multiple of.
        tasks (`list[UnitTask]`): one per block, in model order.
        reconstruction (`Reconstruction`): how blocks are tuned after pruning; 0 epochs: not at all.
    """

    config: SSMPrunerConfig
    family: Family
    method: StructuredMethod
    allocation: Allocation
    axis: str
    multiple: int
    tasks: list[UnitTask]
    reconstruction: Reconstruction

    @property
    def uniform(self) -> bool:
        """Whether every block keeps the same number of units."""
        return self.config.uniform_sizes

    @property
    def needs_text(self) -> bool:
        """Whether any calibration text is needed at all."""
        rescales = self.config.norm_rescale == "energy" and any(task.axis.norm for task in self.tasks)
        asks = self.config.compensation is not None or rescales
        return bool(self.reconstruction.epochs or asks or any(task.needs for task in self.tasks))

    @property
    def gradient_parameters(self) -> dict[str, tuple[str, ...]]:
        """Parameters of which the method needs statistics of the loss gradient, with their names."""
        wanted: dict[str, tuple[str, ...]] = {}
        for task in self.tasks:
            owned = {part.name: part for part in task.axis.owned}
            for part, statistic in task.needs:
                if statistic in GRADIENT_STATISTICS:
                    name = f"{task.name}.{owned[part].parameter}"
                    wanted[name] = tuple(dict.fromkeys((*wanted.get(name, ()), statistic)))
        return wanted

    def work(
        self, model: nn.Module, removed: Mapping[str, Tensor], gradients: Mapping[str, Mapping[str, Tensor]]
    ) -> Work:
        """What this plan does block by block."""
        from .merging import MergeWork
        from .units import UnitWork

        if self.method.merges:
            return MergeWork(model, self, removed)
        return UnitWork(model, self, removed, gradients)


def make_unit_plan(model: nn.Module, family: Family, config: SSMPrunerConfig) -> UnitPlan | DropPlan:
    """Check a structured config against a model.

    Raises:
        ConfigurationError: the family has no such axis, a statistic does not exist for it, no unit could go, or groups
            cannot be merged to so many.
    """
    method = STRUCTURES.build(config.method, config.method_kwargs, "method_kwargs", seed=config.seed)
    blocks = [
        (i, name, block) for i, (name, block) in enumerate(family.blocks(model)) if family.mixer(block) is not None
    ]
    axes = [family.axes(block) for _, _, block in blocks]
    axis = config.axis or next((name for name in method.axes if name in axes[0]), method.axes[0])
    if axis == BLOCK:
        return make_drop_plan(model, family, config, method)
    if axis not in axes[0]:
        raise ConfigurationError(
            f"{type(family).__name__} has no axis {axis!r}; it has: {', '.join(axes[0])}. Method {config.method!r} scores: "
            f"{', '.join(method.axes)}"
        )
    tasks = [
        _task(i, name, of_block[axis], method, config.method, family) for (i, name, _), of_block in zip(blocks, axes)
    ]
    multiple = config.multiple_of or max(task.axis.multiple for task in tasks)
    if method.merges and not config.uniform_sizes:
        raise ConfigurationError(
            f"uniform_sizes=False compares blocks by scores, and method {config.method!r} has none. Allowed: True"
        )
    if config.sparsity and not config.uniform_sizes:
        total_size([task.axis.group_size for task in tasks], config.sparsity, multiple)
    for task in tasks if config.sparsity and config.uniform_sizes else ():
        heads = family.sizes(blocks[0][2])["num_heads"] if method.merges else 0
        if method.merges:
            check_groups(task.axis.units, task.axis.units, heads)
        kept = uniform_size(task.axis.group_size, config.sparsity, multiple)  # names the multiple that is in the way
        if method.merges:
            check_groups(task.axis.units, kept, heads)
    name = config.allocation or ("uniform" if config.uniform_sizes else method.default_allocation)
    allocation = ALLOCATIONS.build(name, config.allocation_kwargs, "allocation_kwargs")
    plan = UnitPlan(
        config,
        family,
        method,
        allocation,
        axis,
        multiple,
        tasks,
        Reconstruction.planned(config, 0),
    )
    _say_what_changes_nothing(plan)
    _say_what_loads(plan, model, [block for _, _, block in blocks])
    return plan


def _task(index: int, name: str, axis: Axis, method: StructuredMethod, method_name: str, family: Family) -> UnitTask:
    needs = method.needs(axis.name, {part.name: part.kind for part in axis.owned})
    known = {part.name for part in (*axis.owned, *axis.read)}
    for part, statistic in needs:
        if part == SCAN and statistic not in AVAILABLE_SUMS[family.recurrence]:
            raise ConfigurationError(
                f"method {method_name!r} needs {statistic!r}, which the {family.recurrence} recurrence does not give; it "
                f"gives: {', '.join(AVAILABLE_SUMS[family.recurrence])}"
            )
        if part != SCAN and part not in known:
            raise ConfigurationError(
                f"method {method_name!r} needs {part!r}, which axis {axis.name!r} does not have; it has: "
                f"{', '.join(sorted(known))}"
            )
    return UnitTask(index, name, axis, needs)


def _say_what_changes_nothing(plan: UnitPlan) -> None:
    config, sizes = plan.config, {(task.axis.groups, task.axis.group_size) for task in plan.tasks}
    if config.norm_rescale != "mask" and not any(task.axis.norm for task in plan.tasks):
        logger.warning(
            f"norm_rescale={config.norm_rescale!r} changes nothing: no norm averages over what goes with axis {plan.axis!r}"
        )
    if plan.uniform and len(sizes) > 1:
        logger.warning(
            f"axis {plan.axis!r} differs in size between blocks already: each of them loses the same share, and "
            "uniform_sizes=True does not make them alike"
        )


def _say_what_loads(plan: UnitPlan, model: nn.Module, blocks: list[nn.Module]) -> None:
    """A result that stock classes cannot load is announced before the work starts."""
    if not plan.config.sparsity:
        return
    if not plan.uniform:
        logger.warning(
            "if its blocks come out in different sizes, the pruned model will load after `import optimum_ssm` only, not with "
            "stock transformers. It can also be saved with its own modelling code, see save_pretrained(remote_code=True)"
        )
        return
    sizes = []
    for task, block in zip(plan.tasks, blocks):
        axis = task.axis
        kept = uniform_size(axis.group_size, plan.config.sparsity, plan.multiple) * axis.groups
        before = plan.family.sizes(block)
        merges = plan.method.merges
        sizes.append(merged_sizes(before, kept) if merges else plan.family.sizes_after(before, axis, kept))
    if stock_fields(model, plan.family, sizes) is not None:
        return
    logger.warning(
        f"the pruned model will load after `import optimum_ssm` only, not with stock transformers: its class "
        f"cannot build blocks of {sizes[0]}. It can also be saved with its own modelling code, see "
        "save_pretrained(remote_code=True)"
    )
