# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How long pruning takes, phase by phase, how far that is from what the machine could do, and how both grow."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.timing import PhaseClock
from ..configuration import SSMPrunerConfig
from ..families import family_of
from ..passes.plan import Plan, make_plan
from ..pruner import SSMPruner
from .pruning_bounds import Rates, pass_bounds


@dataclass
class PruningTimes:
    """One measured run.

    Args:
        seconds (`dict[str, float]`): by phase.
        bounds (`dict[str, float]`): the least seconds of phases that have a bound, from `pruning_bounds`.
        peak (`dict[str, int]`): most bytes allocated on accelerators, by phase; empty without one.
        weights (`int`): bytes of the model.
        peak_bytes (`int`): most bytes allocated on accelerators, weights included; on a CPU, by how much the process grew.
        places (`list[str]`): where each pass kept its activations.
        tokens (`int`): calibration tokens of all passes.
    """

    seconds: dict[str, float]
    bounds: dict[str, float]
    peak: dict[str, int]
    weights: int
    peak_bytes: int
    places: list[str] = field(default_factory=list)
    tokens: int = 0

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> float:
        """The least seconds of the phases that have a bound."""
        return sum(self.bounds.values())

    def table(self) -> str:
        """Markdown: phases in falling time, the gap to the bound, and memory."""
        rows = sorted(self.seconds, key=lambda name: -self.seconds[name])
        lines = ["| phase | seconds | share | bound, s | times the bound | peak, GB |", "|---|---|---|---|---|---|"]
        for name in rows:
            bound, peak = self.bounds.get(name), self.peak.get(name)
            lines.append(_row(name, self.seconds[name], self.total, bound, peak))
        lines.append(_row("all", self.total, self.total, self.bound, self.peak_bytes))
        lines.append("")
        lines.append(
            f"{self.tokens:,} tokens; weights {self.weights / 1e9:.2f} GB; activations kept on: "
            f"{', '.join(self.places) or 'nowhere'}"
        )
        return "\n".join(lines)


def time_pruning(model: PreTrainedModel, recipe: list[SSMPrunerConfig], ids: Tensor, rates: Rates) -> PruningTimes:
    """Prune `model` in place by `recipe` on the blocks `ids` (samples, seq_len), and measure it.

    Args:
        model (`PreTrainedModel`): random weights will do.
        recipe (`list[SSMPrunerConfig]`): passes; their text is replaced by `ids`.
        ids (`Tensor`): int64, (samples, seq_len).
        rates (`Rates`): from `measure_rates` in the same run.
    """
    passes = [_on_ids(config, ids) for config in recipe]
    family, bounds = family_of(model), {}
    plans = [make_plan(model, family, config) for config in passes]
    with _growth() as grown, PhaseClock() as clock:
        SSMPruner(model).prune(passes)
    places = clock.notes.get("place", [])
    used = iter(places)
    for plan in plans:
        place = next(used, "device") if plan.needs_text else "device"
        if isinstance(plan, Plan):
            for name, cost in pass_bounds(model, family, plan, ids.numel() if plan.needs_text else 0, place).items():
                bounds[name] = bounds.get(name, 0.0) + cost.seconds(rates)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peak = max(clock.peak.values()) if torch.cuda.is_available() and clock.peak else grown[0]
    tokens = sum(ids.numel() for plan in plans if plan.needs_text)
    return PruningTimes(clock.seconds, bounds, clock.peak, weights, peak, places, tokens)


def growth_table(runs: list[tuple[str, int, int, int, PruningTimes]]) -> str:
    """Markdown of runs that differ in one thing: (name, tokens, blocks, hidden size, times) each, the first as the measure.

    Time that is linear in tokens and blocks shows the same seconds per token and block in all of them.
    """
    lines = [
        "| run | tokens | blocks | hidden | seconds | x first | us per token and block | peak above weights, GB | x first |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first = runs[0][4]
    for name, tokens, blocks, hidden, times in runs:
        above, above_first = (_above(t) for t in (times, first))
        lines.append(
            f"| {name} | {tokens:,} | {blocks} | {hidden} | {times.total:.2f} | {times.total / first.total:.2f} | "
            f"{1e6 * times.total / tokens / blocks:.2f} | {above / 1e9:.3f} | {above / max(1, above_first):.2f} |"
        )
    return "\n".join(lines)


def _above(times: PruningTimes) -> int:
    return times.peak_bytes - times.weights if times.peak else times.peak_bytes


def _row(name: str, seconds: float, total: float, bound: float | None, peak: int | None) -> str:
    gap = "-" if not bound else f"{seconds / bound:.1f}"
    least = "-" if bound is None else f"{bound:.3f}"
    memory = "-" if peak is None else f"{peak / 1e9:.2f}"
    return f"| {name} | {seconds:.3f} | {seconds / total:.1%} | {least} | {gap} | {memory} |"


def _on_ids(config: SSMPrunerConfig, ids: Tensor) -> SSMPrunerConfig:
    values = {**config.to_dict(), "dataset": ids, "dataset_name": None, "dataset_split": None}
    return SSMPrunerConfig.from_dict({**values, "num_samples": len(ids), "seq_len": ids.shape[1]})


@contextmanager
def _growth() -> Iterator[list[int]]:
    """By how many bytes the process's resident memory has grown at most while the context was open; sampled by a thread. With
    an accelerator, whose memory is what counts, there is nothing to sample."""
    gc.collect()
    if torch.cuda.is_available():
        yield [0]
        return
    process, over = psutil.Process(), threading.Event()
    before, grown = process.memory_info().rss, [0]

    def sample() -> None:
        while not over.wait(0.01):
            grown[0] = max(grown[0], process.memory_info().rss - before)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield grown
    finally:
        over.set()
        thread.join()
