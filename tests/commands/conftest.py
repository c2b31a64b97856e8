# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The command line inside the test's own process: what it prints and how it ends."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from optimum_ssm.__main__ import main


@dataclass
class Ended:
    """How a command ended, as a shell sees it."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """The one line on stderr that an expected error consists of."""
        assert self.code == 1, f"ended with {self.code}: {self.out}{self.err}"
        lines = [line for line in self.err.splitlines() if line and "it/s]" not in line and "?it/s" not in line]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0] and "Traceback" not in self.err, self.err
        return errors[0]


@pytest.fixture
def ssm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Ended]:
    """`ssm("prune", model, ...)`: run a command."""

    def run(*args: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["optimum-ssm", *map(str, args)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        if isinstance(code, str):  # the interpreter would print it and exit with 1
            code, err = 1, f"{err}{code}\n"
        return Ended(code or 0, out, err)

    return run


@pytest.fixture
def tiny_dir(tiny_mamba: PreTrainedModel, tmp_path: Path) -> Path:
    """A tiny random model on disk, without a tokenizer."""
    tiny_mamba.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def calibration(assets: Path) -> list[object]:
    """Flags of a tiny calibration on the text beside the examples."""
    return ["--dataset", assets / "wikitext-2" / "calibration.txt", "--num-samples", 2, "--seq-len", 32]
