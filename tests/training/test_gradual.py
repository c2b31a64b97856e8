# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning under a real Trainer: along the schedule, exact at the end, resumed in the middle, on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_ssm import CheckpointError, ConfigurationError, PruningReport, SSMPruner, SSMPrunerConfig
from optimum_ssm.sparsity.selection import round_half_up
from optimum_ssm.training import GradualPruningCallback
from optimum_ssm.training.state import STATE_FILE

from .runs import train


TARGETS = ["in_proj", "conv1d", "out_proj", "A_log"]
SCHEDULE = {"begin_step": 2, "end_step": 10, "update_every": 3}
STEPS = 12


def config(**changes):
    return SSMPrunerConfig(
        **{"method": "gradient_magnitude", "sparsity": 0.7, "targets": TARGETS, "a_log_fill": "memoryless", **changes}
    )


def gradual(model, schedule=SCHEDULE, **changes):
    return GradualPruningCallback(SSMPruner(model), config(**changes), **schedule)


class Watcher(TrainerCallback):
    """What the targets look like after every optimiser step."""

    def __init__(self, callback):
        self.callback, self.sparsities, self.masks, self.batches = callback, [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        masks = self.callback.masks
        held = sum(masks.holding(name) for name in masks.masks)
        assert held == sum(int(mask.sum()) for mask in masks.masks.values())
        self.sparsities.append(self.callback.sparsity)
        self.batches.append(self.callback.threshold.batches)
        self.masks.append({name: mask.clone() for name, mask in masks.masks.items()})


@pytest.mark.parametrize("method", ["gradient_magnitude", "magnitude"])
def test_follows_the_schedule_to_the_entry_and_never_gives_back(either_tiny_model, tmp_path, method):
    callback = gradual(either_tiny_model, method=method)
    watcher = Watcher(callback)
    train(either_tiny_model, tmp_path, [callback, watcher], max_steps=STEPS)
    size, counts, level = callback.threshold.size, [], 0
    for step in range(1, STEPS + 1):
        if callback.schedule.updates(step):
            level = round_half_up(callback.schedule.sparsity(step) * size)
        counts.append(level)
    assert [round(sparsity * size) for sparsity in watcher.sparsities] == counts
    assert counts[-1] == counts[9] == round_half_up(0.7 * size)
    assert len(set(counts)) == 4  # 0 until step 4, then at 5, 8 and 10
    # gradients since the last update, none once the schedule is over
    needed = method == "gradient_magnitude"
    assert watcher.batches == ([1, 0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 0] if needed else [0] * STEPS)
    for before, after in zip(watcher.masks, watcher.masks[1:]):
        assert all((after[name] >= before[name]).all() for name in before)


def test_a_finished_run_is_what_the_pruner_reports_and_saves(either_tiny_model, tmp_path):
    callback = gradual(either_tiny_model)
    pruner = callback.pruner
    train(either_tiny_model, tmp_path / "run", [callback], max_steps=STEPS)
    with pytest.raises(CheckpointError, match=r"finish\(\) was not called"):
        pruner.save_pretrained(tmp_path / "sparse")
    callback.finish()
    callback.finish()  # once is enough, twice does no harm
    pruner.save_pretrained(tmp_path / "sparse")
    promised = round_half_up(0.7 * callback.threshold.size)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    removed = 0
    for name in callback.threshold.names:
        value = loaded.get_parameter(name)
        removed += int((value == (38.0 if name.endswith("A_log") else 0.0)).sum())
    assert removed == promised == pruner.report.pruned == sum(int(mask.sum()) for mask in pruner.masks.values())
    for report in (pruner.report, PruningReport.from_json((tmp_path / "sparse" / "report.json").read_text())):
        assert len(report.passes) == 1
        recorded = report.passes[0].config
        assert (recorded["method"], recorded["scope"], recorded["sparsity"]) == ("gradient_magnitude", "global", 0.7)
        assert recorded["schedule"] == {
            "final": 0.7, "end_step": 10, "begin_step": 2, "initial": 0.0, "update_every": 3, "shape": "cubic"
        }  # fmt: skip
    again = SSMPruner.from_pretrained(tmp_path / "sparse")
    assert again._done[0].method == "gradient_magnitude"
    for name, mask in pruner.masks.items():
        assert torch.equal(again.masks[name], mask)


def test_masks_survive_bf16_autocast_and_a_segment_leaves_the_others_alone(either_tiny_model, tmp_path):
    callback = gradual(either_tiny_model, targets=["in_proj.x", "A_log"])
    watcher = Watcher(callback)
    train(either_tiny_model, tmp_path, [callback, watcher], max_steps=STEPS, bf16=True)
    callback.finish()
    for row in callback.pruner.report.rows:
        gone = {name: count for name, (_, count) in row.segments.items() if count}
        assert gone.keys() <= {"x"}
        assert row.component in ("in_proj", "A_log") or not row.pruned


def test_what_was_removed_before_stays_and_counts(tiny_mamba, tmp_path):
    pruner = SSMPruner(tiny_mamba)
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.3, targets=["in_proj", "x_proj"]))
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    callback = GradualPruningCallback(pruner, config(targets=["in_proj", "out_proj"]), **SCHEDULE)
    train(tiny_mamba, tmp_path, [callback], max_steps=STEPS)
    callback.finish()
    assert callback.threshold.removed == round_half_up(0.7 * callback.threshold.size)
    for name, mask in before.items():
        assert (pruner.masks[name] >= mask).all()
        assert (tiny_mamba.get_parameter(name)[pruner.masks[name]] == 0).all()
    assert all(torch.equal(before[n], pruner.masks[n]) for n in before if "x_proj" in n)
    assert [done.config["method"] for done in pruner.report.passes] == ["magnitude", "gradient_magnitude"]


def test_one_shot_jumps_and_stays(tiny_mamba, tmp_path):
    callback = gradual(tiny_mamba, {"begin_step": 3, "end_step": 10, "update_every": 2, "shape": "one-shot"})
    watcher = Watcher(callback)
    train(tiny_mamba, tmp_path, [callback, watcher], max_steps=STEPS)
    assert [round(value, 3) for value in watcher.sparsities] == [0.0, 0.0] + [0.7] * 10
    assert all(torch.equal(watcher.masks[2][name], watcher.masks[-1][name]) for name in watcher.masks[2])


@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(make_tiny_model, tmp_path, stop):
    """Stopped in the middle of the schedule and between two updates: sums, masks and moments must all come back."""
    saving = {"save_strategy": "steps", "save_steps": stop, "max_steps": STEPS}
    whole = gradual(make_tiny_model("mamba"))
    train(whole.pruner.model, tmp_path, [whole], **saving)
    with safe_open(tmp_path / f"checkpoint-{stop}" / STATE_FILE, "pt") as file:
        assert {"sum." + name for name in whole.threshold.names} <= set(file.keys())
    resumed = gradual(make_tiny_model("mamba", seed=5))  # its weights come from the checkpoint
    train(resumed.pruner.model, tmp_path, [resumed], resume=tmp_path / f"checkpoint-{stop}", **saving)
    for name, value in whole.pruner.model.state_dict().items():
        assert torch.equal(resumed.pruner.model.state_dict()[name], value), name
    for name, mask in whole.masks.masks.items():
        assert torch.equal(resumed.masks.masks[name], mask), name
    resumed.finish()
    assert resumed.pruner.report.pruned == round_half_up(0.7 * whole.threshold.size)


def test_a_checkpoint_elsewhere_is_named_and_a_foreign_one_refused(make_tiny_model, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6, "max_steps": STEPS}
    for seed, folder in enumerate(("first", "second")):
        model = make_tiny_model("mamba", seed=seed)
        train(model, tmp_path / folder, [gradual(model)], **saving)
    first = tmp_path / "first" / "checkpoint-6"

    def resume(folder, resume_from=None, **changes):
        model = make_tiny_model("mamba")
        callback = GradualPruningCallback(SSMPruner(model), config(**changes), resume_from=resume_from, **SCHEDULE)
        train(model, tmp_path / folder, [callback], resume=first, **saving)
        return callback

    with pytest.raises(CheckpointError, match=STATE_FILE):
        resume("third")
    assert resume("third", resume_from=first).sparsity == pytest.approx(0.7, abs=1e-4)
    with pytest.raises(CheckpointError, match="does not belong to the loaded weights"):
        resume("second")
    with pytest.raises(CheckpointError, match="method=gradient_magnitude, not magnitude"):
        resume("first", method="magnitude")
    with pytest.raises(CheckpointError, match="schedule="):
        resume("first", sparsity=0.8)
    with pytest.raises(CheckpointError, match="of step 12, not of step 6"):
        resume("third", resume_from=tmp_path / "first" / "checkpoint-12")


def test_a_state_that_cannot_be_written_leaves_nothing_behind(tiny_mamba, tmp_path, monkeypatch):
    def fail(*args):
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("optimum_ssm.training.state.save_file", fail)
    with pytest.raises(CheckpointError, match="no space left"):
        train(tiny_mamba, tmp_path, [gradual(tiny_mamba)], save_strategy="steps", save_steps=2, max_steps=STEPS)
    assert not [path for path in (tmp_path / "checkpoint-2").iterdir() if STATE_FILE in path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "wanda", "targets": None}, "method='wanda' .* gradient_magnitude, magnitude"),
        ({"scope": "row"}, "scope='row'. Allowed: None, global"),
        ({"method": "magnitude", "allocation": "owl"}, "allocation='owl'"),
        ({"method": "magnitude", "pattern": "2:4", "sparsity": None}, "pattern='2:4'"),
        ({"targets": ["in_prog"]}, "Did you mean 'in_proj'"),
        ({"reconstruction_epochs": 1}, "reconstruction_epochs"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tiny_mamba, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        gradual(tiny_mamba, **changes)


def test_a_run_that_does_not_fit_is_refused_before_it_starts(tiny_mamba, make_tiny_model, tmp_path):
    before = {name: value.clone() for name, value in tiny_mamba.state_dict().items()}
    with pytest.raises(ConfigurationError, match="end_step=10, but training at max_steps=5"):
        train(tiny_mamba, tmp_path, [gradual(tiny_mamba)], max_steps=5)
    best = {"load_best_model_at_end": True, "save_strategy": "no", "eval_strategy": "no"}
    with pytest.raises(ConfigurationError, match="load_best_model_at_end"):
        train(tiny_mamba, tmp_path, [gradual(tiny_mamba)], max_steps=STEPS, **best)
    with pytest.raises(ConfigurationError, match="than the pruner's"):
        train(tiny_mamba, tmp_path, [gradual(make_tiny_model("mamba"))], max_steps=STEPS)
    tiny_mamba.backbone.layers[1].mixer.out_proj.weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="layers.1.mixer.out_proj.weight .* frozen"):
        train(tiny_mamba, tmp_path, [gradual(tiny_mamba)], max_steps=STEPS)
    assert all(torch.equal(value, before[name]) for name, value in tiny_mamba.state_dict().items())
    with pytest.raises(CheckpointError, match="ended before the schedule did: 0 entries"):
        gradual(tiny_mamba).finish()


def test_more_removed_than_the_goal_is_refused(tiny_mamba):
    pruner = SSMPruner(tiny_mamba)
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.8, targets=["in_proj"]))
    with pytest.raises(ConfigurationError, match="sparsity=0.7 removes .* are removed already"):
        GradualPruningCallback(pruner, config(targets=["in_proj"]), **SCHEDULE)


def test_a_log_with_another_fill_is_refused(tiny_mamba):
    pruner = SSMPruner(tiny_mamba)
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.2, targets=["A_log"], a_log_fill="zero"))
    with pytest.raises(ConfigurationError, match="A_log: removed entries hold no 38"):
        GradualPruningCallback(pruner, config(), **SCHEDULE)


def test_two_ranks_end_with_the_same_masks(tmp_path):
    """Scores from gradients that were not reduced over the ranks would differ: the ranks see different rows.

    In bf16 autocast and with accumulated gradients, as everywhere in these runs.
    """
    script = Path(__file__).parent / "two_ranks.py"
    # `accelerate launch --cpu` starts several processes under MPI only
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["gradient"] != ranks[1]["gradient"]  # before the reduction they did differ
    assert ranks[0]["masks"].keys() == ranks[1]["masks"].keys()
    for name, mask in ranks[0]["masks"].items():
        assert torch.equal(mask, ranks[1]["masks"][name]), name
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
    assert sum(int(mask.sum()) for mask in ranks[0]["masks"].values()) == ranks[0]["promised"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(saved.get_parameter(name), weight), name
