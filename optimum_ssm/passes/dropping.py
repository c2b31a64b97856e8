# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Dropping of whole blocks and SSMs: every candidate is left out in turn, on activations shared up to it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
from accelerate.utils import tqdm
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from ..calibration.activations import Activations
from ..calibration.block_weights import BlockWeights, let_go
from ..calibration.placement import Batches, Placement, stream_placement
from ..calibration.ranks import agreed
from ..errors import CalibrationError
from ..families.base import Family
from ..methods.structures.base import Units
from ..methods.structures.block_drop import evaluations, greedy
from ..surgery.drop import mute_ssm, muted, remove_blocks
from .drop_plan import BLOCK, DropPlan
from .outcome import BlockOutcome, DropOutcome
from .resume import Shards


T = TypeVar("T")

logger = logging.get_logger(__name__)

LARGEST_LOSS = 709.0  # exp of more than this overflows float64


def drop_units(
    model: nn.Module,
    family: Family,
    plan: DropPlan,
    ids: Tensor | None,
    on_block: Callable[[BlockOutcome], None],
    shards: Shards,
    before_change: Callable[[], None],
) -> None:
    """Drop what `plan` says from `model`, in place. Arguments as in `pipeline.run_pass`, with the scan replaced already and
    `ids` this process's part.

    Raises:
        CalibrationError: activations are not finite, or would not be without any unit that is left.
        CheckpointError: a round cannot be kept, or what was kept is damaged.
    """
    blocks = family.blocks(model)
    weights, dropped, seconds = BlockWeights(model, plan.config.device), [], 0.0
    if plan.count:
        # what enters a block, and what comes of it without a unit, before and after the next block
        device = weights.device_of(blocks[0][1])
        with agreed(shards.ranks, lambda: stream_placement(model, plan.config.offload, 3, ids, device)) as placement:
            search = _Search(model, family, plan, ids, weights, placement, shards)
            dropped, seconds = search.run(), search.seconds
    start = time.perf_counter()
    if dropped:
        before_change()
    order = {index: (rank, score) for rank, (index, score) in enumerate(dropped)}
    zeroed = {}
    for index in sorted(order) if plan.unit != BLOCK else ():
        name, block = blocks[index]
        with weights.at_hand(name, block, edit=True):
            zeroed[index] = mute_ssm(family, block)
    if plan.unit == BLOCK and order:
        remove_blocks(model, family, list(order))
        for index in order:
            let_go(blocks[index][1])
    seconds += time.perf_counter() - start
    for index in range(len(blocks)):
        outcomes = []
        if index in order:
            rank, score = order[index]
            outcomes.append(DropOutcome(plan.unit, index, rank, score, zeroed.get(index, {})))
        on_block(BlockOutcome(index, outcomes, None, seconds / len(order) if outcomes else 0.0))


class _Search:
    """The search for the units to drop; nothing of the model is changed when it ends. Arguments as in `drop_units`,
    with where blocks are worked on and where activations are kept. `seconds` are those of all rounds, also of an earlier
    run's."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        plan: DropPlan,
        ids: Tensor | None,
        weights: BlockWeights,
        placement: Placement,
        shards: Shards,
    ):
        self.model, self.family, self.plan, self.ids = model, family, plan, ids
        self.weights, self.placement, self.shards, self.ranks = weights, placement, shards, shards.ranks
        self.blocks, self.seconds = family.blocks(model), 0.0
        rounds = evaluations(len(plan.tasks), plan.count) if plan.stepwise else len(plan.tasks)
        text = f"Dropping ({plan.config.method})"
        quiet = not self.ranks.main or not sys.stderr.isatty()
        self._bar = tqdm(total=rounds, desc=text, unit="evaluation", disable=quiet, main_process_only=False)

    def run(self) -> list[tuple[int, float]]:
        """The dropped units in their order, with the keep-score that each had then."""
        plan = self.plan
        with self._bar:
            if plan.stepwise:
                return greedy(plan.tasks, plan.count, self._round)
            fixed = dict(zip(plan.tasks, self._round(plan.tasks)))
            return greedy(plan.tasks, plan.count, lambda left: [fixed[index] for index in left])

    def _round(self, left: list[int]) -> list[float]:
        """Scores before one more unit goes. Kept ones lead to the same unit: the search knows nothing but what is left."""
        done = self._bar.n
        scores, seconds = self.shards.scores(len(self.plan.tasks) - len(left), left, lambda: self._scores(left))
        self._bar.update(done + len(left) - self._bar.n)  # none of a round that was kept is evaluated
        self.seconds += seconds
        return scores

    def _scores(self, left: list[int]) -> list[float]:
        measures = {"perplexity": self._perplexities, "influence": self._influences}
        statistics = {(BLOCK, name): torch.tensor(measures[name](left)).double() for name in self.plan.statistics}
        remove = self.plan.count - (len(self.plan.tasks) - len(left))
        scores = self.plan.method.scores(Units(BLOCK, len(left), 1, remove, {}, {}, statistics))
        if scores.shape != (len(left),):
            raise ValueError(f"{type(self.plan.method).__name__} gave scores of shape {tuple(scores.shape)}")
        if scores.isnan().any() or not scores.isfinite().any():
            raise CalibrationError(f"{self.plan.config.method}: no {self.plan.unit} can go without the model breaking")
        return scores.tolist()

    def _perplexities(self, left: list[int]) -> list[float]:
        """Perplexity without each unit of `left`, and without those of the plan that are not in `left`.

        What enters block i is the same for every candidate from i on, so it is carried along: with U blocks U(U+1)/2
        block evaluations instead of U².
        """
        gone = set(self.plan.tasks) - set(left)
        stream, found = self._stream(), []
        for index in range(left[-1] + 1):
            if index in left:
                found.append(self._perplexity_without(index, stream, gone))
                self._bar.update()
            if index < left[-1]:
                stream.advance(self._agreed(lambda: self._pass(index, stream, stream.hidden, index in gone)))
        return found

    def _perplexity_without(self, index: int, stream: Activations, gone: set[int]) -> float:
        """exp of the mean negative log-likelihood of all predicted tokens."""
        total, tokens = math.inf, 1
        try:
            hidden = stream.hidden
            skipped = {index, *gone} if self.plan.unit == BLOCK else set()
            path = [place for place in range(index, len(self.blocks)) if place not in skipped]
            for place, following in zip(path, [*path[1:], None]):
                hidden = self._pass(place, stream, hidden, place == index or place in gone, following)
            total, tokens = self._negative_log_likelihood(hidden)
        except CalibrationError as error:  # the model cannot do without this unit
            logger.warning(f"without the {self.plan.unit} of {self.blocks[index][0]}: {error}")
        total, tokens = self.ranks.sums(total, tokens)
        return math.exp(total / tokens) if total / tokens < LARGEST_LOSS else math.inf

    def _influences(self, left: list[int]) -> list[float]:
        """1 - E cos(with, without) of the output of every block in `left`, over tokens; one pass."""
        stream, found = self._stream(), []
        for index in range(left[-1] + 1):
            dense = self._agreed(lambda: self._pass(index, stream, stream.hidden, False))
            if index in left:
                without = self._agreed(lambda: self._pass(index, stream, stream.hidden, True))
                alike = (F.cosine_similarity(a.float(), b.float(), dim=-1) for a, b in zip(dense, without))
                cosines = sum(float(cosine.sum(dtype=torch.float64)) for cosine in alike)
                cosines, tokens = self.ranks.sums(cosines, stream.tokens)
                found.append(1 - cosines / tokens)
                self._bar.update()
            stream.advance(dense)
        return found

    def _stream(self) -> Activations:
        size = self.plan.config.batch_size
        return self._agreed(lambda: Activations(self.model, self.blocks[0][1], self.ids, size, self.placement))

    def _agreed(self, action: Callable[[], T]) -> T:
        """`ranks.agreed`: each process has its own part of the text."""
        return agreed(self.ranks, action)

    def _pass(
        self, index: int, stream: Activations, hidden: Batches, without: bool, following: int | None = None
    ) -> Batches:
        """Outputs of a block for every batch, with or without its unit, before those of the block `following`."""
        if without and self.plan.unit == BLOCK:
            return hidden
        name, block = self.blocks[index]
        following = None if following is None else self.blocks[following][1]
        with self.weights.at_hand(name, block, edit=False, following=following):
            with muted(self.family, block) if without else nullcontext():
                return stream.through(block, name, hidden)

    def _negative_log_likelihood(self, hidden: Batches) -> tuple[float, int]:
        """Its sum over predicted tokens, and their number; one sequence of logits at a time."""
        norm, head = getattr(self.model.base_model, self.family.final_norm), self.model.get_output_embeddings()
        device, total, tokens = self.weights.device_of(norm), 0.0, 0
        with (
            self.weights.at_hand("final norm", norm, edit=False),
            self.weights.at_hand("output head", head, edit=False),
        ):
            for x, batch in zip(hidden.read(device), self.ids.split(self.plan.config.batch_size)):
                for states, row in zip(x, batch):
                    logits = head(norm(states[None]).to(head.weight))[0, :-1].float()
                    total += float(F.cross_entropy(logits, row[1:].to(logits.device), reduction="sum"))
                    tokens += len(row) - 1
        return total, tokens
