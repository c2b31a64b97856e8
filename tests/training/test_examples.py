# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The training examples run from end to end, in a few steps."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def run(root, script, *options, launcher=(), **variables):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    command = [sys.executable, *launcher, str(root / "examples" / script), *map(str, options)]
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
def test_gradual_pruning_on_two_processes_goes_on_in_the_middle_and_ends_with_the_same_bits(root, tmp_path):
    """`accelerate launch` with bf16 autocast and accumulated gradients; the checkpoint lies between two updates."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = ["--use_cpu", "--bf16", "--disable_tqdm", "True", "--seq_len", 32, "--max_windows", 1, "--window", 64]
    options += ["--max_steps", 14, "--begin_step", 2, "--end_step", 12, "--update_every", 2]
    options += ["--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    options += ["--save_strategy", "steps", "--save_steps", 5, "--output_dir", tmp_path / "run"]

    def launched(name, *more):
        folder = tmp_path / name
        # without a GPU it is this variable that makes `--multi_gpu` several processes with gloo
        said = run(root, "gradual_pruning.py", *options, "--sparse_dir", folder, *more, launcher=launcher,
                   ACCELERATE_USE_CPU="true")  # fmt: skip
        assert said.count("as promised") == 1, "one process speaks"
        return load_file(folder / "model.safetensors")

    whole = launched("whole")
    assert (tmp_path / "run" / "checkpoint-5" / "rng_state_1.pth").exists(), "there were two processes"
    for later in ("checkpoint-10", "checkpoint-14"):
        shutil.rmtree(tmp_path / "run" / later)
    resumed = launched("resumed", "--resume")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


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
