# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Dropping of blocks and SSMs: the greedy order, the account of it, and passes before and after."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.evaluation.inspection import inspect_checkpoint
from optimum_ssm.families import family_of
from optimum_ssm.methods.structures.block_drop import evaluations, greedy
from optimum_ssm.passes import dropping
from optimum_ssm.report import PruningReport
from optimum_ssm.surgery.drop import mute_ssm, remove_blocks


MODELS = ("mamba", "mamba2")
UNITS = ("block", "ssm")
every_model = pytest.mark.parametrize("kind", MODELS)
every_unit = pytest.mark.parametrize("unit", UNITS)


def drop(ids, sparsity=0.5, method="block_drop", **values):
    kwargs = {"method_kwargs": values.pop("kwargs", {})}
    return SSMPrunerConfig(
        method=method, sparsity=sparsity, dataset=ids, num_samples=len(ids), seq_len=ids.shape[1], batch_size=3, **kwargs,
        **values,
    )  # fmt: skip


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def without(model, unit, gone):
    """A copy without some units, by the surgery that other tests hold against the papers."""
    model = copy.deepcopy(model)
    family = family_of(model)
    if unit == "block" and gone:
        remove_blocks(model, family, gone)
    for index in gone if unit == "ssm" else ():
        mute_ssm(family, model.base_model.layers[index])
    return model


def perplexity(model, ids):
    """exp of the mean over sequences of the mean loss, one sequence at a time, by transformers' own loss."""
    with torch.no_grad():
        return math.exp(sum(float(model(row[None], labels=row[None]).loss) for row in ids) / len(ids))


def check_masks(pruner):
    """Masks have the names and shapes of parameters and say where these hold zeros; the report counts the same."""
    parameters = dict(pruner.model.named_parameters())
    assert set(pruner.masks) <= set(parameters)
    for name, mask in pruner.masks.items():
        assert torch.equal(parameters[name] == 0, mask), name
    rows = {row.name: row for row in pruner.report.rows}
    assert len(rows) == len(pruner.report.rows)
    for name, parameter in parameters.items():
        gone = int(pruner.masks[name].sum()) if name in pruner.masks else 0
        assert rows[name].shape == list(parameter.shape)
        assert rows[name].pruned == rows[name].elements - parameter.numel() + gone, name
    for row in pruner.report.rows:
        assert row.reason
        assert row.dropped == (row.name not in parameters)
        for elements, removed in row.segments.values():
            assert 0 <= removed <= elements


def test_greedy_is_greedy_and_prefers_the_first_of_equals():
    table = {frozenset(): [3, 1, 1, 2], frozenset({1}): [5, None, 4, 4]}
    asked = []

    def scores(left):
        gone = frozenset(range(4)) - set(left)
        asked.append(left)
        return [table[gone][unit] for unit in left]

    assert greedy(range(4), 2, scores) == [(1, 1.0), (2, 4.0)]
    assert asked == [[0, 1, 2, 3], [0, 2, 3]]
    assert sum(map(len, asked)) == evaluations(4, 2) == 7
    assert greedy(range(4), 0, scores) == []


@every_unit
@every_model
def test_the_order_is_that_of_brute_force(kind, unit, make_tiny_model, token_ids):
    model, ids = make_tiny_model(kind, seed=3, num_hidden_layers=4), token_ids(5, 16)
    dense = copy.deepcopy(model)
    gone, scores = [], []
    for _ in range(3):
        found = {i: perplexity(without(dense, unit, [*gone, i]), ids) for i in range(4) if i not in gone}
        gone.append(min(found, key=found.__getitem__))
        scores.append(found[gone[-1]])
    pruner = SSMPruner(model)
    units = pruner.prune(drop(ids, 0.75, kwargs={"unit": unit})).passes[0].units
    assert units["order"] == gone
    assert units["scores"] == pytest.approx(scores, rel=1e-4)
    assert units["removed"] == [sorted(gone)] and (units["before"], units["kept"]) == ([4], [1])
    assert torch.equal(logits(model, ids), logits(without(dense, unit, gone), ids))
    check_masks(pruner)


@every_unit
def test_influence_is_taken_from_one_pass(unit, make_tiny_model, token_ids):
    model, ids = make_tiny_model("mamba2", seed=5, num_hidden_layers=4), token_ids(4, 16)
    influences = []
    with torch.no_grad():
        hidden = model.base_model.embeddings(ids)
        for block in copy.deepcopy(model).base_model.layers:
            out = block(hidden)
            if unit == "ssm":
                mute_ssm(family_of(model), block)
            left = hidden if unit == "block" else block(hidden)
            influences.append(1 - float(F.cosine_similarity(out, left, dim=-1).mean()))
            hidden = out
    order = sorted(range(4), key=influences.__getitem__)[:2]
    units = SSMPruner(model).prune(drop(ids, kwargs={"unit": unit, "score": "influence"})).passes[0].units
    assert units["order"] == order
    assert units["scores"] == pytest.approx([influences[i] for i in order], abs=1e-5)


def test_what_enters_a_block_is_computed_once_per_round(make_tiny_model, token_ids, monkeypatch):
    model, runs, asked = make_tiny_model("mamba", num_hidden_layers=4), [], []
    for index, block in enumerate(model.base_model.layers):
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
    measure = dropping._Search._perplexity_without
    monkeypatch.setattr(
        dropping._Search, "_perplexity_without", lambda self, i, *rest: (asked.append(i), measure(self, i, *rest))[1]
    )
    SSMPruner(model).prune(drop(token_ids(3, 8)))
    assert len(asked) == evaluations(4, 2) == 7
    first, second = 3 + (3 + 2 + 1), 2 + (2 + 1)  # carried along, and after each candidate
    assert len(runs) == first + second
    assert first <= 4 * 5 / 2


@pytest.mark.parametrize("kind, unit", [("mamba", "ssm"), ("mamba2", "block"), ("mamba2", "ssm")])
def test_a_checkpoint_is_loaded_told_and_dropped_from_again(kind, unit, make_tiny_model, token_ids, tmp_path):
    model, ids = make_tiny_model(kind, num_hidden_layers=4), token_ids(3, 16)
    pruner = SSMPruner(model)
    report = pruner.prune(drop(ids, kwargs={"unit": unit}))
    pruner.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__.startswith("transformers.")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert len(AutoModel.from_pretrained(tmp_path).layers) == (2 if unit == "block" else 4)
    again = SSMPruner.from_pretrained(tmp_path)
    assert again.report.rows == report.rows and again.report.passes == report.passes
    assert again.masks.keys() == pruner.masks.keys()
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in again.masks.items())
    seen = inspect_checkpoint(tmp_path)
    assert seen.parameters == report.parameters_after
    assert seen.pruned == report.masked == sum(int(mask.sum()) for mask in pruner.masks.values())
    again.prune(drop(ids, 0.75 if unit == "ssm" else 0.5, kwargs={"unit": unit}))
    check_masks(again)
    gone = [index for done in again.report.passes for index in done.units["order"]]
    assert len(set(gone)) == len(gone) == 3
    if unit == "block":
        assert again.report.blocks == sorted(set(range(4)) - set(gone))
    assert torch.equal(
        logits(again.model, ids), logits(without(make_tiny_model(kind, num_hidden_layers=4), unit, gone), ids)
    )


@every_model
def test_rows_tell_the_blocks_of_the_dense_model(kind, make_tiny_model, token_ids, tmp_path):
    model, ids = make_tiny_model(kind, num_hidden_layers=4), token_ids(3, 16)
    dense = {name: parameter.numel() for name, parameter in model.named_parameters()}
    pruner = SSMPruner(model)
    report = pruner.prune(drop(ids))
    gone = report.passes[0].units["removed"][0]
    rows = {row.name: row for row in report.rows}
    for name, elements in dense.items():
        index = int(name.split(".")[2]) if ".layers." in name else None
        row = rows[f"dropped.{name}" if index in gone else renamed(name, index, gone)]
        assert (row.block, row.elements) == (index, elements)
        assert row.pruned == (elements if index in gone else 0)
        assert row.shape == [0] if index in gone else row.stored == elements
    assert report.parameters == sum(dense.values())
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.masked == 0
    assert PruningReport.from_json(report.to_json()).rows == report.rows
    assert "block 4 -> 2" in report.to_markdown()
    report.plot(tmp_path / "report.png")


def renamed(name, index, gone):
    if index is None:
        return name
    return name.replace(f"layers.{index}.", f"layers.{index - sum(other < index for other in gone)}.")


@pytest.mark.parametrize("kind, unit", [("mamba", "block"), ("mamba2", "ssm")])
@pytest.mark.parametrize("order", ["wanda then drop", "drop then wanda", "state then drop", "drop then state"])
def test_passes_before_and_after(kind, unit, order, make_tiny_model, token_ids, tmp_path):
    model, ids = make_tiny_model(kind, num_hidden_layers=4), token_ids(4, 16)
    other = {
        "wanda": drop(ids, 0.5, "wanda"),
        "state": drop(ids, 0.5, "state_energy", multiple_of=1),
    }[order.replace("drop", "").replace("then", "").strip()]
    passes = [other, drop(ids, kwargs={"unit": unit})]
    pruner = SSMPruner(model)
    report = pruner.prune(passes if order.endswith("drop") else passes[::-1])
    check_masks(pruner)
    assert all(done.removed for done in report.passes)
    assert sum(done.removed for done in report.passes) == report.pruned
    drops = report.passes[order.endswith("drop")]
    gone = drops.units["removed"][0]
    if unit == "block":
        assert report.blocks == [index for index in range(4) if index not in gone]
        errors = report.passes[not order.endswith("drop")].block_errors
        if order.startswith("drop"):  # told by block of the dense model
            assert [index for index, error in enumerate(errors) if error is not None] == report.blocks
        else:
            assert len(errors) == 4
    pruner.save_pretrained(tmp_path)
    again = SSMPruner.from_pretrained(tmp_path)
    assert torch.equal(logits(again.model, ids), logits(model, ids))
    assert {name: int(mask.sum()) for name, mask in again.masks.items()} == {
        name: int(mask.sum()) for name, mask in pruner.masks.items()
    }


def test_random_blocks_need_no_text_and_obey_the_seed(make_tiny_model):
    found = []
    for seed in (0, 0, 1, 2, 3):
        pruner = SSMPruner(make_tiny_model("mamba", num_hidden_layers=6))
        report = pruner.prune(SSMPrunerConfig(method="random", axis="block", sparsity=0.5, seed=seed))
        assert report.passes[0].tokens == 0 and len(pruner.model.base_model.layers) == 3
        found.append(report.passes[0].units["order"])
    assert found[0] == found[1]
    assert len({tuple(order) for order in found}) > 1


def test_one_block_stays(tiny_mamba, token_ids):
    report = SSMPruner(tiny_mamba).prune(drop(token_ids(2, 8), 0.9))
    assert report.passes[0].units["kept"] == [1]


def test_all_ssms_may_go(tiny_mamba2, token_ids):
    pruner = SSMPruner(tiny_mamba2)
    assert pruner.prune(drop(token_ids(2, 8), 0.9, kwargs={"unit": "ssm"})).passes[0].units["kept"] == [0]
    assert pruner.prune(drop(token_ids(2, 8), 0.5, kwargs={"unit": "ssm"})).passes[1].removed == 0


def test_a_unit_whose_loss_breaks_the_model_stays(make_tiny_model, token_ids):
    model, ids = make_tiny_model("mamba", num_hidden_layers=2, use_bias=True), token_ids(2, 8)
    first, second = (block.mixer for block in model.base_model.layers)
    with (
        torch.no_grad()
    ):  # the first block fills a channel that the second ignores: after its norm little else is left
        first.out_proj.bias[0] = 1e6
        second.in_proj.weight[:, 0] = 0
        second.in_proj.weight.mul_(1e3)
        second.out_proj.weight.mul_(1e30)
        for bias in (second.in_proj.bias, second.conv1d.bias, second.out_proj.bias):
            bias.zero_()
    assert logits(model, ids).isfinite().all()
    assert not without(model, "block", [0]).base_model(ids, use_cache=False).last_hidden_state.isfinite().all()
    assert SSMPruner(model).prune(drop(ids)).passes[0].units["order"] == [1]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"compensation": "bias"}, "compensation='bias'.*whole"),
        ({"multiple_of": 2}, "multiple_of=2"),
        ({"reconstruction_epochs": 1}, "reconstruction_epochs=1"),
        ({"uniform_sizes": False, "allocation": "global"}, "allocation='global'"),
        ({"sparsity": 0.1}, "rounds to none.*at least 0.25"),
    ],
)
def test_settings_without_meaning_are_refused(values, message, tiny_mamba, token_ids):
    with pytest.raises(ConfigurationError, match=message):
        SSMPruner(tiny_mamba).prune(drop(token_ids(), **values))


@pytest.mark.parametrize("kwargs", [{"unit": "layer"}, {"score": "taylor"}, {"units": "ssm"}])
def test_unknown_options_are_refused(kwargs):
    with pytest.raises(ConfigurationError, match="Allowed"):
        SSMPrunerConfig(method="block_drop", sparsity=0.5, method_kwargs=kwargs)


def test_a_model_without_a_head_has_no_perplexity(tiny_mamba, token_ids):
    with pytest.raises(ConfigurationError, match="no output head.*influence"):
        SSMPruner(tiny_mamba.base_model).prune(drop(token_ids()))
    report = SSMPruner(tiny_mamba.base_model).prune(drop(token_ids(), kwargs={"score": "influence"}))
    assert report.passes[0].units["kept"] == [1]
    assert len(tiny_mamba.base_model.layers) == 1
