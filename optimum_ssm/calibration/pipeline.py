# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The block loop: collect -> prune -> replay. With its neighbours here, the only code that touches devices and hooks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor, nn

from ..errors import CalibrationError
from ..families.base import Family
from ..families.matching import Target
from ..methods.base import output_error
from ..sparsity.allocations.base import Evidence
from .activations import Activations, inference_state
from .plan import Plan, Task
from .seam import ScanSeam, replaced_scan
from .sites import BlockStatistics


@dataclass(frozen=True)
class Outcome:
    """What happened to one target.

    Args:
        target (`Target`): the weight or row segment.
        mask (`Tensor`): bool, (rows, …) of the target as stored, in main memory; `True` = removed.
        error (`float`, *optional*): relative squared output error of the weight on its calibration inputs,
            tr((W-W') Q (W-W')ᵀ) / tr(W Q Wᵀ), where the method collected Q.
    """

    target: Target
    mask: Tensor
    error: float | None


@dataclass(frozen=True)
class BlockOutcome:
    """What happened to one block: its targets and, with calibration, the relative error of the block's output."""

    index: int
    outcomes: list[Outcome]
    error: float | None
    seconds: float


def run_pass(
    model: nn.Module,
    family: Family,
    plan: Plan,
    ids: Tensor | None,
    on_block: Callable[[BlockOutcome], None],
    removed: Mapping[str, Tensor],
) -> None:
    """Prune `model` in place as `plan` says.

    Args:
        model (`nn.Module`): the model; its training mode, gradients flags, hooks and config are as before at the end,
            also after an exception.
        family (`Family`): its description.
        plan (`Plan`): from `make_plan`.
        ids (`Tensor`, *optional*): calibration blocks, (samples, seq_len); `None` only if the plan needs no text.
        on_block (`Callable`): called after every block.
        removed (`Mapping[str, Tensor]`): parameter name to bool mask of what earlier passes removed. It stays removed,
            also where the method updates weights.

    Raises:
        CalibrationError: statistics or activations are not usable; the weight or the block is named.
    """
    with inference_state(model), replaced_scan(family, model) as seam:
        counts = _planned_counts(model, family, plan, seam, ids)
        _execute(model, family, plan, seam, ids, counts, on_block, removed)


def _by_block(plan: Plan) -> dict[int, list[Task]]:
    blocks: dict[int, list[Task]] = {}
    for task in plan.tasks:
        blocks.setdefault(task.target.block, []).append(task)
    return blocks


def _planned_counts(
    model: nn.Module, family: Family, plan: Plan, seam: ScanSeam, ids: Tensor | None
) -> dict[Target, int]:
    """Entries to remove from every target; with a dense pass over all blocks where the allocation asks for one."""
    summaries: dict[Target, Any] = {}
    if plan.needs_planning:
        tasks = _by_block(plan)
        blocks = family.blocks(model)
        stream = Activations(model, blocks[0][1], ids, plan.config.batch_size) if ids is not None else None
        for index, (name, block) in enumerate(_progress(blocks, "Planning")):
            wanted = {task: plan.planning_statistics(task) for task in tasks.get(index, [])}
            wanted = {task: names for task, names in wanted.items() if names is not None}
            needs = {task.target.weight: names for task, names in wanted.items()}
            statistics = BlockStatistics(block, needs, seam)
            if stream is not None:
                with statistics.watching() if needs else nullcontext():
                    outputs = stream.through(block, name)
            evidence = [_evidence(plan, task, model, statistics, stream) for task in wanted]
            for entry, summary in zip(wanted, plan.allocation.summarise(evidence, plan.config.sparsity)):
                summaries[entry.target] = summary
            if stream is not None:
                stream.advance(outputs)
    items = [task.item for task in plan.tasks]
    found = [summaries.get(task.target) for task in plan.tasks]
    counts = plan.allocation.counts(items, found, plan.config.sparsity)
    return {task.target: count for task, count in zip(plan.tasks, counts)}


def _evidence(
    plan: Plan, task: Task, model: nn.Module, statistics: BlockStatistics, stream: Activations | None
) -> Evidence:
    target = task.target
    weight = _read(model, target)
    values = statistics.of(target.weight, target.label, stream.tokens if stream else 0)
    values = _rows_of(values, target)
    kind, selection = target.weight.kind, plan.selection(0)
    return Evidence(task.item, weight, values, lambda: plan.method.score(weight, values, kind, selection))


def _execute(
    model: nn.Module,
    family: Family,
    plan: Plan,
    seam: ScanSeam,
    ids: Tensor | None,
    counts: dict[Target, int],
    on_block: Callable[[BlockOutcome], None],
    removed: Mapping[str, Tensor],
) -> None:
    tasks = _by_block(plan)
    blocks = family.blocks(model)
    last = max(tasks)
    stream = Activations(model, blocks[0][1], ids, plan.config.batch_size) if ids is not None else None
    bar = _progress(blocks[: last + 1], f"Pruning ({plan.config.method})")
    for index, (name, block) in enumerate(bar):
        start = time.perf_counter()
        needs = {task.target.weight: task.statistics for task in tasks.get(index, []) if task.statistics}
        statistics = BlockStatistics(block, needs, seam)
        if stream is not None:
            with statistics.watching() if needs else nullcontext():
                dense = stream.through(block, name)
        tokens = stream.tokens if stream else 0
        outcomes = [
            _prune(plan, task, model, statistics, tokens, counts[task.target], removed)
            for task in tasks.get(index, [])
        ]
        error = None
        if stream is not None:
            pruned = stream.through(block, name) if outcomes else dense
            error = stream.relative_error(dense, pruned) if outcomes else None
            stream.advance(pruned if plan.config.sequential else dense)
            bar.set_postfix(block_error=f"{error:.2e}" if error is not None else "-")
        on_block(BlockOutcome(index, outcomes, error, time.perf_counter() - start))


def _prune(
    plan: Plan,
    task: Task,
    model: nn.Module,
    statistics: BlockStatistics,
    tokens: int,
    count: int,
    removed: Mapping[str, Tensor],
) -> Outcome:
    target, kind = task.target, task.target.weight.kind
    values = _rows_of(statistics.of(target.weight, target.label, tokens), target)
    before = _read(model, target)
    try:
        after, mask = plan.method.prune(before, values, kind, plan.selection(count))
    except ValueError as error:
        raise CalibrationError(f"{target.label}: {error}") from error
    fill = 0.0
    if kind == "a_log" and plan.config.a_log_fill == "memoryless":
        fill = plan.config.memoryless_value
    parameter = model.get_parameter(target.parameter)
    if target.parameter in removed:
        earlier = removed[target.parameter][target.rows].to(mask.device).reshape(mask.shape)
        after = torch.where(earlier, before, after)  # a method may have moved errors into an entry that is gone
    after = after.to(parameter.dtype).masked_fill(mask, fill)
    parameter[target.rows] = after.reshape(parameter[target.rows].shape)
    shape = parameter[target.rows].shape
    return Outcome(target, mask.reshape(shape).cpu(), output_error(before, after.float(), values))


def _read(model: nn.Module, target: Target) -> Tensor:
    """The target's entries in float32, as methods see them: a convolution without its middle axis of one."""
    weight = model.get_parameter(target.parameter).detach()[target.rows].float()
    if not weight.isfinite().all():
        raise CalibrationError(f"{target.label}: the weight holds non-finite values")
    return weight.squeeze(1) if target.weight.kind == "conv" else weight


def _rows_of(values: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    """Statistics of the target's own rows: a depthwise convolution has one per channel, others share theirs."""
    if target.weight.kind != "conv":
        return values
    return {name: value[target.rows] for name, value in values.items()}


def _progress(blocks: list, text: str) -> Any:
    """A bar over blocks on the main process; quiet when the output is not a terminal."""
    return tqdm(blocks, desc=text, unit="block", disable=not sys.stderr.isatty())
