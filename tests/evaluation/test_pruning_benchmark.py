# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Bounds count what a pass computes; tables say what was measured."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from optimum_ssm import SSMPrunerConfig
from optimum_ssm.evaluation.pruning_benchmark import PruningTimes, growth_table, time_pruning
from optimum_ssm.evaluation.pruning_bounds import Cost, Rates, pass_bounds
from optimum_ssm.families import family_of
from optimum_ssm.passes.plan import make_plan


TEN = Rates(10.0, 10.0, 10.0, 10.0, 10.0)


def bounds(model: PreTrainedModel, ids: Tensor, place: str = "device", **options: object) -> dict[str, Cost]:
    config = SSMPrunerConfig(**{"method": "sparsegpt", "sparsity": 0.5, "dataset": ids, "seq_len": 24, **options})
    family = family_of(model)
    return pass_bounds(model, family, make_plan(model, family, config), ids.numel(), place)


def products(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if str(operation) in ("aten.mm", "aten.addmm"))


def test_products_of_the_forward_are_those_that_torch_counts(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    ids = token_ids(3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        either_tiny_model.base_model(ids, use_cache=False)
    expected = products(counter)
    found = bounds(either_tiny_model, ids)
    assert found["forward"].matmul == found["replay"].matmul == expected


def test_gram_matrices_are_counted_once_per_site(
    tiny_mamba2: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    ids = token_ids(3)
    tokens = ids.numel()
    whole = bounds(tiny_mamba2, ids, targets=["in_proj", "out_proj"])
    parts = bounds(tiny_mamba2, ids, targets=["in_proj.z", "in_proj.B", "in_proj.dt", "out_proj"])
    assert whole["statistics"].matmul == parts["statistics"].matmul == 2 * 2 * tokens * (32**2 + 64**2)
    assert whole["solve"].double == parts["solve"].double == pytest.approx(2 * 2 / 3 * (32**3 + 64**3))
    assert whole["solve"].exact == 2 * (168 * 32**2 + 32 * 64**2)
    assert parts["solve"].exact == 2 * ((64 + 16 + 8) * 32**2 + 32 * 64**2)


def test_a_planning_pass_and_another_place_cost_more(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    ids = token_ids(3)
    plain = bounds(tiny_mamba, ids, method="wanda")
    planned = bounds(tiny_mamba, ids, place="cpu", method="wanda", allocation="owl")
    assert planned["forward"].matmul == 2 * plain["forward"].matmul
    assert planned["replay"].matmul == plain["replay"].matmul
    stream = ids.numel() * 32 * 4
    assert "activations" not in plain and planned["activations"].link == 2 * (2 + 2 + 3) * stream


def test_a_pass_without_text_reads_and_writes_weights_alone(tiny_mamba: PreTrainedModel) -> None:
    family = family_of(tiny_mamba)
    plan = make_plan(tiny_mamba, family, SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["out_proj"]))
    assert pass_bounds(tiny_mamba, family, plan, 0, "device") == {"solve": Cost(bytes=2 * 2 * 32 * 64 * 4)}


def test_seconds_are_parts_over_rates() -> None:
    rates = Rates(matmul=1.0, exact=2.0, double=4.0, bandwidth=8.0, link=16.0)
    cost = Cost()
    cost.add(matmul=1, exact=1, times=2)
    cost.add(double=2, bytes=2, link=2)
    assert cost.seconds(rates) == 2 + 1 + 0.5 + 0.25 + 0.125


def test_a_run_is_measured_and_told(tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]) -> None:
    recipe = [
        SSMPrunerConfig(method="wanda", sparsity=0.5, batch_size=2, offload="disk"),
        SSMPrunerConfig(method="magnitude", sparsity=0.6),
    ]
    times = time_pruning(tiny_mamba, recipe, token_ids(), TEN)
    assert times.tokens == 96 and times.places == ["disk"]
    assert times.weights == sum(parameter.nbytes for parameter in tiny_mamba.parameters())
    assert (tiny_mamba.base_model.layers[0].mixer.out_proj.weight == 0).float().mean() == pytest.approx(0.6, abs=1e-3)
    table = times.table()
    assert "| statistics |" in table and "| activations |" in table and "kept on: disk" in table
    assert times.bounds.keys() <= times.seconds.keys()


def test_growth_is_told_against_the_first_run() -> None:
    one = PruningTimes({"solve": 2.0}, {}, {"solve": 30}, 10, 30)
    two = PruningTimes({"solve": 4.0}, {}, {"solve": 50}, 10, 50)
    lines = growth_table([("first", 100, 2, 8, one), ("tokens x 2", 200, 2, 8, two)]).splitlines()
    assert lines[2].split("|")[5:7] == [" 2.00 ", " 1.00 "] and lines[2].split("|")[9] == " 1.00 "
    assert lines[3].split("|")[5:8] == [" 4.00 ", " 2.00 ", " 10000.00 "] and lines[3].split("|")[9] == " 2.00 "


@pytest.mark.parametrize("options, message", [
    (["--method", "nope"], "error: unknown method 'nope'. Allowed: admm_grad, "),
    (["--sparsity", "2"], "error: sparsity=2.0 must lie in"),
    (["--recipe", "nope"], "error: "),
])  # fmt: skip
def test_what_the_example_does_not_know_is_said_in_one_line_before_anything_is_measured(
    assets: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.syspath_prepend(assets.parent)
    monkeypatch.setattr(sys, "argv", ["benchmark_pruning.py", "--shape", "mamba-130m", *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(assets.parent / "benchmark_pruning.py"), run_name="__main__")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and not said.out
    assert said.err.startswith(message) and said.err.count("\n") == 1
