# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm benchmark`: two checkpoints on disk to a table, JSON, CSV and a picture; and the example that needs none."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread

from .conftest import Ended


ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--batch-sizes", 1, 2, "--prompt-length", 8, "--new-tokens", 2, "--repeats", 2, "--dtype", "float32"]


@pytest.fixture
def smaller_dir(make_tiny_model: Callable, tmp_path: Path) -> Path:
    """The model of `tiny_dir` with half of its states."""
    make_tiny_model("mamba", state_size=4).save_pretrained(tmp_path / "smaller")
    return tmp_path / "smaller"


def test_the_table_and_the_files(ssm: Callable[..., Ended], tiny_dir: Path, smaller_dir: Path, tmp_path: Path) -> None:
    ended = ssm("benchmark", tiny_dir, smaller_dir, *QUICK, "--device", "cpu", "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    table, _, last = ended.out.rstrip("\n").rpartition("\n")
    assert last == f"saved to {tmp_path / 'out'}"
    assert (tmp_path / "out" / "benchmark.md").read_text() == table + "\n"
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert [(row["phase"], row["batch_size"], row["model"]) for row in found["rows"]] == [
        (phase, size, name) for phase in ("prefill", "decode") for size in (1, 2) for name in ("./tiny", "./smaller")
    ]
    assert all(len(row["seconds"]) == 2 and row["tokens_per_second"] > 0 for row in found["rows"])
    assert found["settings"] | {"prompt_length": 8, "new_tokens": 2, "repeats": 2} == found["settings"]
    files = [(folder / "model.safetensors").stat().st_size for folder in (tiny_dir, smaller_dir)]
    assert [model["weight_bytes"] for model in found["models"]] == files
    assert [model["recurrent_state_bytes"] for model in found["models"]] == [4096, 2048]
    assert len((tmp_path / "out" / "benchmark.csv").read_text().splitlines()) == 9
    assert imread(tmp_path / "out" / "benchmark.png").std() > 0.05
    assert "prefill, batch 2, ./smaller: " in ended.err


def test_flags_reach_the_measurement(ssm: Callable[..., Ended], tiny_dir: Path, smaller_dir: Path) -> None:
    flags = ["--phases", "decode", "--scan", "transformers", "--no-cuda-graph"]
    ended = ssm("benchmark", tiny_dir, smaller_dir, smaller_dir, *QUICK, *flags)
    assert ended.code == 0, ended.err
    assert "| prefill" not in ended.out and "Decode: eager." in ended.out and ", float32, " in ended.out
    assert "Scan: torch fallback of transformers." in ended.out
    assert ended.out.count("./smaller (3) |") == 3, "a model given twice has two names"


@pytest.mark.parametrize("flags, message", [
    (["--batch-sizes", 0], "batch_sizes must be whole numbers of at least 1"),
    (["--prompt-length", 0], "prompt=0 must be at least 1 token"),
    (["--repeats", 0], "repeats must be"),
    (["--scan", "fast"], "scan='fast' is not one of auto, library, transformers"),
    (["--phases", "train"], "must be some of prefill, decode"),
    (["--device", "tpu0"], "device 'tpu0'"),
    (["-o", "{tmp}/tiny"], "is not empty"),
    (["-o", "{tmp}/tiny/config.json"], "is a file"),
])  # fmt: skip
def test_errors_are_one_line(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, flags: list, message: str
) -> None:
    given = [str(flag).format(tmp=tmp_path) for flag in flags]
    assert message in ssm("benchmark", tiny_dir, tiny_dir, "--device", "cpu", *given).error()


def test_a_missing_directory_is_found_before_the_other_is_loaded(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path
) -> None:
    (tiny_dir / "model.safetensors").write_bytes(b"not loaded")
    error = ssm("benchmark", tiny_dir, tmp_path / "nowhere", *QUICK).error()
    assert "nowhere" in error and "tiny " not in error


@pytest.mark.slow
def test_the_example_cuts_and_measures(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "benchmark_shapes.py", "--shape", "mamba2-130m", "--layers", 1]
    command += ["--pruned", "state=half,head=16", "--batch-sizes", 1, "--prompt-length", 8, "--new-tokens", 1]
    command += ["--repeats", 1, "--device", "cpu", "-o", tmp_path]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())
    states = [model["recurrent_state_bytes"] for model in found["models"]]
    assert states == [24 * 64 * 128 * 4, 16 * 64 * 64 * 4] and len(found["rows"]) == 4
