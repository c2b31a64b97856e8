# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The block loop: collect -> prune -> replay. With its neighbours here, the only code that touches devices and hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.activations import Activations, inference_state
from ..calibration.block_weights import BlockWeights
from ..calibration.gradients import gradient_statistics
from ..calibration.heap import kept_heap, samples_that_fit
from ..calibration.offload import work_device
from ..calibration.placement import Batches, Pairs, Placement, stream_placement
from ..calibration.ranks import ALONE, Ranks, agreed
from ..calibration.seam import ScanSeam, replaced_scan
from ..calibration.sites import BlockStatistics, Need
from ..calibration.timing import phase
from ..families.base import Family
from .drop_plan import DropPlan
from .dropping import drop_units
from .outcome import BlockOutcome, Outcome
from .progress import BlockProgress, progress
from .reconstruction import Reconstruction
from .resume import Shards
from .sharing import apply_tasks
from .work import Place, Work


T = TypeVar("T")

logger = logging.get_logger(__name__)


def run_pass(
    model: nn.Module,
    family: Family,
    plan: Any,
    ids: Tensor | None,
    on_block: Callable[[BlockOutcome], None],
    removed: Mapping[str, Tensor],
    ranks: Ranks = ALONE,
    shards: Shards | None = None,
    before_change: Callable[[], None] = lambda: None,
    dense_entries: int | None = None,
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
        ranks (`Ranks`): the processes that work together, all with the same model, plan and `ids`.
        shards (`Shards`, *optional*): where finished blocks, or rounds of a search, are kept and found.
        before_change (`Callable`): called before anything of the model is changed, which then does not fit any report until
            the pass ends.
        dense_entries (`int`, *optional*): of the model before its first pass, where passes before have cut some; the progress
            bar counts against them.

    Raises:
        CalibrationError: statistics or activations are not usable; the weight or the block is named.
    """
    shards = shards or Shards(ranks)
    with inference_state(model), kept_heap(), replaced_scan(family, model) as seam:
        if isinstance(plan, DropPlan):
            own = None if ids is None else ranks.share(ids, plan.config.batch_size)
            drop_units(model, family, plan, own, on_block, shards, before_change)
            return
        wanted, gradients = plan.gradient_parameters, {}
        if wanted:
            gradients = shards.gradients(
                model, lambda: gradient_statistics(model, wanted, ids, plan.config.batch_size, ranks)
            )
        work, weights = plan.work(model, removed, gradients), BlockWeights(model, plan.config.device)
        # a step of the reconstruction takes blocks that follow each other from all processes
        together = 1 if plan.reconstruction.epochs else plan.config.batch_size
        tokens, ids = (0, None) if ids is None else (ids.numel(), ranks.share(ids, together))
        copies = 3 if plan.reconstruction.epochs else 2  # inputs, dense outputs, and what reconstruction aims at
        device = weights.device_of(family.blocks(model)[0][1])
        with agreed(ranks, lambda: stream_placement(model, plan.config.offload, copies, ids, device)) as placement:
            run = _Run(
                model, family, plan, work, seam, ids, removed, weights, placement, ranks, shards, tokens, before_change
            )
            run.execute(on_block, dense_entries)


class _Run:
    """One pass over one model. Arguments as in `run_pass`, `seam` open, `work` what is done to a block, `ids` this
    process's part, `tokens` those of all processes."""

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
        ranks: Ranks,
        shards: Shards,
        tokens: int,
        before_change: Callable[[], None],
    ):
        self.model, self.config, self.work, self.seam, self.ids = model, plan.config, work, seam, ids
        self.weights, self.placement = weights, placement
        self._room: Batches | None = None  # for the outputs of a dense block; taken over from block to block
        self.removed, self.family, self.blocks = removed, family, family.blocks(model)
        self.ranks, self.shards, self.tokens = ranks, shards, tokens
        self.reconstruction: Reconstruction = plan.reconstruction
        self.before_change = before_change

    def execute(self, on_block: Callable[[BlockOutcome], None], dense_entries: int | None) -> None:
        """Plan where the work asks for it, then prune block by block."""
        self._plan()
        blocks = self.blocks[: max(self.work.tasks) + 1]
        stream = self._stream() if self.shards.finished < len(blocks) else None
        goal: Batches | None = None  # the dense model's own stream, what reconstruction aims at
        text = f"Pruning ({self.config.method})"
        bar = BlockProgress(blocks, text, self.model, self.ranks, self.removed, dense_entries)
        for index, (name, block) in enumerate(bar):
            finished = index < self.shards.finished
            following = _following(blocks, index)
            with ExitStack() as at_hand:
                at_hand.enter_context(
                    self.weights.at_hand(name, block, edit=index in self.work.tasks, following=following)
                )
                outcome, goal = (self._put_back if finished else self._prune)(index, stream, goal)
                if not finished:
                    self.shards.keep(outcome, name, block, self.family)
                self._agreed(at_hand.close)  # which may have to write it to a disk
            bar.tell(outcome)
            on_block(outcome)

    def _prune(
        self, index: int, stream: Activations | None, goal: Batches | None
    ) -> tuple[BlockOutcome, Batches | None]:
        """Prune one block, whose weights are at hand, and bring the stream and the goal to the next one."""
        start, (name, block) = time.perf_counter(), self.blocks[index]
        tasks = self.work.tasks.get(index, [])
        place, values = self._collect(index, stream, {task: self.work.needs(task) for task in tasks})
        if self.reconstruction.epochs and stream is not None:
            with phase("forward"):
                goal = self._agreed(lambda: stream.through(block, name, goal, out=goal))
        self.work.check(tasks)
        if tasks:
            self.before_change()
        with phase("solve"):
            outcomes = apply_tasks(self.work, place, tasks, values, self.ranks)
        error = tuned = None
        if stream is not None:
            if outcomes and self.reconstruction.epochs:
                with phase("reconstruction"):
                    tuned = self._reconstruct(block, name, stream, goal, outcomes)
            if outcomes:
                with phase("replay"):
                    found = self._agreed(lambda: stream.replay(block, name, place.dense, keep=self.config.sequential))
                    lost, whole = self.ranks.sums(*found)
                error = lost / whole if whole else 0.0
            if not outcomes or not self.config.sequential:
                self._room = stream.advance(place.dense)
        return BlockOutcome(index, outcomes, error, time.perf_counter() - start, tuned), goal

    def _put_back(
        self, index: int, stream: Activations | None, goal: Batches | None
    ) -> tuple[BlockOutcome, Batches | None]:
        """The same with a block that was finished before: what was computed is read, the stream is replayed."""
        name, block = self.blocks[index]
        tasks = self.work.tasks.get(index, [])
        dense = None
        if stream is not None and (not tasks or not self.config.sequential):
            # with the statistics, because a scan that sums may round otherwise than one that does not
            place, _ = self._collect(index, stream, {task: self.work.needs(task) for task in tasks})
            dense = place.dense
        if self.reconstruction.epochs and stream is not None:
            goal = self._agreed(lambda: stream.through(block, name, goal, out=goal))
        self.before_change()
        outcome = self.shards.put_back(index, block, self.family, self.work)
        if dense is not None:
            self._room = stream.advance(dense)
        elif stream is not None:
            self._agreed(lambda: stream.through(block, name, out=stream.hidden))
        return outcome, goal

    def _agreed(self, action: Callable[[], T]) -> T:
        """What `action` gives; what stops it in one process, with its own inputs, stops all, so that none waits for it."""
        return agreed(self.ranks, action)

    def _stream(self) -> Activations | None:
        if self.ids is None:
            return None
        first, size = self.blocks[0][1], self.config.batch_size
        if self.weights.device_of(first).type == "cpu":
            size = samples_that_fit(first, self.ids.shape[1], size)
        with phase("embedding"):
            stream = self._agreed(lambda: Activations(self.model, first, self.ids, size, self.placement))
        stream.tokens = self.tokens
        return stream

    def _plan(self) -> None:
        """A dense pass over all blocks where a task asks for one; the work then fixes its counts."""
        work, summaries = self.work, {}
        if self.shards.resume_plan(work):
            return
        wanted = {
            index: {task: needs for task in tasks if (needs := work.planning_needs(task)) is not None}
            for index, tasks in work.tasks.items()
        }
        if any(wanted.values()):
            stream = self._stream()
            for index, (name, block) in enumerate(progress(self.blocks, "Planning", "block", self.ranks)):
                following = _following(self.blocks, index)
                with self.weights.at_hand(name, block, edit=False, following=following):
                    place, values = self._collect(index, stream, wanted.get(index, {}))
                    with phase("planning"):
                        summaries |= work.summarise(place, values)
                if stream is not None:
                    self._room = stream.advance(place.dense)
        with phase("planning"):
            work.decide(summaries)
        if not self.ranks.alone:
            work.resume(self.ranks.on_main(work.decided))
        self.shards.keep_plan(work)

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
                        dense = self._room = self._agreed(lambda: stream.through(block, name, out=self._room))
                    else:  # it was changed since: only the statistics are new
                        self._agreed(lambda: [None for _ in stream.outputs(block, name)])
                statistics.reduce(self.ranks)
            return statistics

        statistics = watch([need for needs in wanted.values() for need in needs.values()])
        place = Place(index, name, block, stream, dense, watch, self.ranks)
        values = {
            task: {key: statistics.of(need, self.work.label(task), place.tokens) for key, need in needs.items()}
            for task, needs in wanted.items()
        }
        return place, values

    def _reconstruct(
        self, block: nn.Module, name: str, stream: Activations, goal: list[Tensor], outcomes: list[Outcome]
    ) -> tuple[float, float, float]:
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

        size = -(-self.reconstruction.batch_size // self.ranks.count)
        pairs = Pairs(stream.hidden, goal, size, work_device(block))
        tuned = self.reconstruction.tune(block, name, pairs, stream.forward(block), restore, self.ranks)
        if not self.ranks.alone:
            self.ranks.align_(block)
        return tuned


def _following(blocks: list[tuple[str, nn.Module]], index: int) -> nn.Module | None:
    """The block after one, if there is one."""
    return blocks[index + 1][1] if index + 1 < len(blocks) else None
