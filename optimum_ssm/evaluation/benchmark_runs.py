# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Runs that take turns: a round times every model once, so that a slow phase of the machine hits all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .benchmark_facts import parameter_bytes, scan_in_use
from .benchmark_report import OUT_OF_MEMORY, Measurement
from .decoding import GreedyDecoder, prefill


AGREEMENT_STEPS = 8  # tokens of a graph that are compared with those of eager steps


class Run:
    """Something to time: `prepare` once, which gives the peak memory, then `__call__` as often as wanted."""

    tokens: int
    decode: str = ""
    agreement: float | None = None
    decoder: GreedyDecoder | None = None

    def prepare(self, device: torch.device) -> int | None:
        """Warm up; returns the bytes of the largest allocation, or `None` where that is not measured."""
        raise NotImplementedError

    def before(self) -> None:
        """What a timed run needs but is not part of it."""

    def __call__(self) -> None:
        raise NotImplementedError


class Prefill(Run):
    def __init__(self, model: PreTrainedModel, ids: Tensor, scan: str):
        self.model, self.ids, self.scan = model, ids, scan
        self.tokens = ids.numel()

    def prepare(self, device: torch.device) -> int | None:
        with _peak_memory(device, self.model) as peak:
            self()
        return peak[0]

    def __call__(self) -> None:
        with scan_in_use(self.model, self.scan):
            prefill(self.model, self.ids)


class Decode(Run):
    def __init__(self, model: PreTrainedModel, ids: Tensor, scan: str, new_tokens: int, graph: bool):
        self.model, self.ids, self.scan, self.new_tokens, self.graph = model, ids, scan, new_tokens, graph
        self.tokens = len(ids) * new_tokens
        self.decode = "CUDA graph" if graph else "eager"

    def prepare(self, device: torch.device) -> int | None:
        with scan_in_use(self.model, self.scan), _peak_memory(device, self.model) as peak:
            decoder = GreedyDecoder(self.model, self.ids)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # the short prompt is not what is asked for
            eager = decoder.run(AGREEMENT_STEPS)
        with scan_in_use(self.model, self.scan):
            if self.graph:
                decoder.capture()
                self.agreement = float((decoder.run(AGREEMENT_STEPS) == eager).float().mean())
        self.decoder = decoder
        self()
        return peak[0]

    def before(self) -> None:
        with scan_in_use(self.model, self.scan):
            self.decoder.restart()

    def __call__(self) -> None:
        self.decoder.run(self.new_tokens)


def take_turns(
    runs: dict[str, Run], phase: str, batch_size: int, repeats: int, device: torch.device
) -> list[Measurement]:
    """Warm up all runs, then time them round by round. One without enough memory drops out, the others go on."""
    rows = {name: Measurement(name, phase, batch_size, run.tokens, decode=run.decode) for name, run in runs.items()}
    alive = dict(runs)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            rows[name].status = OUT_OF_MEMORY
            rows[name].seconds = []
            rows[name].peak_memory_bytes = None
            alive.pop(name).decoder = None  # the others may need its memory
        free(device)  # only now that the error, which holds the frames that failed, is gone
        return None

    for name, run in runs.items():
        rows[name].peak_memory_bytes = attempt(name, lambda run=run: run.prepare(device))
        rows[name].agreement = run.agreement
    for _ in range(repeats):
        for name, run in list(alive.items()):
            seconds = attempt(name, lambda run=run: _seconds(run, device))
            if seconds is not None:
                rows[name].seconds.append(seconds)
    first = next(iter(rows.values())).seconds
    for row in rows.values():
        row.ratios = [slow / fast for slow, fast in zip(first, row.seconds)]
    return list(rows.values())


def _seconds(run: Run, device: torch.device) -> float:
    run.before()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give unused blocks of the CUDA allocator back, which a capture or another model's shapes could not take."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def _peak_memory(device: torch.device, model: PreTrainedModel) -> Iterator[list[int | None]]:
    """Bytes that a process with this model alone would hold at most: what is allocated inside, and the weights.

    Only torch's CUDA allocator can tell. The growth of a CPU process depends on what its allocator kept from earlier.
    """
    found: list[int | None] = [None]
    if device.type != "cuda":
        yield found
        return
    free(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    _wait(device)
    found[0] = torch.cuda.max_memory_allocated(device) - before + parameter_bytes(model)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where it ended something else, such as the capture of a graph."""
    while error is not None:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if any(said in text for said in ("can't allocate memory", "ALLOC_FAILED", "out of memory")):
            return True
        error = error.__cause__ or error.__context__
    return False
