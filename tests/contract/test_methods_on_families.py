# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What every method owes on every family. Entries of the registries are found here, none is listed: a new method or
family is held to all of this by being registered."""

import sys

import pytest
import torch

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.families import FAMILIES, family_of
from optimum_ssm.families.matching import declared_targets
from optimum_ssm.methods import METHODS
from optimum_ssm.methods.base import KINDS, WeightMethod
from optimum_ssm.sparsity.allocations import ALLOCATIONS
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import round_half_up


MODEL_TYPES = sorted(kind for _, family in FAMILIES.items() for kind in family.model_types)
TUNING = [name for name in METHODS.names() if METHODS.get(name).default_reconstruction_epochs]
OF_WEIGHTS = [name for name, entry in ALLOCATIONS.items() if "weights" in entry.spreads]
PATTERNS = {"half": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}

every_method = pytest.mark.parametrize("method", METHODS.names())
every_model = pytest.mark.parametrize("model_type", MODEL_TYPES)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture
def run(make_tiny_model, token_ids):
    """`run(model_type, method, …)`: the pruner after one pass, and the parameters from before it."""

    def prune(model_type, method, **values):
        model = make_tiny_model(model_type)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        config = SSMPrunerConfig(method=method, dataset=token_ids(), seq_len=24, batch_size=2, **values)
        pruner = SSMPruner(model)
        pruner.prune(config)
        return pruner, before

    return prune


def targeted(pruner, names):
    """Declared weights whose short name is among `names`, by parameter name."""
    declared = declared_targets(family_of(pruner.model), pruner.model)
    return {target.parameter: target.weight for target in declared if target.name in names}


def width(parameter):
    return parameter.shape[-1] if parameter.dim() > 1 else 0


def check_budget(pruner, weights, pattern):
    """Half of every group of weights that share a budget, to the entry; sizes of the tiny models are all even."""
    group = Pattern.parse(pattern.get("pattern", "unstructured"))
    removed = {name: int(pruner.masks[name].sum()) if name in pruner.masks else 0 for name in weights}
    sizes = {name: pruner.model.get_parameter(name).numel() for name in weights}
    assert not any(size % 2 for size in sizes.values())
    if group.is_n_m:
        for name in weights:
            columns = width(pruner.model.get_parameter(name))
            fits = columns > 0 and group.fits(columns)
            assert removed[name] == (sizes[name] // 2 if fits else 0), name
            if fits:
                per_group = pruner.masks[name].reshape(-1, group.group).sum(1)
                assert (per_group == group.group - group.keep).all(), name
            else:
                row = next(row for row in pruner.report.rows if row.name == name)
                assert "groups of 4" in row.reason
        return
    shared = [name for name, weight in weights.items() if weight.kind != "a_log"]
    assert sum(removed[name] for name in shared) == round_half_up(0.5 * sum(sizes[name] for name in shared))
    for name in weights.keys() - set(shared):
        assert removed[name] == sizes[name] // 2, name
    assert set(pruner.masks) <= set(weights)


def check_report(pruner, before):
    """Removed and kept add up to every parameter of the model, and what is kept has a reason."""
    report = pruner.report
    assert {row.name for row in report.rows} == set(before)
    assert report.parameters == sum(value.numel() for value in before.values())
    for row in report.rows:
        mask = pruner.masks.get(row.name)
        assert row.pruned == (0 if mask is None else int(mask.sum())), row.name
        assert row.pruned + row.kept == row.elements == before[row.name].numel(), row.name
        assert row.reason, row.name
    assert report.sparsity == sum(int(mask.sum()) for mask in pruner.masks.values()) / report.parameters


def check_weights(pruner, before, method, tuned=False, a_log_fill=38.0):
    """Removed entries hold the fill; nothing else moved but kept entries of methods that say so, and what is in a block
    that was tuned."""
    blocks = tuple(f"{name}." for name, _ in family_of(pruner.model).blocks(pruner.model))
    for name, parameter in pruner.model.named_parameters():
        assert parameter.isfinite().all(), name
        mask = pruner.masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        fill = a_log_fill if name.endswith("A_log") else 0.0
        assert (parameter[mask] == fill).all(), name
        updated = METHODS.get(method).updates_weights and mask.any() and not name.endswith("A_log")
        if not updated and not (tuned and name.startswith(blocks)):
            assert torch.equal(parameter[~mask], before[name][~mask]), f"{name} is kept but changed"


@every_pattern
@every_model
@every_method
def test_default_targets_are_pruned_to_the_budget_and_nothing_else_is(run, method, model_type, pattern):
    pruner, before = run(model_type, method, reconstruction_epochs=0, **PATTERNS[pattern])
    weights = targeted(pruner, METHODS.get(method).default_targets)
    assert weights
    check_budget(pruner, weights, PATTERNS[pattern])
    check_report(pruner, before)
    check_weights(pruner, before, method)
    for name in before:
        if any(word in name for word in ("norm", "bias", "embed", "lm_head")) or name.endswith(".D"):
            assert name not in pruner.masks


@every_pattern
@every_model
@pytest.mark.parametrize("method", TUNING or ["none of them"])
def test_methods_that_tune_blocks_keep_the_budget_and_what_lies_outside_of_blocks(run, method, model_type, pattern):
    if not TUNING:
        pytest.skip("no method tunes blocks by default")
    pruner, before = run(model_type, method, **PATTERNS[pattern])
    check_budget(pruner, targeted(pruner, METHODS.get(method).default_targets), PATTERNS[pattern])
    check_report(pruner, before)
    check_weights(pruner, before, method, tuned=True)


@every_pattern
@pytest.mark.parametrize(
    "method, kind", [(name, kind) for name in METHODS.names() for kind in METHODS.get(name).kinds]
)
@every_model
def test_every_kind_of_weight_that_a_method_claims_is_pruned(run, make_tiny_model, method, kind, model_type, pattern):
    model = make_tiny_model(model_type)
    names = [t.name for t in declared_targets(family_of(model), model) if t.weight.kind == kind and t.block == 0]
    sizes = [
        width(model.get_parameter(t.parameter)) for t in declared_targets(family_of(model), model) if t.name in names
    ]
    if pattern == "2:4" and not any(size and size % 4 == 0 for size in sizes):
        with pytest.raises(ConfigurationError, match="fits none of the targets"):
            run(model_type, method, targets=names, **PATTERNS[pattern])
        return
    pruner, before = run(model_type, method, targets=names, reconstruction_epochs=0, **PATTERNS[pattern])
    weights = targeted(pruner, names)
    assert {weight.kind for weight in weights.values()} == {kind}
    check_budget(pruner, weights, PATTERNS[pattern])
    check_report(pruner, before)
    check_weights(pruner, before, method)


@pytest.mark.parametrize(
    "method, kind", [(name, kind) for name in METHODS.names() for kind in KINDS if kind not in METHODS.get(name).kinds]
)
@every_model
def test_a_kind_of_weight_that_a_method_does_not_claim_is_refused_by_name(run, method, kind, model_type):
    name = {"linear": "in_proj", "conv": "conv1d", "a_log": "A_log"}[kind]
    with pytest.raises(ConfigurationError, match=f"method '{method}' cannot prune {name} .*it prunes: "):
        run(model_type, method, targets=[name], sparsity=0.5)


@every_model
@every_method
def test_a_sparsity_of_nothing_leaves_the_model_bit_for_bit(run, method, model_type):
    pruner, before = run(model_type, method, sparsity=0)
    for name, parameter in pruner.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert pruner.report.pruned == 0


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.7, 0.999])
@every_model
@every_method
def test_any_share_is_met_to_the_entry(run, method, model_type, share):
    pruner, _ = run(model_type, method, sparsity=share, allocation="uniform", scope="tensor", reconstruction_epochs=0)
    for name in targeted(pruner, METHODS.get(method).default_targets):
        assert int(pruner.masks[name].sum()) == round_half_up(share * pruner.masks[name].numel()), name


@pytest.mark.parametrize("allocation", OF_WEIGHTS)
@every_model
@every_method
def test_every_allocation_spends_the_same_budget(run, method, model_type, allocation):
    pruner, before = run(model_type, method, sparsity=0.5, allocation=allocation, reconstruction_epochs=0)
    check_budget(pruner, targeted(pruner, METHODS.get(method).default_targets), PATTERNS["half"])
    check_report(pruner, before)


@every_model
@every_method
def test_rows_within_one_of_each_other_where_rows_compete(run, method, model_type):
    pruner, _ = run(model_type, method, sparsity=1 / 3, scope="row", allocation="uniform", reconstruction_epochs=0)
    for name, weight in targeted(pruner, METHODS.get(method).default_targets).items():
        if weight.kind == "linear":
            per_row = pruner.masks[name].sum(1)
            assert int(per_row.max()) - int(per_row.min()) <= 1, name


@every_model
@every_method
def test_the_users_model_is_left_as_it_was_but_for_its_weights(make_tiny_model, token_ids, method, model_type):
    model = make_tiny_model(model_type).train()
    family = family_of(model)
    modelling = sys.modules[type(family.mixer(family.blocks(model)[0][1])).__module__]
    model.requires_grad_(False)
    first = next(model.parameters())
    first.requires_grad_(True)
    model.config.use_cache = True
    scan, keys, state = getattr(modelling, family.scan), list(model.state_dict()), torch.get_rng_state()
    objects = [id(parameter) for parameter in model.parameters()]
    SSMPruner(model).prune(SSMPrunerConfig(method=method, sparsity=0.5, dataset=token_ids(), seq_len=24))
    assert all(module.training for module in model.modules())
    assert first.requires_grad and not any(p.requires_grad for p in model.parameters() if p is not first)
    assert model.config.use_cache is True
    assert getattr(modelling, family.scan) is scan
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            assert not hooks
    with torch.no_grad():
        assert model.eval()(token_ids(2, 10)).logits.isfinite().all()


@every_model
@every_method
def test_the_same_config_gives_the_same_masks_and_weights(run, method, model_type):
    (first, _), (second, _) = (run(model_type, method, sparsity=0.5) for _ in range(2))
    assert first.masks.keys() == second.masks.keys()
    assert all(torch.equal(first.masks[name], second.masks[name]) for name in first.masks)
    for (name, one), other in zip(first.model.named_parameters(), second.model.parameters()):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("share", [0, 0.1, 1 / 3, 0.5, 0.7, 0.999])
@every_model
def test_one_threshold_over_all_weights_removes_its_count_also_where_all_scores_are_equal(
    make_tiny_model, model_type, share
):
    model = make_tiny_model(model_type)
    weights = [p for name, p in model.named_parameters() if name.endswith(("in_proj.weight", "out_proj.weight"))]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(0.5)
    pruner = SSMPruner(model)
    config = {"method": "magnitude", "sparsity": share, "scope": "global", "targets": ["in_proj", "out_proj"]}
    removed = pruner.prune(config).pruned
    assert removed == sum(int((weight == 0).sum()) for weight in weights)
    assert removed == round_half_up(share * sum(weight.numel() for weight in weights))


NEEDS_GRAM = [n for n, m in METHODS.items() if {"gram", "col_energy"} & set(m().statistics("linear"))]


@pytest.mark.parametrize("method", NEEDS_GRAM)
@every_model
def test_inputs_that_never_fire_go_first_are_counted_and_leave_nothing_that_is_not_finite(
    make_tiny_model, token_ids, method, model_type
):
    """Two dead inputs of one block's in_proj, three that are a million times the others, fewer tokens than inputs."""
    model, ids = make_tiny_model(model_type), token_ids(1, 12)
    block = model.base_model.layers[1]
    with torch.no_grad():
        block.norm.weight[[3, 8]] = 0
        block.norm.weight[:3] *= 1e6
        block.mixer.in_proj.weight[:, :3] *= 1e-6
    config = {"method": method, "sparsity": 0.5, "targets": ["in_proj"], "allocation": "uniform", "dataset": ids}
    pruner = SSMPruner(model)
    pruner.prune(SSMPrunerConfig(**config, seq_len=12, reconstruction_epochs=0))
    weight, mask = block.mixer.in_proj.weight, pruner.masks["backbone.layers.1.mixer.in_proj.weight"]
    assert mask[:, [3, 8]].all() and not weight[mask].any() and weight.isfinite().all()
    assert int(mask.sum()) == weight.numel() // 2


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@every_model
def test_masks_are_nested_in_the_sparsity_on_the_same_statistics(run, method, model_type):
    masks = [run(model_type, method, sparsity=share, sequential=False)[0].masks for share in (0.1, 1 / 3, 0.5, 0.9)]
    for small, large in zip(masks, masks[1:]):
        assert all(not (small[name] & ~large[name]).any() for name in small)


@every_method
def test_every_method_says_what_it_is(method):
    entry = METHODS.get(method)
    assert issubclass(entry, WeightMethod)
    assert entry.__doc__ and entry.summary and entry.source
    assert entry.kinds and set(entry.kinds) <= set(KINDS)
    assert entry.default_scope in ("row", "tensor", "global")
    assert entry.default_allocation in ALLOCATIONS.names()
    for kind in entry.kinds:
        assert entry().fill(kind) in ((None, "zero", "memoryless") if kind == "a_log" else (None,))


@pytest.mark.parametrize("name", ALLOCATIONS.names())
def test_every_allocation_says_what_it_is(name):
    entry = ALLOCATIONS.get(name)
    assert entry.__doc__ and entry.summary and entry.source
