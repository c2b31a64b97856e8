# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Structured passes through `SSMPruner`: recipes, reload and go on, what report, inspection and card say."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ssm import ConfigurationError, PruningReport, SSMPruner, SSMPrunerConfig
from optimum_ssm.evaluation.inspection import inspect_checkpoint
from optimum_ssm.families import family_of

from .conftest import tiny_model
from .models.checks import generate
from .structured import biased, decoded, logits, prune


MODELS = ("mamba", "mamba2")


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(PruningReport, "plot", lambda self, path: Path(path).write_bytes(b"no picture"))


WANDA = {"method": "wanda", "pattern": "unstructured", "multiple_of": None, "targets": ["in_proj", "out_proj"]}
STATE = {"method": "state_energy"}


APART = {**STATE, "uniform_sizes": False, "allocation": "global"}


def uneven(model_type):
    """A model whose first block has the larger energies by far, so that one threshold keeps nearly all of its states."""
    model = tiny_model(model_type)
    mixer = model.base_model.layers[0].mixer
    if model_type == "mamba":
        mixer.x_proj.weight.data[14:] *= 20
    else:
        mixer.conv1d.weight.data[80:] *= 20
    return model


def check_zeros(pruner):
    """Masks have the shapes of the weights, what they name is zero, and the report counts it."""
    for name, mask in pruner.masks.items():
        parameter = pruner.model.get_parameter(name)
        assert mask.shape == parameter.shape and not parameter[mask].any(), name
    rows = {row.name: row for row in pruner.report.rows}
    for name, mask in pruner.masks.items():
        assert rows[name].masked == int(mask.sum()), name
        assert rows[name].pruned == rows[name].elements - int((~mask).sum())
        for part, (count, gone) in rows[name].segments.items():
            assert 0 <= gone <= count, (name, part)


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize("model_type", MODELS)
def test_masks_follow_the_cut(model_type, token_ids, tmp_path):
    """Wanda first, then states: what is left of the weights is what is left of the masked ones."""
    model, ids = tiny_model(model_type), token_ids()
    masked = prune(copy.deepcopy(model), ids, WANDA)
    pruner = prune(model, ids, WANDA, STATE)
    check_zeros(pruner)
    assert pruner.masks.keys() == masked.masks.keys()
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert pruner.report.pruned > masked.report.pruned and pruner.report.masked <= masked.report.masked
    if model_type == "mamba2":  # rows of B and C are gone from in_proj, and from its mask
        assert len(pruner.masks[name]) == len(masked.masks[name]) - 16
        row = next(row for row in pruner.report.rows if row.name == name)
        assert row.segments["B"][1] > row.segments["B"][0] // 2 and row.methods == ["wanda", "state_energy"]
    pruner.save_pretrained(tmp_path / "out")
    again = SSMPruner.from_pretrained(tmp_path / "out")
    assert again.masks.keys() == pruner.masks.keys()
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruner.masks.items())
    assert again.report.to_json() == pruner.report.to_json()


@pytest.mark.parametrize("model_type", MODELS)
def test_patterns_on_what_is_left(model_type, token_ids):
    pruner = prune(tiny_model(model_type), token_ids(), STATE, {**WANDA, "pattern": "2:4", "sparsity": None})
    check_zeros(pruner)
    for name, mask in pruner.masks.items():
        assert (mask.reshape(-1, 4).sum(1) == 2).all(), name
    assert pruner.report.masked == sum(int(mask.sum()) for mask in pruner.masks.values())
    assert pruner.report.parameters == tiny_model(model_type).num_parameters()
    assert len(pruner.masks) == 4


def test_two_structured_passes_on_two_axes(token_ids, tmp_path):
    ids = token_ids()
    for model_type, axis in (("mamba", "channel"), ("mamba2", "head")):
        pruner = prune(tiny_model(model_type), ids, STATE, {"method": "energy", "axis": axis})
        sizes = family_of(pruner.model).sizes(pruner.model.base_model.layers[0])
        assert sizes["state_size"] == 4 and 32 in (sizes.get("intermediate_size"), sizes.get("num_heads", 0) * 8)
        assert pruner.report.parameters_after == pruner.model.num_parameters()
        assert pruner.report.pruned == pruner.report.parameters - pruner.report.parameters_after
        assert sum(done.removed for done in pruner.report.passes) == pruner.report.pruned
        assert pruner.report.loads_with == "transformers"
        torch.testing.assert_close(decoded(pruner.model, ids), logits(pruner.model, ids), atol=1e-4, rtol=0)


def test_a_second_pass_takes_its_share_of_what_is_left():
    pruner = prune(
        tiny_model("mamba"), None, {"method": "random", "axis": "state"}, {"method": "random", "axis": "state"}
    )
    first, second = (done.units for done in pruner.report.passes)
    assert (first["before"], first["kept"], second["before"], second["kept"]) == ([8, 8], [4, 4], [4, 4], [2, 2])
    assert "state 8 -> 4" in str(pruner.report) and "state 4 -> 2" in str(pruner.report)


def test_what_was_masked_stays_masked_where_out_proj_is_fitted_anew(token_ids):
    ids = token_ids()
    pruner = prune(tiny_model("mamba2"), ids, WANDA, {**STATE, "compensation": "least_squares"})
    check_zeros(pruner)
    plain = prune(tiny_model("mamba2"), ids, WANDA, STATE)
    name = "backbone.layers.0.mixer.out_proj.weight"
    assert not torch.equal(pruner.model.get_parameter(name), plain.model.get_parameter(name))
    errors = [p.report.passes[1].block_errors for p in (pruner, plain)]
    assert errors[0][0] < errors[1][0], "the other entries make up for it"


def test_what_was_masked_stays_masked_through_reconstruction(token_ids):
    ids = token_ids()
    pruner = prune(tiny_model("mamba"), ids, WANDA, {**STATE, "reconstruction_epochs": 2})
    check_zeros(pruner)
    before, after = pruner.report.passes[1].reconstruction[0]
    assert after < before
    assert pruner.model.base_model.layers[0].mixer.A_log.shape == (64, 4)


def test_memoryless_states_are_cut_with_the_others(token_ids):
    a_log = {"method": "sparsessm", "pattern": "unstructured", "multiple_of": None, "targets": ["A_log"]}
    pruner = prune(tiny_model("mamba"), token_ids(), a_log, {"method": "state_energy"})
    mask = pruner.masks["backbone.layers.0.mixer.A_log"]
    values = pruner.model.base_model.layers[0].mixer.A_log
    assert mask.shape == (64, 4) and (values[mask] == 38).all() and not (values[~mask] == 38).any()


# ------------------------------------------------------------------ load and go on


@pytest.mark.parametrize("model_type", MODELS)
def test_a_cut_checkpoint_can_be_pruned_further(model_type, token_ids, tmp_path):
    """The same as both passes in one go; of one class or the other."""
    ids = token_ids()
    for number, uniform in enumerate((True, False)):
        first = STATE if uniform else APART
        second = {"method": "magnitude", "axis": "channel" if model_type == "mamba" else "head"}
        both = prune(uneven(model_type), ids, first, second)
        prune(uneven(model_type), ids, first).save_pretrained(tmp_path / f"{number}")
        pruner = SSMPruner.from_pretrained(tmp_path / f"{number}")
        assert len({block.mixer.ssm_state_size for block in pruner.model.base_model.layers}) == (1 if uniform else 2)
        pruner.prune(
            {"sparsity": 0.5, "pattern": "structured", "multiple_of": 1, "dataset": ids, "seq_len": 24, **second}
        )
        for (name, one), (other, two) in zip(pruner.model.named_parameters(), both.model.named_parameters()):
            assert name == other and torch.equal(one, two), name
        assert [p.units for p in pruner.report.passes] == [p.units for p in both.report.passes]
        assert pruner.report.pruned == both.report.pruned
        pruner.save_pretrained(tmp_path / f"{number}-again")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}-again")
        assert torch.equal(generate(loaded, ids[:, :4]), generate(pruner.model, ids[:, :4]))


def test_blocks_that_differ_lose_the_same_share_each(token_ids, tmp_path):
    """uniform_sizes cannot make sizes alike that are not: every block then loses its share."""
    ids = token_ids()
    pruner = prune(uneven("mamba"), ids, APART)
    kept = pruner.report.passes[0].units["kept"]
    assert len(set(kept)) == 2
    pruner.prune({"method": "random", "axis": "state", "sparsity": 0.3, "multiple_of": 1})
    assert pruner.report.passes[1].units["kept"] == [size - int(0.3 * size + 0.5) for size in kept]


def test_compensation_makes_parameters_that_the_report_knows(token_ids, tmp_path):
    ids = token_ids()
    pruner = prune(tiny_model("mamba"), ids, method="flap", compensation="bias")
    made = [row for row in pruner.report.rows if row.reason == "made by the compensation"]
    assert {row.name.split(".", 3)[-1] for row in made} == {"mixer.in_proj.bias", "mixer.out_proj.bias"} and len(
        made
    ) == 4
    assert all(row.elements == row.pruned == 0 for row in made)
    assert pruner.report.parameters == tiny_model("mamba").num_parameters()
    assert pruner.report.parameters_after == pruner.model.num_parameters()
    pruner.save_pretrained(tmp_path / "out")
    again = SSMPruner.from_pretrained(tmp_path / "out")
    assert type(again.model).__module__.startswith("transformers.") and again.model.config.use_bias
    again.prune({"method": "random", "axis": "channel", "sparsity": 0.5, "multiple_of": 1})
    assert again.report.parameters_after == again.model.num_parameters()
    again.report.to_markdown()


# ------------------------------------------------------------------ inspection, report, card


@pytest.mark.parametrize("uniform", [True, False])
def test_inspection_counts_what_a_cut_checkpoint_holds(uniform, token_ids, tmp_path):
    ids = token_ids()
    pruner = prune(uneven("mamba2"), ids, STATE if uniform else APART, {**WANDA, "sparsity": 0.25})
    pruner.save_pretrained(tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert found.parameters == pruner.model.num_parameters()
    assert {row.name: row.pruned for row in found.rows if row.pruned} == {
        name: int(mask.sum()) for name, mask in pruner.masks.items()
    }
    assert found.recurrent_state_bytes == pruner.report.recurrent_state_bytes


def test_the_report_says_sizes_states_and_what_loads_it(token_ids):
    ids = token_ids()
    uniform = prune(tiny_model("mamba"), ids, STATE).report
    text = str(uniform)
    assert "Pass 1: state_energy, structured, state 8 -> 4, sparsity 0.5, 96 calibration tokens" in text
    assert "Stock transformers loads it." in text
    assert "2 blocks with state_size 4, intermediate_size 64, time_step_rank 6." in text
    assert f"{4 * 2 * 64 * 4:,} bytes recurrent (float32), before pruning {4 * 2 * 64 * 8:,}" in text
    own = prune(uneven("mamba"), ids, APART).report
    kept = sorted(own.passes[0].units["kept"])
    assert f"state 8 -> {kept[0]} to {kept[1]}" in str(own) and f"state_size {kept[0]} to {kept[1]}" in str(own)
    assert "Stock transformers does not load it: `import optimum_ssm` first." in str(own)
    groups = prune(tiny_model("mamba2"), ids, STATE, {"method": "energy", "axis": "head_dim"}).report
    assert "structured, state 16 -> 8 (8 -> 4 in each group)," in str(groups)
    assert "structured, head_dim 64 -> 32 (8 -> 4 in each head)," in str(groups)
    for report in (uniform, own, groups):
        again = PruningReport.from_json(report.to_json())
        assert again == report and str(again) == str(report)
        assert json.loads(report.to_json())["totals"]["pruned"] == report.pruned


def card(pruner, directory, **kwargs):
    pruner.save_pretrained(directory, **kwargs)
    return (directory / "README.md").read_text()


def test_the_card_says_how_a_cut_model_loads(token_ids, tmp_path):
    ids = token_ids()
    text = card(prune(tiny_model("mamba"), ids, STATE), tmp_path / "stock")
    assert "No custom code is needed: the checkpoint is an ordinary dense one of smaller size." in text
    assert (
        "zeros" not in text and "import optimum_ssm" not in text and "- structured" in text and "- sparse" not in text
    )
    own = {"method": "random", "axis": "head", "sparsity": 0.25}
    text = card(prune(tiny_model("mamba2"), ids, own), tmp_path / "own")
    assert "run `import optimum_ssm` before the lines above" in text and "trust_remote_code" not in text
    text = card(prune(tiny_model("mamba2"), ids, own), tmp_path / "code", remote_code=True)
    assert "with `trust_remote_code=True` the model loads where optimum_ssm is not installed" in text
    text = card(prune(tiny_model("mamba2"), ids, STATE, WANDA), tmp_path / "both")
    assert "of smaller size whose removed weights are zeros" in text and "- sparse" in text and "- structured" in text


def test_a_stock_model_gets_no_code_beside_its_weights(token_ids, tmp_path):
    text = card(prune(tiny_model("mamba"), token_ids(), STATE), tmp_path / "out", remote_code=True)
    assert not list((tmp_path / "out").glob("*.py")) and "trust_remote_code" not in text


STRANGER = """
import sys
sys.modules["optimum_ssm"] = None
import torch
from transformers import AutoModelForCausalLM

for directory, trust in zip(sys.argv[1::2], sys.argv[2::2]):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust == "code")
    wanted = torch.load(directory + "/wanted.pt")
    with torch.no_grad():
        assert torch.equal(model(wanted["ids"]).logits, wanted["logits"]), directory
    tokens = model.generate(wanted["ids"], attention_mask=torch.ones_like(wanted["ids"]), max_new_tokens=8,
                            do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, wanted["tokens"]), directory
"""


def test_stock_transformers_loads_what_the_report_says_it_does(token_ids, tmp_path):
    """In a process that cannot import this library: uniform sizes as they are, others with the code beside them."""
    ids, arguments = token_ids(2, 8), []
    recipes = {
        "mamba": [STATE, {"method": "energy", "axis": "channel"}, {"method": "random", "axis": "dt_rank"}],
        "mamba2": [STATE, {"method": "flap"}, {"method": "magnitude", "axis": "group"}, {"method": "random", "axis": "head", "sparsity": 0.25}],
    }  # fmt: skip
    for model_type, passes in recipes.items():
        for number, one in enumerate(passes):
            pruner = prune(biased(model_type), ids, {**one, "seq_len": 8})
            stock = pruner.report.loads_with == "transformers"
            assert stock == (one.get("sparsity") is None)
            directory = tmp_path / f"{model_type}{number}"
            pruner.save_pretrained(directory, remote_code=not stock)
            wanted = {"ids": ids, "logits": logits(pruner.model, ids), "tokens": generate(pruner.model, ids)}
            torch.save(wanted, directory / "wanted.pt")
            arguments += [str(directory), "stock" if stock else "code"]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "values, message",
    [
        ({"method": "state_energy", "targets": ["in_proj"]}, "contradicts pattern='structured', where axis says"),
        ({"method": "state_energy", "exclude": ["in_proj"]}, "units go whole"),
        ({"method": "state_energy", "axis": "heads"}, "unknown axis 'heads'. Did you mean 'head'?"),
        ({"method": "state_energy", "axis": "head"}, "does not score axis 'head'. Allowed: state"),
        ({"method": "wanda", "axis": "state"}, "unknown structured method 'wanda'"),
        ({"method": "state_energy", "allocation": "last"}, "which uniform_sizes=True forbids"),
        ({"method": "state_energy", "allocation": "owl", "uniform_sizes": False}, "spreads weights, not units"),
        ({"method": "state_energy", "multiple_of": 0}, "multiple_of=0 must be at least 1"),
        ({"method": "state_energy", "pattern": "2:4"}, "state_energy"),
        ({"method": "state_energy", "sparsity": None}, "sparsity must be given"),
        ({"method": "state_energy", "compensation": "mean"}, "unknown compensation 'mean'"),
        ({"method": "state_energy", "norm_rescale": "weight"}, "unknown norm_rescale 'weight'"),
        (
            {"method": "magnitude", "targets": ["in_proj"], "compensation": "bias"},
            "goes with pattern='structured' only",
        ),
        ({"method": "state_energy", "method_kwargs": {"weight": True}}, "Did you mean 'weighted'"),
    ],
)
def test_contradictions_are_refused_by_name(values, message):
    with pytest.raises(ConfigurationError, match=message):
        SSMPruner(tiny_model("mamba"), pruning_config={"sparsity": 0.5, **values})


def test_text_is_needed_before_the_first_block_is_touched(tmp_path):
    model = tiny_model("mamba")
    before = copy.deepcopy(model.state_dict())
    (tmp_path / "some.txt").write_text("a word " * 50)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        SSMPruner(model).prune({**STATE, "sparsity": 0.5, "dataset": str(tmp_path / "some.txt")})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pass_that_no_longer_fits_says_which_and_what_is_done(tiny_mamba):
    """Checked on the whole model before the first pass, and again on what that has left."""
    last = f"{tiny_mamba.base_model_prefix}.layers.1.mixer.in_proj"
    passes = [
        SSMPrunerConfig(method="random", axis="block", sparsity=0.5),
        SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=[last]),
    ]
    pruner = SSMPruner(tiny_mamba)
    with pytest.raises(
        ConfigurationError, match="^pass 2 of the recipe does not fit .* which stay done, have left: unk"
    ):
        pruner.prune(passes)
    assert len(tiny_mamba.base_model.layers) == 1 and len(pruner.report.passes) == 1
