# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The examples that time the scan run from end to end, at sizes that say nothing about speed."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging


@pytest.fixture
def as_it_was() -> Iterator[None]:
    """The examples are scripts: they silence transformers and set threads and seed."""
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    yield
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "script, options, cases",
    [
        ("benchmark_block.py", [], ["transformers' fallback", "torch", "torch + decay_error"]),
        ("benchmark_scan.py", ["--device", "cpu"], ["torch + every sum", "every state kept + state_prev, decay_sum"]),
    ],
)
def test_the_scan_is_timed(
    assets: Path,
    as_it_was: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    script: str,
    options: list[str],
    cases: list[str],
) -> None:
    examples = assets.parent
    sizes = ["--width", "16", "--tokens", "12", "--rounds", "1"]
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setattr(sys, "argv", [script, *sizes, *options])
    runpy.run_path(str(examples / script), run_name="__main__")
    lines = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert set(cases) <= set(lines)
