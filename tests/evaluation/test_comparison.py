# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every cell of a comparison is what pruning a fresh model gives; impossible cells say why; nothing is left behind."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import CalibrationError, ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.evaluation import compare, evaluate_perplexity
from optimum_ssm.evaluation.comparison_cells import method_settings
from optimum_ssm.evaluation.comparison_table import Comparison, ComparisonRow, rows_from_csv
from optimum_ssm.families import family_of
from optimum_ssm.families.matching import declared_targets


CALIBRATION = {"dataset": torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1)), "seq_len": 24}
TEXT = torch.randint(0, 64, (96,), generator=torch.Generator().manual_seed(2))
EVALUATION = {"dataset": TEXT, "window": 24}


def run(model: PreTrainedModel, *args: object, **kwargs: object) -> Comparison:
    return compare(model, None, *args, calibration=CALIBRATION, evaluation=EVALUATION, **kwargs)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def row(comparison: Comparison, *key: str) -> ComparisonRow:
    (found,) = [row for row in comparison.rows if row.key[: len(key)] == key]
    return found


@pytest.mark.parametrize("spec, fields", [
    ("magnitude", {"method": "magnitude"}),
    ("sparsegpt:reconstruction_epochs=1", {"method": "sparsegpt", "reconstruction_epochs": 1}),
    ("sparsessm:allocation=uniform", {"method": "sparsessm", "allocation": "uniform"}),
    ("wanda:scope=tensor,allocation=owl,allocation_kwargs.threshold=3",
     {"method": "wanda", "scope": "tensor", "allocation": "owl", "allocation_kwargs": {"threshold": 3}}),
])  # fmt: skip
def test_a_cell_is_what_a_fresh_model_gives(tiny_mamba: PreTrainedModel, spec: str, fields: dict) -> None:
    """Also after cells of another method, and after one whose reconstruction moved norms and biases."""
    found = run(tiny_mamba, ["alps:reconstruction_epochs=1", spec], ["0.5", "0.75"], ["in_proj", "x_proj,out_proj"])
    assert [r.status for r in found.rows] == ["measured"] * 8
    for budget, component in (("0.5", "in_proj"), ("0.75", "x_proj,out_proj")):
        model = copy.deepcopy(tiny_mamba)
        targets = component.split(",")
        config = SSMPrunerConfig(sparsity=float(budget), targets=targets, **CALIBRATION, **fields)
        report = SSMPruner(model, None, config).prune()
        cell = row(found, spec, budget, component)
        assert cell.perplexity == evaluate_perplexity(model, TEXT, window=24)
        assert (cell.removed, cell.of_model, cell.a_log_fill) == (report.pruned, report.sparsity, "-")
        assert cell.dense == evaluate_perplexity(tiny_mamba, TEXT, window=24)
        assert cell.removed == float(budget) * cell.entries and cell.seconds > 0


def test_the_model_is_as_it_was_also_when_a_callback_raises(tiny_mamba: PreTrainedModel) -> None:
    before = weights_of(tiny_mamba)
    tiny_mamba.train()
    run(tiny_mamba, ["sparsegpt:reconstruction_epochs=1"], ["0.5"], ["all", "conv1d"])

    def stop(table: Comparison) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(tiny_mamba, ["magnitude"], ["0.5"], on_row=stop)
    assert tiny_mamba.training
    for name, value in tiny_mamba.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_by_default_every_weight_alone_and_all_together(either_tiny_model: PreTrainedModel) -> None:
    found = run(either_tiny_model, ["magnitude"], ["0.5"])
    names = [r.component for r in found.rows]
    declared = dict.fromkeys(t.name for t in declared_targets(family_of(either_tiny_model), either_tiny_model))
    assert names == [*declared, "all"] and {"in_proj", "conv1d", "A_log", "out_proj"} < set(names)
    assert row(found, "magnitude", "0.5", "A_log").a_log_fill == "zero"  # what |A_log| estimates


def test_impossible_cells_are_rows_with_the_reason(tiny_mamba: PreTrainedModel) -> None:
    cells = (["sparsegpt", "wanda:scope=tensor"], ["0.5", "2:4"], ["A_log", "dt_proj", "all"])
    found = run(tiny_mamba, *cells, a_log_fill=["memoryless", "zero"])
    assert len(found.rows) == 12
    refused = row(found, "sparsegpt", "0.5", "A_log")
    assert refused.status == "impossible" and refused.perplexity is None and "cannot prune A_log" in refused.reason
    assert refused.a_log_fill == "-", "there is no A_log to fill"
    unfit = row(found, "sparsegpt", "2:4", "dt_proj")  # the rank of 6 is no multiple of 4
    assert unfit.status == "impossible" and "rows of 6 weights do not split into groups of 4" in unfit.reason
    partly = row(found, "sparsegpt", "2:4", "all")
    assert partly.status == "measured"
    assert partly.reason == "2 dt_proj kept: rows of 6 weights do not split into groups of 4"
    against = row(found, "wanda:scope=tensor", "2:4", "all")
    assert against.status == "impossible" and "contradicts pattern='2:4'" in against.reason
    text = found.to_markdown()
    assert "A_log at 50 %, 2:4: method 'sparsegpt' cannot prune A_log" in text
    assert sum(row.status == "impossible" for row in found.rows) == 7 < text.count("| impossible |")


def test_a_cell_that_breaks_off_is_a_failed_row_and_the_next_one_is_unharmed(tiny_mamba: PreTrainedModel) -> None:
    """A decay rate of 0 is a usable model, but its logarithm is no number to prune by."""
    tiny_mamba.base_model.layers[1].mixer.A_log.data[0, 0] = -torch.inf
    found = run(tiny_mamba, ["magnitude"], ["0.5"], ["A_log", "in_proj"])
    failed, measured = found.rows
    assert failed.status == "failed" and failed.perplexity is None and "non-finite values" in failed.reason
    assert measured.perplexity == row(run(tiny_mamba, ["magnitude"], ["0.5"], ["in_proj"]), "magnitude").perplexity
    tiny_mamba.base_model.layers[0].mixer.in_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="logits that are not finite"):  # the dense model itself is unusable
        run(tiny_mamba, ["magnitude"], ["0.5"], ["out_proj"])


def test_fills_apart_only_where_a_log_is_selected(tiny_mamba: PreTrainedModel) -> None:
    fills = ["memoryless", "zero"]
    found = run(tiny_mamba, ["magnitude:largest", "sparsessm"], ["0.5"], ["A_log", "in_proj"], a_log_fill=fills)
    assert [r.key for r in found.rows] == [
        (method, "0.5", component, fill)
        for method in ("magnitude:largest", "sparsessm")
        for component, fill in (("A_log", "memoryless"), ("A_log", "zero"), ("in_proj", "-"))
    ]
    a, b = (row(found, "sparsessm", "0.5", "A_log", fill) for fill in fills)
    assert a.perplexity != b.perplexity
    matching = run(tiny_mamba, ["sparsessm:v1", "sparsessm:v2"], ["0.5"], ["A_log"])
    assert [r.a_log_fill for r in matching.rows] == ["zero", "memoryless"]


@pytest.mark.parametrize("args, message", [
    ((["wnda"], ["0.5"]), "unknown method 'wnda'. Did you mean 'wanda'?"),
    ((["state_energy"], ["0.5"]), "method 'state_energy' removes whole units, and a comparison is of masks. Allowed: admm"),
    ((["wanda:alocation=owl"], ["0.5"]), "unknown option of 'wanda:alocation=owl': 'alocation'. Did you mean 'allocation'?"),
    ((["wanda:targets=x"], ["0.5"]), "unknown option of 'wanda:targets=x': 'targets'"),
    ((["sparsessm:v9"], ["0.5"]), "'v9'"),
    ((["magnitude"], ["1.5"]), "budget '1.5' must be a sparsity in (0, 1) or an N:M pattern"),
    ((["magnitude"], ["4:2"]), "N:M needs 0 < N < M"),
    ((["magnitude"], ["half"]), "budget 'half'"),
    ((["magnitude"], ["0.5"], ["inproj"]), "unknown target 'inproj'. Did you mean 'in_proj'?"),
    (([], ["0.5"]), "methods is empty"),
    ((["magnitude"], []), "budgets is empty"),
])  # fmt: skip
def test_what_can_never_be_used_is_refused_before_any_work(
    tiny_mamba: PreTrainedModel, args: tuple, message: str
) -> None:
    with pytest.raises(ConfigurationError) as error:
        run(tiny_mamba, *args)
    assert message in str(error.value)
    with pytest.raises(ConfigurationError, match="Allowed: matching, memoryless, zero"):
        run(tiny_mamba, ["magnitude"], ["0.5"], a_log_fill=["one"])


def test_options_of_a_method() -> None:
    assert method_settings("sparsessm:v1,time_power=2.0") == {
        "method": "sparsessm",
        "method_kwargs": {"variant": "v1", "time_power": 2.0},
    }
    assert method_settings("magnitude:largest")["method_kwargs"] == {"largest": True}
    assert method_settings("sparsegpt:allocation_kwargs.alpha=0.1,allocation=sensitivity") == {
        "method": "sparsegpt",
        "method_kwargs": {},
        "allocation": "sensitivity",
        "allocation_kwargs": {"alpha": 0.1},
    }


def test_known_rows_are_taken_over_and_a_changed_model_is_refused(tiny_mamba: PreTrainedModel) -> None:
    seen = []
    first = run(tiny_mamba, ["magnitude", "sparsegpt"], ["0.5"], ["A_log", "in_proj"], on_row=seen.append)
    assert [len(table.rows) for table in seen] == [1, 2, 3, 4] and seen[-1].rows == first.rows
    fresh = []
    wanted = (["magnitude", "sparsegpt"], ["0.5", "0.7"], ["A_log", "in_proj"])
    again = run(tiny_mamba, *wanted, known=lambda settings: first.rows, on_row=lambda t: fresh.append(t.rows[-1].key))
    assert {r.key: r for r in first.rows if r.status == "measured"}.items() <= {r.key: r for r in again.rows}.items()
    assert len(again.rows) == 8 and not set(fresh) & {r.key for r in first.rows if r.status == "measured"}
    tiny_mamba.base_model.layers[0].mixer.in_proj.weight.data *= 2
    with pytest.raises(ConfigurationError, match="the model changed"):
        run(tiny_mamba, *wanted, known=lambda settings: first.rows)


def test_csv_keeps_every_number(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    found = run(tiny_mamba, ["sparsegpt"], ["0.5", "2:4"], ["A_log", "in_proj", "in_proj,out_proj"])
    assert rows_from_csv(found.to_csv()) == found.rows
    found.plot(tmp_path / "heat.png")
    from matplotlib.image import imread

    assert imread(tmp_path / "heat.png").std() > 0.05


def test_one_bar_and_quiet_inner_ones(tiny_mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(tiny_mamba, ["sparsegpt"], ["0.5"], ["in_proj"])
    assert sys.stderr is terminal
    shown = terminal.getvalue()
    assert "Comparing" in shown and "2/2" in shown and "Pruning" not in shown and "Perplexity" not in shown
