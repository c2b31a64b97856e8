# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a pass goes, phase by phase. Off by default: then a phase costs a function call and nothing waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


OTHER = "other"  # whatever runs outside of any phase
MOST_EVENTS = 4096  # that wait to be read
_clock: PhaseClock | None = None


class PhaseClock:
    """Measures the phases that run while it is open, in the thread that opened it.

    With one accelerator, events between the phases tell when it came to them, so that nothing waits and the time belongs to
    the phase that the accelerator worked for. With several it waits for all of them at every change of phase, which slows a
    pass a little. A phase inside another one is taken out of the outer one's time.

    Attributes:
        seconds (`dict[str, float]`): by phase, in the order in which they came.
        peak (`dict[str, int]`): most bytes that tensors held on the accelerator in each phase; empty without one.
        notes (`dict[str, list[str]]`): what was said with `note`.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.notes: dict[str, list[str]] = {}
        self._stack = [OTHER]
        self._devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
        self._events: list[tuple[str, Any]] = []  # phases in turn, each with the event at its end

    def __enter__(self) -> PhaseClock:
        global _clock
        if _clock is not None:
            raise RuntimeError("another PhaseClock is open")
        _clock = self
        for device in self._devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.perf_counter()
        self._mark()
        return self

    def __exit__(self, *_: object) -> None:
        global _clock
        self._book()
        self._settle()
        _clock = None

    @property
    def total(self) -> float:
        """Seconds of all phases together."""
        return sum(self.seconds.values())

    def _mark(self) -> None:
        """Put an event where the accelerator will come to it."""
        if len(self._devices) == 1:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((self._stack[-1], event))

    def _settle(self) -> None:
        """Turn events into seconds; the last one begins the next phase."""
        if not self._events:
            return
        self._events[-1][1].synchronize()
        for (_, start), (name, stop) in pairwise(self._events):
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(stop) / 1e3
        del self._events[:-1]

    def _book(self) -> None:
        """Put what passed since the last change on the account of the phase that ran."""
        name = self._stack[-1]
        self.seconds.setdefault(name, 0.0)
        if len(self._devices) == 1:
            self._mark()
            if len(self._events) > MOST_EVENTS:
                self._settle()
        else:
            for device in self._devices:
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            self.seconds[name] += now - self._last
            self._last = now
        if self._devices:
            held = sum(_peak_bytes(device) for device in self._devices)
            self.peak[name] = max(self.peak.get(name, 0), held)
            for device in self._devices:
                torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """The time until the context closes is that of `name`, less the phases inside it."""
        self._book()
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()


def _peak_bytes(device: int) -> int:
    """What `torch.cuda.max_memory_allocated` gives, without sorting all statistics of the allocator first: at a phase every
    100 us that would be a quarter of the time that is measured."""
    return torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]


def note(name: str, value: str) -> None:
    """Tell a `PhaseClock` that may be open what was chosen."""
    if _clock is not None:
        _clock.notes.setdefault(name, []).append(value)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what runs in this context, for a `PhaseClock` that may be open."""
    if _clock is None:
        yield
        return
    with _clock.measure(name):
        yield
