# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What every structured method owes on every axis of every family. Entries of the registries are found here, none is listed."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ssm import ConfigurationError, PruningReport, SSMPruner, SSMPrunerConfig
from optimum_ssm.configuration_rules import AXES
from optimum_ssm.families import FAMILIES, family_of
from optimum_ssm.methods.structures import STRUCTURES
from optimum_ssm.methods.structures.base import StructuredMethod
from optimum_ssm.sparsity.allocations import ALLOCATIONS
from optimum_ssm.sparsity.selection import round_half_up

from ..conftest import tiny_model
from ..families.test_axes import permuted, within_groups
from ..models.checks import generate
from ..structured import axes_of, decoded, logits, scores_of


MODEL_TYPES = sorted(kind for _, family in FAMILIES.items() for kind in family.model_types)
LENGTH = 12
IDS = torch.randint(0, 64, (3, LENGTH), generator=torch.Generator().manual_seed(7))
SPREADING = [name for name, entry in ALLOCATIONS.items() if "units" in entry.spreads]


def config(method, axis, **values):
    common = {
        "sparsity": 0.5,
        "pattern": "structured",
        "multiple_of": 1,
        "dataset": IDS,
        "seq_len": LENGTH,
        "batch_size": 2,
    }
    return SSMPrunerConfig(method=method, axis=axis, **{**common, **values})


@functools.cache
def inner_axes(model_type):
    return tuple(axes_of_first(tiny_model(model_type, num_hidden_layers=1)))


def axes_of_first(model):
    return family_of(model).axes(family_of(model).blocks(model)[0][1])


def possible(model_type, method, axis):
    """Whether the family gives what the method reads; if not, it is refused by name before anything happens."""
    try:
        SSMPruner(tiny_model(model_type, num_hidden_layers=1)).prune(config(method, axis, sparsity=0.0))
    except ConfigurationError as error:
        assert "does not give" in str(error)
        return False
    return True


CASES = [
    (model_type, method, axis)
    for model_type in MODEL_TYPES
    for method in STRUCTURES.names()
    for axis in STRUCTURES.get(method).axes
    if axis in inner_axes(model_type) and possible(model_type, method, axis)
]
every_case = pytest.mark.parametrize("model_type, method, axis", CASES)
every_method = pytest.mark.parametrize("method", STRUCTURES.names())
# one axis of every method on every family, for what does not depend on the axis
ONE_AXIS = list({case[:2]: case for case in reversed(CASES)}.values())


def run(model_type, method, axis, **values):
    pruner = SSMPruner(tiny_model(model_type))
    pruner.prune(config(method, axis, **values))
    return pruner


half = functools.cache(run)  # the tests below only look at it


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(PruningReport, "plot", lambda self, path: Path(path).write_bytes(b"no picture"))


def removed(pruner):
    return pruner.report.passes[-1].units["removed"]


@every_case
def test_half_of_every_group_goes(model_type, method, axis):
    pruner, declared = half(model_type, method, axis), axes_of(tiny_model(model_type), axis)
    units = pruner.report.passes[0].units
    assert units["axis"] == axis and len(removed(pruner)) == len(declared)
    for gone, kept, before, of_block in zip(removed(pruner), units["kept"], units["before"], declared):
        per_group = round_half_up(0.5 * of_block.group_size)
        assert before == of_block.units and kept == before - of_block.groups * per_group
        counts = [sum(unit // of_block.group_size == group for unit in gone) for group in range(of_block.groups)]
        assert counts == [per_group] * of_block.groups and sorted(set(gone)) == gone


@every_case
def test_the_report_adds_up_to_all_parameters(model_type, method, axis):
    report, model, dense = (
        half(model_type, method, axis).report,
        half(model_type, method, axis).model,
        tiny_model(model_type),
    )
    assert report.parameters == dense.num_parameters()
    assert report.parameters_after == model.num_parameters()
    assert report.pruned == report.parameters - report.parameters_after > 0 and report.masked == 0
    rows = {row.name: row for row in report.rows}
    for name, parameter in dense.named_parameters():
        left = model.get_parameter(name)
        assert rows[name].elements == parameter.numel() and rows[name].kept == left.numel(), name
        assert rows[name].shape == list(left.shape) and rows[name].reason
        for part, (count, gone) in rows[name].segments.items():
            assert 0 <= gone <= count, part
        if rows[name].segments:
            assert sum(gone for _, gone in rows[name].segments.values()) == rows[name].pruned, name
    assert PruningReport.from_json(report.to_json()).to_json() == report.to_json()
    family = family_of(model)
    states = sum(family.state_elements(block)[0] for _, block in family.blocks(model))
    assert report.recurrent_state_bytes == 4 * states


@every_case
def test_what_is_saved_is_what_was_pruned(model_type, method, axis, tmp_path):
    """Bit for bit, also by its greedy tokens; another prune() can follow on what is loaded."""
    pruner = half(model_type, method, axis)
    pruner.save_pretrained(tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded).__name__ == type(pruner.model).__name__
    assert (type(loaded).__module__.startswith("transformers.")) == (pruner.report.loads_with == "transformers")
    for (name, one), (other_name, other) in zip(pruner.model.named_parameters(), loaded.named_parameters()):
        assert name == other_name and torch.equal(one, other), name
    assert torch.equal(logits(loaded, IDS), logits(pruner.model, IDS))
    assert torch.equal(generate(loaded, IDS[:, :4]), generate(pruner.model, IDS[:, :4]))
    again = SSMPruner.from_pretrained(tmp_path / "out")
    assert again.report.to_json() == pruner.report.to_json() and again.masks == {}


@every_case
def test_decoding_token_by_token_is_the_full_forward(model_type, method, axis):
    model = half(model_type, method, axis).model
    torch.testing.assert_close(decoded(model, IDS), logits(model, IDS), atol=1e-4, rtol=0)


@every_case
def test_the_same_config_gives_the_same_model(model_type, method, axis):
    one, other = half(model_type, method, axis), run(model_type, method, axis)
    assert removed(one) == removed(other)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters()))


@every_case
def test_a_sparsity_of_nothing_leaves_the_model_bit_for_bit(model_type, method, axis):
    pruner, dense = run(model_type, method, axis, sparsity=0.0), tiny_model(model_type)
    assert type(pruner.model) is type(dense) and pruner.report.pruned == 0
    assert pruner.report.loads_with == "transformers"
    for (name, one), (other_name, other) in zip(pruner.model.named_parameters(), dense.named_parameters()):
        assert name == other_name and torch.equal(one, other), name
    assert torch.equal(logits(pruner.model, IDS), logits(dense, IDS))


@pytest.mark.parametrize(
    "model_type, method, axis", [c for c in CASES if c[1] != "random" and not STRUCTURES.get(c[1]).merges]
)
def test_scores_move_with_the_units(model_type, method, axis):
    """Units that change places within their group take their scores along; the control alone does not know them."""
    model = tiny_model(model_type)
    orders = [within_groups(declared, seed) for seed, declared in enumerate(axes_of(model, axis))]
    if (
        method == "minitron" and axis == "head_dim"
    ):  # the same dims in all heads: they change places in all of them alike
        orders = [(order[:8] + 8 * torch.arange(8)[:, None]).flatten() for order in orders]
    before = scores_of(model, method, axis, IDS, batch_size=2)
    after = scores_of(permuted(model, axis, orders), method, axis, IDS, batch_size=2)
    for one, other, order in zip(before, after, orders):
        torch.testing.assert_close(other, one[order], rtol=1e-3, atol=1e-5 * float(one.abs().max()))
        assert one.unique().numel() > 1, "the scores tell units apart"


@every_case
def test_kept_sizes_are_multiples(model_type, method, axis):
    size = axes_of(tiny_model(model_type), axis)[0].group_size
    if size % 2 or size < 4:
        with pytest.raises(ConfigurationError, match="leaves nothing to remove"):
            run(model_type, method, axis, multiple_of=size)
        return
    pruner = run(model_type, method, axis, sparsity=0.61, multiple_of=2, sequential=False)
    declared, units = axes_of(tiny_model(model_type), axis), pruner.report.passes[0].units
    wanted = size - round_half_up(0.61 * size)
    assert units["kept"] == [of_block.groups * (wanted + wanted % 2) for of_block in declared]


@pytest.mark.parametrize("allocation", SPREADING)
@pytest.mark.parametrize("model_type, method, axis", ONE_AXIS)
def test_blocks_of_their_own_sizes_meet_the_budget_together(model_type, method, axis, allocation, tmp_path):
    if STRUCTURES.get(method).merges:
        with pytest.raises(ConfigurationError, match="uniform_sizes=False compares blocks by scores"):
            run(model_type, method, axis, uniform_sizes=False)
        return
    declared = axes_of(tiny_model(model_type), axis)
    total = sum(of_block.group_size for of_block in declared)
    try:
        pruner = run(model_type, method, axis, sparsity=0.4, uniform_sizes=False, allocation=allocation)
    except ConfigurationError as error:
        assert allocation == "last" and "scores can be negative" in str(error)
        return
    kept = [count // of_block.groups for count, of_block in zip(pruner.report.passes[0].units["kept"], declared)]
    assert sum(kept) == total - round_half_up(0.4 * total) and min(kept) >= 1
    pruner.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded, IDS), logits(pruner.model, IDS))
    torch.testing.assert_close(decoded(loaded, IDS), logits(loaded, IDS), atol=1e-4, rtol=0)
    assert len(set(kept)) == 1 or pruner.report.loads_with == "optimum_ssm"


@pytest.mark.parametrize("model_type, method, axis", ONE_AXIS)
def test_the_users_model_is_left_as_it_was_but_for_its_weights(model_type, method, axis):
    model = tiny_model(model_type).train()
    family = family_of(model)
    modelling = sys.modules[type(family.mixer(family.blocks(model)[0][1])).__module__]
    model.requires_grad_(False)
    model.base_model.embeddings.weight.requires_grad_(True)
    model.config.use_cache = True
    scan, keys, state = getattr(modelling, family.scan), list(model.state_dict()), torch.get_rng_state()
    outside = {name: parameter for name, parameter in model.named_parameters() if ".layers." not in name}
    values = {name: parameter.detach().clone() for name, parameter in outside.items()}
    SSMPruner(model).prune(config(method, axis))
    own_norm = STRUCTURES.get(
        method
    ).merges  # which the fused training kernel would not respect: these mixers stay in eval
    assert all(module.training for name, module in model.named_modules() if not (own_norm and name.endswith("mixer")))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["backbone.embeddings.weight"]
    assert model.config.use_cache is True
    assert getattr(modelling, family.scan) is scan
    assert list(model.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, parameter in outside.items():
        assert model.get_parameter(name) is parameter and torch.equal(parameter, values[name])
    assert model.lm_head.weight is model.base_model.embeddings.weight
    for module in model.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@every_method
def test_every_method_says_what_it_is(method):
    entry = STRUCTURES.get(method)
    assert issubclass(entry, StructuredMethod) and entry.__doc__ and entry.summary and entry.source
    assert entry.axes and set(entry.axes) <= set(AXES)
    assert entry.default_allocation in SPREADING


@every_method
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_axes_that_the_family_or_the_method_lacks_are_refused_by_name(method, model_type):
    entry = STRUCTURES.get(method)
    for axis in set(AXES) - {"block"}:
        if axis not in entry.axes:
            with pytest.raises(ConfigurationError, match=f"method '{method}' does not score axis '{axis}'. Allowed: "):
                config(method, axis)
        elif axis not in inner_axes(model_type):
            with pytest.raises(ConfigurationError, match=f"has no axis '{axis}'; it has: "):
                run(model_type, method, axis)
