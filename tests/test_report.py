# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The report: every parameter once, exact totals, and the same numbers in the table, the JSON and the picture."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_ssm import CheckpointError, PruningReport, SSMPruner, SSMPrunerConfig
from optimum_ssm.families import family_of
from optimum_ssm.report import HIGHER_SCORES, Pass, Row
from optimum_ssm.report_rows import NOT_TARGETED, model_report, origin


def prune(model: PreTrainedModel, *passes: dict[str, object]) -> SSMPruner:
    pruner = SSMPruner(
        model, pruning_config=[{"sparsity": 0.5, "method": "magnitude", **options} for options in passes]
    )
    pruner.prune()
    return pruner


def rows_of(report: PruningReport) -> dict[str, Row]:
    return {row.name: row for row in report.rows}


@pytest.fixture
def rich(tiny_mamba2: PreTrainedModel, token_ids: Callable[..., Tensor]) -> PruningReport:
    """A report with two passes, segments, errors, an unfit weight and perplexities."""
    data = {"dataset": token_ids(), "seq_len": 24}
    pruner = prune(
        tiny_mamba2,
        {"method": "sparsegpt", "targets": ["in_proj.B", "in_proj.x", "out_proj"], **data},
        {"pattern": "2:4", "sparsity": None, "targets": ["conv1d", "A_log"], **data},
    )
    pruner.report.perplexity["pruned"] = {"perplexity": 12.3456, "protocol": "some text, 4 windows of 512 tokens"}
    return pruner.report


# ------------------------------------------------------------------ rows and totals


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_a_row_and_tied_ones_are_counted_once(
    make_tiny_model: Callable[..., PreTrainedModel], tied: bool
) -> None:
    model = make_tiny_model("mamba", tie_word_embeddings=tied)
    report = prune(model, {}).report
    assert [row.name for row in report.rows] == [name for name, _ in model.named_parameters()]
    assert report.parameters == model.num_parameters() == sum(row.pruned + row.kept for row in report.rows)
    embedding = rows_of(report)["backbone.embeddings.weight"]
    assert embedding.reason == ("embedding, tied with lm_head.weight" if tied else "embedding")
    assert ("lm_head.weight" in rows_of(report)) is not tied
    if not tied:
        assert rows_of(report)["lm_head.weight"].reason == "output head"


def test_every_row_says_why_the_rest_was_kept(either_tiny_model: PreTrainedModel) -> None:
    report = prune(either_tiny_model, {"targets": ["in_proj"]}).report
    for row in report.rows:
        if row.component == "in_proj":
            assert row.reason == HIGHER_SCORES and row.pruned == row.elements // 2 and row.methods == ["magnitude"]
        else:
            assert row.pruned == 0 and row.reason and row.methods == []
    reasons = {row.component: row.reason for row in report.rows}
    assert reasons["A_log"] == reasons["out_proj"] == NOT_TARGETED
    assert reasons["norm"] == reasons["norm_f"] == "norm" and reasons["conv1d.bias"] == "bias"
    assert reasons["D"].startswith("skip connection")


def test_what_is_not_targeted_keeps_every_bit(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    """Embeddings, norms, biases, D: also under a method that updates weights."""
    dense, model = make_tiny_model("mamba"), make_tiny_model("mamba")
    report = prune(model, {"method": "sparsessm", "dataset": token_ids(), "seq_len": 24}).report
    touched = {row.name for row in report.rows if row.pruned}
    assert {rows_of(report)[name].component for name in touched} == {
        "A_log",
        "in_proj",
        "x_proj",
        "dt_proj",
        "out_proj",
    }
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)) == (name not in touched), name
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_segments_add_up_to_their_weight(either_tiny_model: PreTrainedModel) -> None:
    report = prune(either_tiny_model, {"method": "random", "targets": ["in_proj", "conv1d"]}).report
    split = [row for row in report.rows if row.segments and row.pruned]
    assert split
    for row in split:
        assert sum(entries for entries, _ in row.segments.values()) == row.elements
        assert sum(gone for _, gone in row.segments.values()) == row.pruned
        assert all(0 < gone < entries for entries, gone in row.segments.values())


def test_rows_outside_the_targeted_segments_are_not_said_to_have_scored_higher(tiny_mamba2: PreTrainedModel) -> None:
    report = prune(tiny_mamba2, {"targets": ["in_proj.B", "in_proj.x"]}).report
    row = rows_of(report)["backbone.layers.0.mixer.in_proj.weight"]
    assert row.reason == f"{HIGHER_SCORES}; z, C, dt not among the targets"
    assert [name for name, (_, gone) in row.segments.items() if gone] == ["x", "B"]


def test_a_targeted_segment_whose_share_is_nothing_is_not_said_to_be_no_target(tiny_mamba2: PreTrainedModel) -> None:
    shares = {"in_proj.B": 0.5, "in_proj.dt": 0}
    options = {"targets": list(shares), "allocation": "by_name", "allocation_kwargs": {"shares": shares}}
    report = prune(tiny_mamba2, {**options, "sparsity": 1 / 3}).report
    row = rows_of(report)["backbone.layers.0.mixer.in_proj.weight"]
    assert row.reason == f"{HIGHER_SCORES}; z, x, C not among the targets"
    assert row.segments["B"][1] == row.segments["B"][0] // 2 and row.segments["dt"][1] == 0


def test_what_a_pattern_does_not_fit_is_kept_with_that_reason(tiny_mamba2: PreTrainedModel) -> None:
    """Also where only a segment of the weight was asked for."""
    options = {"pattern": "4:8", "sparsity": None, "targets": ["in_proj", "conv1d.x", "A_log"]}
    reasons = {row.component: row.reason for row in prune(tiny_mamba2, options).report.rows}
    assert reasons["conv1d"] == "rows of 4 weights do not split into groups of 8"
    assert reasons["A_log"] == "one number per head has no groups of 8"


def test_a_second_pass_over_the_same_weight_counts_nothing_twice(tiny_mamba: PreTrainedModel) -> None:
    pruner = prune(tiny_mamba, {"targets": ["in_proj"], "sparsity": 0.3}, {"targets": ["in_proj"], "sparsity": 0.6})
    report = pruner.report
    zeros = sum(int((block.mixer.in_proj.weight == 0).sum()) for block in tiny_mamba.base_model.layers)
    assert report.pruned == zeros == 2 * round(0.6 * 4096), "magnitude masks are nested"
    assert rows_of(report)["backbone.layers.0.mixer.in_proj.weight"].methods == ["magnitude"]


def test_two_passes_that_choose_differently_are_counted_as_their_union(tiny_mamba2: PreTrainedModel) -> None:
    draws = [{"method": "random", "targets": ["in_proj", "A_log"], "seed": seed} for seed in (1, 3)]
    pruner = prune(tiny_mamba2, *draws)
    for name, mask in pruner.masks.items():
        row, held = rows_of(pruner.report)[name], tiny_mamba2.get_parameter(name)
        assert torch.equal(mask, held == (38 if name.endswith("A_log") else 0))
        assert row.elements // 2 < row.pruned == mask.sum() < row.elements
        assert sum(gone for _, gone in row.segments.values()) == (row.pruned if row.segments else 0)


@pytest.mark.parametrize(
    "second", [{"sparsity": 0.1}, {"method_kwargs": {"blocksize": 8}}, {"pattern": "2:4", "sparsity": None}]
)
@pytest.mark.parametrize("targets", [["in_proj"], ["conv1d"], ["in_proj.x", "conv1d"]])
def test_a_second_pass_that_updates_weights_revives_no_removed_one(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor], second: dict[str, object], targets: list[str]
) -> None:
    """SparseGPT moves errors into columns on the right, also where magnitude had removed an entry before."""
    data = {"targets": targets, "dataset": token_ids(), "seq_len": 24}
    pruner = prune(either_tiny_model, {"targets": targets}, {"method": "sparsegpt", **data, **second})
    row_by_name = rows_of(pruner.report)
    assert len(pruner.masks) == 2 * len(targets)
    for name, mask in pruner.masks.items():
        assert (either_tiny_model.get_parameter(name)[mask] == 0).all(), f"{name} holds a removed entry that is not 0"
        assert row_by_name[name].pruned == mask.sum()


def test_a_recipe_sums_up(make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]) -> None:
    data = {"dataset": token_ids(), "seq_len": 24}
    first = {"method": "sparsessm", "targets": ["A_log"], **data}
    second = {"method": "wanda", "targets": ["in_proj", "out_proj"], "sparsity": 0.25, **data}
    both, alone = prune(make_tiny_model("mamba"), first, second), prune(make_tiny_model("mamba"), first)
    report = both.report
    assert [done.config["method"] for done in report.passes] == ["sparsessm", "wanda"]
    assert [done.tokens for done in report.passes] == [96, 96]
    totals = {name: removed for name, _, removed, _ in report.components()}
    assert totals["A_log"] == alone.report.pruned == 512 and totals["in_proj"] == 2048 and totals["out_proj"] == 1024
    assert report.pruned == 512 + 2048 + 1024
    alone.prune(SSMPrunerConfig(**{"sparsity": 0.5, **second}))
    assert rows_of(alone.report).keys() == rows_of(report).keys()
    for name, row in rows_of(alone.report).items():
        assert row == rows_of(report)[name], "two calls are one recipe"


def natural_zeros() -> PreTrainedModel:
    """As transformers initialises it: A_log[:, 0] = log 1 = 0."""
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    model = AutoModelForCausalLM.from_config(config)
    assert all((block.mixer.A_log[:, 0] == 0).all() for block in model.base_model.layers)
    return model


@pytest.mark.parametrize("fill", ["zero", "memoryless"])
def test_natural_zeros_of_a_log_are_not_removals(fill: str) -> None:
    model = natural_zeros()
    assert model_report(model, family_of(model)).pruned == 0
    pruner = prune(model, {"method": "random", "targets": ["A_log"], "a_log_fill": fill})
    zeros = sum(int((block.mixer.A_log == 0).sum()) for block in model.base_model.layers)
    assert pruner.report.pruned == 512 != zeros
    assert all(mask.sum() == 256 for mask in pruner.masks.values())


def test_state_bytes_are_those_of_a_real_cache(either_tiny_model: PreTrainedModel) -> None:
    model = either_tiny_model
    report = model_report(model, family_of(model))
    cache = model(torch.ones(1, 5, dtype=torch.long), use_cache=True).cache_params
    assert report.recurrent_state_bytes == sum(layer.recurrent_states[0].nbytes for layer in cache.layers)
    assert report.conv_state_bytes == sum(layer.conv_states[0].nbytes for layer in cache.layers)


@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_follow_the_dtype(tiny_mamba: PreTrainedModel, dtype: torch.dtype, width: int) -> None:
    report = prune(tiny_mamba.to(dtype), {}).report
    assert report.dense_bytes == width * tiny_mamba.num_parameters()
    assert report.nonzero_bytes == report.dense_bytes - width * report.pruned


def test_a_log_of_a_130m_model_is_printed_as_a_quarter_of_a_percent() -> None:
    """Half of A_log is 0.23 % of the model; its weights are not needed to know that."""
    shape = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **shape))
    for block in model.base_model.layers:
        block.mixer.A_log = nn.Parameter(torch.randn(1536, 16))
    report = prune(model, {"targets": ["A_log"]}).report
    assert report.parameters == 129_135_360 and report.pruned == 24 * 1536 * 16 // 2
    whole = next(line for line in str(report).splitlines() if "whole model" in line)
    assert whole.count("0.23 %") == 2 and "50" not in whole
    component = next(line for line in str(report).splitlines() if line.startswith("| A_log "))
    assert "50.00 %" in component and "0.23 %" in component, "a component's share never stands alone"
    assert report.sparsity == pytest.approx(0.00228, abs=5e-6)


# ------------------------------------------------------------------ table


def cells_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_no_empty_cell_and_its_columns_add_up(rich: PruningReport) -> None:
    head, rule, *body = cells_of(rich.to_markdown())
    assert head == ["component", "entries", "removed", "of component", "of model", "kept because"]
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    assert all(len(row) == 6 and all(row) for row in body)
    assert len({len(line) for line in str(rich).splitlines() if line.startswith("|")}) == 1, "columns are aligned"
    whole = body[-1]
    assert whole[0] == "whole model"
    components = [row for row in body[:-1] if "." not in row[0] or row[0].endswith(("bias", "norm"))]
    for column, total in ((1, rich.parameters), (2, rich.pruned)):
        numbers = [int(row[column].replace(",", "")) for row in components]
        assert sum(numbers) == total == int(whole[column].replace(",", ""))
    assert whole[3] == whole[4] == f"{100 * rich.sparsity:.2f} %"
    by_name = {row[0]: row for row in body}
    assert by_name["in_proj.z"][2] == "0" and by_name["in_proj.B"][3] == "50.00 %"
    assert by_name["conv1d"][3] == "50.00 %" and by_name["A_log"][5] == "one number per head has no groups of 4"


def test_the_text_names_passes_bytes_states_errors_and_perplexities(rich: PruningReport) -> None:
    text = str(rich)
    assert "Pass 1: sparsegpt, unstructured, sparsity 0.5, 96 calibration tokens, 4,608 entries removed" in text
    assert "Pass 2: magnitude, 2:4, sparsity 0.5, 0 calibration tokens" in text
    assert f"{rich.dense_bytes:,} bytes stored densely, {rich.nonzero_bytes:,} bytes without" in text
    assert f"{rich.recurrent_state_bytes:,} bytes recurrent" in text
    assert "Relative output error of a block in pass 1: mean" in text, "the last pass that could measure it"
    assert "Perplexity, pruned: 12.346 (some text, 4 windows of 512 tokens)." in text


def test_a_report_of_nothing_says_so(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    report = model_report(tiny_mamba, family_of(tiny_mamba))
    body = cells_of(report.to_markdown())[2:]
    assert all(row[2] == "0" and all(row) for row in body) and report.sparsity == 0.0
    assert "Pass" not in str(report) and "error" not in str(report)
    report.plot(tmp_path / "nothing.png")
    assert imread(tmp_path / "nothing.png").ndim == 3


# ------------------------------------------------------------------ JSON


def test_json_round_trip(rich: PruningReport) -> None:
    text = rich.to_json()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["totals"] == {"parameters": rich.parameters, "pruned": rich.pruned, "sparsity": rich.sparsity}
    again = PruningReport.from_json(text)
    assert again == rich and again.to_json() == text and str(again) == str(rich)
    assert all(isinstance(row, Row) for row in again.rows) and all(isinstance(done, Pass) for done in again.passes)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(version=999),
        lambda values: values.pop("version"),
        lambda values: values.pop("rows"),
        lambda values: values["rows"][0].update(colour="red"),
        lambda values: values["passes"][0].pop("config"),
        lambda values: values.update(unexpected=1),
    ],
)
def test_json_of_another_version_or_shape_is_refused(rich: PruningReport, change: Callable[[dict], object]) -> None:
    values = json.loads(rich.to_json())
    change(values)
    with pytest.raises(CheckpointError, match="^the pruning report cannot be read: "):
        PruningReport.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_text_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="^the pruning report cannot be read: "):
        PruningReport.from_json(text)


# ------------------------------------------------------------------ picture


def test_the_picture_is_a_readable_png_that_shows_something(rich: PruningReport, tmp_path: Path) -> None:
    path = tmp_path / "pruning.png"
    rich.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert image.shape[0] > 150 and image.shape[1] > 400 and image.std() > 0.05


@pytest.mark.parametrize("name, reason", [("picture.xyz", "not supported"), ("missing/picture.png", "No such file")])
def test_a_picture_that_cannot_be_written_is_one_line(
    rich: PruningReport, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^cannot draw .*{name}: .*{reason}") as caught:
        rich.plot(tmp_path / name)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ names


def test_a_directory_is_not_mistaken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert origin("models/mine") == origin("./models/mine/") == "./mine"
    assert origin(f"{tmp_path}/models/mine/") == "./mine", "the report is published: no path of this machine"
    assert origin("state-spaces/mamba-130m-hf") == "state-spaces/mamba-130m-hf"
