# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The block loop: collect -> prune -> replay. With its neighbours here, the only code that touches devices and hooks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import CalibrationError
from ..families.base import Family
from ..families.matching import Target
from ..methods.base import output_error
from ..sparsity.allocations.base import Evidence
from .activations import Activations, inference_state
from .gradients import GRADIENT_STATISTICS, gradient_statistics
from .outcome import BlockOutcome, Outcome
from .plan import Plan, Task
from .seam import ScanSeam, replaced_scan
from .sites import BlockStatistics


logger = logging.get_logger(__name__)


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
        _Run(model, family, plan, seam, ids, removed).execute(on_block)


class _Run:
    """One pass over one model. Arguments as in `run_pass`, `seam` open."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        plan: Plan,
        seam: ScanSeam,
        ids: Tensor | None,
        removed: Mapping[str, Tensor],
    ):
        self.model, self.plan, self.seam, self.ids, self.removed = model, plan, seam, ids, removed
        self.blocks = family.blocks(model)
        self.tasks: dict[int, list[Task]] = {}
        for task in plan.tasks:
            self.tasks.setdefault(task.target.block, []).append(task)
        self.gradients: dict[str, dict[str, Tensor]] = {}
        if plan.gradient_parameters:
            self.gradients = gradient_statistics(model, plan.gradient_parameters, ids, plan.config.batch_size)

    def execute(self, on_block: Callable[[BlockOutcome], None]) -> None:
        """Plan counts where the allocation asks for it, then prune block by block."""
        counts = self._planned_counts()
        config = self.plan.config
        stream = self._stream()
        goal = stream.hidden if stream is not None else []  # the dense model's own stream, what reconstruction aims at
        bar = _progress(self.blocks[: max(self.tasks) + 1], f"Pruning ({config.method})")
        for index, (name, block) in enumerate(bar):
            start = time.perf_counter()
            tasks = self.tasks.get(index, [])
            statistics, dense = self._collect(block, name, stream, {t: t.statistics for t in tasks})
            if self.plan.reconstruction.epochs and stream is not None:
                goal = stream.through(block, name, goal)
            outcomes = [self._prune(task, statistics, stream, counts[task.target]) for task in tasks]
            error = tuned = None
            if stream is not None:
                if outcomes and self.plan.reconstruction.epochs:
                    tuned = self._reconstruct(block, name, stream, goal, outcomes)
                pruned = stream.through(block, name) if outcomes else dense
                error = stream.relative_error(dense, pruned) if outcomes else None
                stream.advance(pruned if config.sequential else dense)
                bar.set_postfix(block_error=f"{error:.2e}" if error is not None else "-")
            on_block(BlockOutcome(index, outcomes, error, time.perf_counter() - start, tuned))

    def _stream(self) -> Activations | None:
        if self.ids is None:
            return None
        return Activations(self.model, self.blocks[0][1], self.ids, self.plan.config.batch_size)

    def _collect(
        self, block: nn.Module, name: str, stream: Activations | None, wanted: Mapping[Task, tuple[str, ...]]
    ) -> tuple[BlockStatistics, list[Tensor]]:
        """One forward of the block that fills the wanted statistics; its outputs."""
        needs = {
            task.target.weight: local
            for task, names in wanted.items()
            if (local := tuple(n for n in names if n not in GRADIENT_STATISTICS))
        }
        statistics = BlockStatistics(block, needs, self.seam)
        if stream is None:
            return statistics, []
        with statistics.watching() if needs else nullcontext():
            return statistics, stream.through(block, name)

    def _planned_counts(self) -> dict[Target, int]:
        """Entries to remove from every target; with a dense pass over all blocks where the allocation asks for one."""
        plan, summaries = self.plan, {}
        if plan.needs_planning:
            stream = self._stream()
            for index, (name, block) in enumerate(_progress(self.blocks, "Planning")):
                found = {task: plan.planning_statistics(task) for task in self.tasks.get(index, [])}
                wanted = {task: names for task, names in found.items() if names is not None}
                statistics, outputs = self._collect(block, name, stream, wanted)
                evidence = [self._evidence(task, statistics, stream) for task in wanted]
                for task, summary in zip(wanted, plan.allocation.summarise(evidence, plan.config.sparsity)):
                    summaries[task.target] = summary
                if stream is not None:
                    stream.advance(outputs)
        items = [task.item for task in plan.tasks]
        facts = [summaries.get(task.target) for task in plan.tasks]
        counts = plan.allocation.counts(items, facts, plan.config.sparsity)
        for task, count in zip(plan.tasks, counts):
            if count == task.size and plan.config.sparsity > 0:
                logger.warning(f"{task.target.label} loses all of its {count} entries")
        return {task.target: count for task, count in zip(plan.tasks, counts)}

    def _values(self, task: Task, statistics: BlockStatistics, stream: Activations | None) -> dict[str, Tensor]:
        """The finished statistics of a task's own rows, in the shapes that methods see."""
        target = task.target
        values = statistics.of(target.weight, target.label, stream.tokens if stream else 0)
        if target.weight.kind == "conv":  # one Gram matrix per channel; other weights share theirs between rows
            values = {name: value[target.rows] for name, value in values.items()}
        shared = self.gradients.get(target.parameter, {})
        return values | {name: _as_seen(value[target.rows], target) for name, value in shared.items()}

    def _evidence(self, task: Task, statistics: BlockStatistics, stream: Activations | None) -> Evidence:
        weight, values = self._read(task.target), self._values(task, statistics, stream)
        kind, selection = task.target.weight.kind, self.plan.selection(0)
        return Evidence(task.item, weight, values, lambda: self.plan.method.score(weight, values, kind, selection))

    def _prune(self, task: Task, statistics: BlockStatistics, stream: Activations | None, count: int) -> Outcome:
        target, kind = task.target, task.target.weight.kind
        values = self._values(task, statistics, stream)
        before = self._read(target)
        try:
            after, mask = self.plan.method.prune(before, values, kind, self.plan.selection(count))
        except ValueError as error:
            raise CalibrationError(f"{target.label}: {error}") from error
        parameter = self.model.get_parameter(target.parameter)
        if target.parameter in self.removed:
            earlier = self.removed[target.parameter][target.rows].to(mask.device).reshape(mask.shape)
            after = torch.where(earlier, before, after)  # a method may have moved errors into an entry that is gone
        after = after.to(parameter.dtype).masked_fill(mask, self.plan.fill(kind))
        shape = parameter[target.rows].shape
        parameter[target.rows] = after.reshape(shape)
        return Outcome(target, mask.reshape(shape).cpu(), output_error(before, after.float(), values))

    def _read(self, target: Target) -> Tensor:
        """A copy of the target's entries in float32, as methods see them."""
        weight = self.model.get_parameter(target.parameter).detach()[target.rows].to(torch.float32, copy=True)
        if not weight.isfinite().all():
            raise CalibrationError(f"{target.label}: the weight holds non-finite values")
        return _as_seen(weight, target)

    def _reconstruct(
        self, block: nn.Module, name: str, stream: Activations, goal: list[Tensor], outcomes: list[Outcome]
    ) -> tuple[float, float]:
        """Tune the block towards the dense stream; what this and earlier passes removed stays removed."""
        gone = {}
        for local, parameter in block.named_parameters():
            earlier = self.removed.get(f"{name}.{local}")
            gone[f"{name}.{local}"] = (
                torch.zeros(parameter.shape, dtype=torch.bool) if earlier is None else earlier.clone()
            )
        for outcome in outcomes:
            gone[outcome.target.parameter][outcome.target.rows] |= outcome.mask
        frozen = []
        for parameter_name, mask in gone.items():
            parameter = self.model.get_parameter(parameter_name)
            mask = mask.to(parameter.device)
            frozen.append((parameter, mask, parameter.detach()[mask]))

        def restore() -> None:
            with torch.no_grad():
                for parameter, mask, values in frozen:
                    parameter[mask] = values.to(parameter.dtype)

        samples = list(zip(stream.hidden, goal))
        return self.plan.reconstruction.tune(block, name, samples, stream.forward(block), restore)


def _as_seen(tensor: Tensor, target: Target) -> Tensor:
    """A convolution without its middle axis of one, as methods see it; anything else as it is."""
    return tensor.squeeze(1) if target.weight.kind == "conv" else tensor


def _progress(blocks: list, text: str) -> Any:
    """A bar over blocks on the main process; quiet when the output is not a terminal."""
    return tqdm(blocks, desc=text, unit="block", disable=not sys.stderr.isatty())
