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

from ..families.base import Family
from .activations import Activations, inference_state
from .drop_plan import DropPlan
from .dropping import drop_units
from .gradients import gradient_statistics
from .offload import BlockWeights, work_device
from .outcome import BlockOutcome, Outcome
from .placement import Batches, Pairs, Placement, choose_place
from .reconstruction import Reconstruction
from .seam import ScanSeam, replaced_scan
from .sites import BlockStatistics, Need
from .timing import phase
from .work import Place, Work


def run_pass(
    model: nn.Module,
    family: Family,
    plan: Any,
    ids: Tensor | None,
    on_block: Callable[[BlockOutcome], None],
    removed: Mapping[str, Tensor],
) -> None:
    """Prune `model` in place as `plan` says.

    Args:
        model (`nn.Module`): the model; its training mode, gradients flags, hooks and config are as before at the end,
            also after an exception.
        family (`Family`): its description.
        plan (`Plan`, `UnitPlan` or `DropPlan`): from `make_plan`.
        ids (`Tensor`, *optional*): calibration blocks, (samples, seq_len); `None` only if the plan needs no text.
        on_block (`Callable`): called after every block.
        removed (`Mapping[str, Tensor]`): parameter name to bool mask of what earlier passes removed. It stays removed,
            also where the method updates weights.

    Raises:
        CalibrationError: statistics or activations are not usable; the weight or the block is named.
    """
    with inference_state(model), replaced_scan(family, model) as seam:
        if isinstance(plan, DropPlan):
            drop_units(model, family, plan, ids, on_block)
            return
        wanted = plan.gradient_parameters
        gradients = gradient_statistics(model, wanted, ids, plan.config.batch_size) if wanted else {}
        work, weights = plan.work(model, removed, gradients), BlockWeights(model, plan.config.device)
        with _placement(model, family, plan, ids, weights) as placement:
            _Run(model, family, plan, work, seam, ids, removed, weights, placement).execute(on_block)


class _Run:
    """One pass over one model. Arguments as in `run_pass`, `seam` open, `work` what is done to a block."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        plan: Any,
        work: Work,
        seam: ScanSeam,
        ids: Tensor | None,
        removed: Mapping[str, Tensor],
        weights: BlockWeights,
        placement: Placement,
    ):
        self.model, self.config, self.work, self.seam, self.ids = model, plan.config, work, seam, ids
        self.weights, self.placement = weights, placement
        self._room: Batches | None = None  # for the outputs of a dense block; taken over from block to block
        self.removed, self.blocks = removed, family.blocks(model)
        self.reconstruction: Reconstruction = plan.reconstruction

    def execute(self, on_block: Callable[[BlockOutcome], None]) -> None:
        """Plan where the work asks for it, then prune block by block."""
        self._plan()
        stream = self._stream()
        goal: Batches | None = None  # the dense model's own stream, what reconstruction aims at
        bar = _progress(self.blocks[: max(self.work.tasks) + 1], f"Pruning ({self.config.method})")
        for index, (name, block) in enumerate(bar):
            with self.weights.at_hand(name, block, edit=index in self.work.tasks):
                goal = self._prune(index, stream, goal, bar, on_block)

    def _prune(
        self,
        index: int,
        stream: Activations | None,
        goal: Batches | None,
        bar: Any,
        on_block: Callable[[BlockOutcome], None],
    ) -> Batches | None:
        """Prune one block, whose weights are at hand, and bring the stream to the next one. Returns the goal there."""
        start, (name, block) = time.perf_counter(), self.blocks[index]
        tasks = self.work.tasks.get(index, [])
        place, values = self._collect(index, stream, {task: self.work.needs(task) for task in tasks})
        if self.reconstruction.epochs and stream is not None:
            with phase("forward"):
                goal = stream.through(block, name, goal, out=goal)
        with phase("solve"):
            outcomes = [self.work.apply(place, task, values[task]) for task in tasks]
        error = tuned = None
        if stream is not None:
            if outcomes and self.reconstruction.epochs:
                with phase("reconstruction"):
                    tuned = self._reconstruct(block, name, stream, goal, outcomes)
            if outcomes:
                with phase("replay"):
                    lost, whole = stream.replay(block, name, place.dense, keep=self.config.sequential)
                error = lost / whole if whole else 0.0
            if not outcomes or not self.config.sequential:
                self._room = stream.advance(place.dense)
            bar.set_postfix(block_error=f"{error:.2e}" if error is not None else "-")
        on_block(BlockOutcome(index, outcomes, error, time.perf_counter() - start, tuned))
        return goal

    def _stream(self) -> Activations | None:
        if self.ids is None:
            return None
        with phase("embedding"):
            return Activations(self.model, self.blocks[0][1], self.ids, self.config.batch_size, self.placement)

    def _plan(self) -> None:
        """A dense pass over all blocks where a task asks for one; the work then fixes its counts."""
        work, summaries = self.work, {}
        wanted = {
            index: {task: needs for task in tasks if (needs := work.planning_needs(task)) is not None}
            for index, tasks in work.tasks.items()
        }
        if any(wanted.values()):
            stream = self._stream()
            for index, (name, block) in enumerate(_progress(self.blocks, "Planning")):
                with self.weights.at_hand(name, block, edit=False):
                    place, values = self._collect(index, stream, wanted.get(index, {}))
                    with phase("planning"):
                        summaries |= work.summarise(place, values)
                if stream is not None:
                    self._room = stream.advance(place.dense)
        with phase("planning"):
            work.decide(summaries)

    def _collect(
        self, index: int, stream: Activations | None, wanted: Mapping[Any, Mapping[str, Need]]
    ) -> tuple[Place, dict[Any, dict[str, Tensor]]]:
        """One forward of a block that fills the wanted statistics, by task and name."""
        name, block = self.blocks[index]
        dense: Batches | None = None

        def watch(needs: list[Need]) -> BlockStatistics:
            nonlocal dense
            statistics = BlockStatistics(block, needs, self.seam)
            if stream is not None:
                with phase("forward"), statistics.watching() if needs else nullcontext():
                    if dense is None:
                        dense = self._room = stream.through(block, name, out=self._room)
                    else:  # it was changed since: only the statistics are new
                        for _ in stream.outputs(block, name):
                            pass
            return statistics

        statistics = watch([need for needs in wanted.values() for need in needs.values()])
        place = Place(index, name, block, stream, dense, watch)
        values = {
            task: {key: statistics.of(need, self.work.label(task), place.tokens) for key, need in needs.items()}
            for task, needs in wanted.items()
        }
        return place, values

    def _reconstruct(
        self, block: nn.Module, name: str, stream: Activations, goal: list[Tensor], outcomes: list[Outcome]
    ) -> tuple[float, float]:
        """Tune the block towards the dense stream; what this and earlier passes removed stays removed."""
        gone = {}
        for local, parameter in block.named_parameters():
            earlier = self.removed.get(f"{name}.{local}")
            for outcome in outcomes:
                earlier = outcome.sliced(local, earlier)
            gone[f"{name}.{local}"] = (
                torch.zeros(parameter.shape, dtype=torch.bool) if earlier is None else earlier.clone()
            )
        for outcome in outcomes:
            outcome.mark(gone)
        frozen = []
        for parameter_name, mask in gone.items():
            parameter = self.model.get_parameter(parameter_name)
            mask = mask.to(parameter.device)
            frozen.append((parameter, mask, parameter.detach()[mask]))

        def restore() -> None:
            with torch.no_grad():
                for parameter, mask, values in frozen:
                    parameter[mask] = values.to(parameter.dtype)

        pairs = Pairs(stream.hidden, goal, self.reconstruction.batch_size, work_device(block))
        return self.reconstruction.tune(block, name, pairs, stream.forward(block), restore)


def _placement(model: nn.Module, family: Family, plan: Any, ids: Tensor | None, weights: BlockWeights) -> Placement:
    """Where the calibration activations of a pass go: its inputs and its dense outputs, and what reconstruction aims at."""
    if ids is None:
        return Placement()
    embedding = model.get_input_embeddings().weight
    width = 4 if getattr(model.config, "residual_in_fp32", False) else embedding.element_size()
    copies = 3 if plan.reconstruction.epochs else 2
    needed = copies * ids.numel() * embedding.shape[1] * width
    return Placement(choose_place(plan.config.offload, needed, weights.device_of(family.blocks(model)[0][1])))


def _progress(blocks: list, text: str) -> Any:
    """A bar over blocks on the main process; quiet when the output is not a terminal."""
    return tqdm(blocks, desc=text, unit="block", disable=not sys.stderr.isatty())
