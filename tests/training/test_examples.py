# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The training examples run from end to end, in a few steps."""

import math
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM


def run(root, script, *options):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(root / "examples" / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def root(assets):
    return assets.parents[1]


@pytest.mark.slow
def test_gradual_pruning_goes_on_from_a_checkpoint_and_beats_pruning_at_once(root, tmp_path):
    options = ["--use_cpu", "--disable_tqdm", "True", "--max_steps", 60, "--seq_len", 128, "--update_every", 4]
    options += ["--save_strategy", "steps", "--save_steps", 25, "--output_dir", tmp_path / "run", "--max_windows", 4]
    options += ["--window", 512, "--sparse_dir", tmp_path / "sparse"]
    printed = run(root, "gradual_pruning.py", *options, "--compare", "--distill", "0.5")
    last = [line.rsplit(maxsplit=1) for line in printed.splitlines() if line.startswith("  ")][-5:]
    found = {name.strip(): float(value) for name, value in last}
    assert found["dense"] < found["gradual (cubic)"] < 0.8 * found["one-shot, not trained"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    names = ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    targets = [value for name, value in model.named_parameters() if name.endswith(names)]
    assert "as promised" in printed
    total = sum(value.numel() for value in targets)
    assert sum(int((value == 0).sum()) for value in targets) == math.floor(0.7 * total + 0.5)
    again = run(root, "gradual_pruning.py", *options, "--distill", "0.5", "--resume")  # from step 50, then the same
    assert [line for line in again.splitlines() if line.startswith("  gradual")] == [
        line for line in printed.splitlines() if line.startswith("  gradual")
    ]


@pytest.mark.slow
def test_a_forecaster_is_pruned_by_every_way(root, tmp_path):
    rows = ["date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT"]
    for hour in range(20 * 30 * 24):
        values = (math.sin(2 * math.pi * hour / 24 + channel) + 0.1 * ((hour * 7919) % 13) for channel in range(7))
        rows.append(",".join(["x", *(f"{value:.4f}" for value in values)]))
    (tmp_path / "ETTh1.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    options = [
        "--data",
        tmp_path / "ETTh1.csv",
        "--past",
        32,
        "--horizon",
        8,
        "--hidden",
        16,
        "--layers",
        1,
        "--quiet",
    ]
    options += [
        "--steps",
        40,
        "--tune-steps",
        24,
        "--sparsities",
        0.7,
        "--device",
        "cpu",
        "--output",
        tmp_path / "saved",
    ]
    printed = run(root, "prune_forecaster.py", *options)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:]
    assert rows == ["dense", "dense, trained as long", "one-shot", "one-shot + training", "gradual"]
    assert (tmp_path / "saved" / "model.safetensors").is_file()
