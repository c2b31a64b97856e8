# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Phases add up to the whole, inner ones are taken out of outer ones, and nothing is counted when nobody asks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration import timing
from optimum_ssm.calibration.timing import OTHER, PhaseClock, note, phase


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that goes on only when told, which a GPU's own would not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def test_inner_phases_are_not_counted_twice(ticks: Callable[[float], None]) -> None:
    with PhaseClock() as clock:
        ticks(1)
        with phase("forward"):
            ticks(2)
            with phase("statistics"):
                ticks(4)
            ticks(8)
            with pytest.raises(KeyError), phase("scan"):
                ticks(16)
                raise KeyError
        note("place", "disk")
        ticks(32)
    assert clock.seconds == {OTHER: 33, "forward": 10, "statistics": 4, "scan": 16}
    assert clock.total == 63 and clock.notes == {"place": ["disk"]}


def test_without_a_clock_a_phase_is_nothing() -> None:
    with phase("forward"):
        note("place", "disk")
    with PhaseClock() as clock:
        pass
    assert set(clock.seconds) == {OTHER} and not clock.notes
    with PhaseClock(), pytest.raises(RuntimeError, match="another PhaseClock is open"), PhaseClock():
        pass
    with PhaseClock():
        pass


def test_a_pass_goes_through_its_phases(tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]) -> None:
    config = SSMPrunerConfig(
        method="wanda", sparsity=0.5, dataset=token_ids(), seq_len=24, offload="disk", reconstruction_epochs=1
    )
    with PhaseClock() as clock:
        SSMPruner(tiny_mamba).prune(config)
    expected = {"embedding", "forward", "scan", "statistics", "solve", "reconstruction", "replay", "activations"}
    assert expected <= set(clock.seconds) and clock.notes["place"] == ["disk"]
    assert all(seconds > 0 for seconds in clock.seconds.values())
