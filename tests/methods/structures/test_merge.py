# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Merging of groups: alignment of states, variants, refusals, and passes before and after."""

import itertools

import pytest
import torch

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.methods.structures._assignment import assignment
from optimum_ssm.methods.structures.base import Units
from optimum_ssm.methods.structures.merge import MergeGroups

from ...growing import grown, heads_of


def config(sparsity=0.5, kwargs=None, **values):
    return SSMPrunerConfig(method="merge", sparsity=sparsity, method_kwargs=kwargs or {}, **values)


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def shuffle_states(model, seed=0):
    """Permute the states inside every group, which changes no output."""
    draw = torch.Generator().manual_seed(seed)
    for block in model.base_model.layers:
        heads = list(heads_of(block))
        for group, states in itertools.product(range(heads[0].shape[0]), [heads[0].shape[1]]):
            order = torch.randperm(states, generator=draw)
            for part in heads:
                part[group] = part[group][order].clone()


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_assignment_is_the_best_of_all_permutations(size):
    for _ in range(20):
        gain = torch.randn(size, size).round(decimals=1)  # with ties
        found = assignment(gain)
        assert sorted(found.tolist()) == list(range(size))
        best = max(sum(float(gain[i, p[i]]) for i in range(size)) for p in itertools.permutations(range(size)))
        assert float(gain[torch.arange(size), found].sum()) == pytest.approx(best, abs=1e-5)


def test_assignment_undoes_a_permutation():
    order = torch.randperm(128)
    assert torch.equal(assignment(torch.eye(128)[order] + 0.1 * torch.rand(128, 128)), order)


def test_aligned_states_merge_without_loss_and_others_do_not(make_tiny_model, token_ids):
    def shuffled():
        _, model = grown(4)
        shuffle_states(model)
        return model

    ids = token_ids()
    before = logits(shuffled(), ids)
    torch.testing.assert_close(before, logits(grown(4)[1], ids), atol=1e-5, rtol=1e-5)
    for align, kept in itertools.product((True, False), (2, 1)):
        model = shuffled()
        SSMPruner(model).prune(config(1 - kept / 4, {"align": align}))
        error = (logits(model, ids) - before).abs().max()
        assert error < 1e-4 if align else error > 1e-2


def units(groups=4, kept=2, states=3):
    shapes = {"in_proj.B": 7, "in_proj.C": 7, "conv1d.B": 4, "conv1d.C": 4}
    parts = {name: torch.randn(groups, states, width) for name, width in shapes.items()}
    return Units("group", groups, 1, groups - kept, parts, {}, {})


@pytest.mark.parametrize("reduce", ["mean", "first", "random"])
def test_shares_of_a_run_add_up_to_one(reduce):
    shares = MergeGroups(reduce=reduce, seed=1).scores(units(6, 2)).reshape(2, 3)
    assert torch.allclose(shares.sum(1), torch.ones(2).double())
    if reduce != "mean":
        assert sorted(shares.flatten().tolist()) == [0, 0, 0, 0, 1, 1]
    assert (shares[:, 0] == (1 / 3 if reduce == "mean" else 1)).all() or reduce == "random"


def test_random_draws_by_seed_and_block():
    draws = [MergeGroups(reduce="random", seed=seed).scores(units(64, 8)) for seed in (0, 1)]
    assert not torch.equal(*draws)
    same = units(64, 8)
    assert torch.equal(*(MergeGroups(reduce="random").scores(same) for _ in range(2)))


def test_without_alignment_states_keep_their_places():
    assert torch.equal(MergeGroups().order(units()), torch.arange(3).repeat(4, 1))


def test_saved_and_loaded_is_the_same_model(make_tiny_model, token_ids, tmp_path):
    model, ids = make_tiny_model("mamba2", n_groups=4), token_ids()
    sizes = [dict(s) for s in SSMPruner(model).report.sizes]
    pruner = SSMPruner(model)
    report = pruner.prune(config(0.75))
    assert not sizes and {entry["n_groups"] for entry in report.sizes} == {1}
    units = {"axis": "group", "before": [4, 4], "kept": [1, 1], "removed": [[1, 2, 3]] * 2, "groups": [1, 1]}
    assert report.passes[0].units == units
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.recurrent_state_bytes == report.dense_state_bytes
    pruner.save_pretrained(tmp_path)
    again = SSMPruner.from_pretrained(tmp_path)
    assert type(again.model) is type(model)
    assert torch.equal(logits(again.model, ids), logits(model, ids))
    for (name, parameter), other in zip(again.model.named_parameters(), model.parameters()):
        assert torch.equal(parameter, other), name


def test_no_sparsity_is_the_identity(make_tiny_model, token_ids):
    model = make_tiny_model("mamba2", n_groups=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert SSMPruner(model).prune(config(0.0)).pruned == 0
    assert type(model).__module__.startswith("transformers.")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reduce", ["mean", "first"])
def test_masks_follow_a_merge(reduce, make_tiny_model, token_ids):
    model, ids = make_tiny_model("mamba2", n_groups=4), token_ids()
    data = {"dataset": ids, "seq_len": 24, "num_samples": 4, "batch_size": 2}
    first = SSMPrunerConfig(method="magnitude", sparsity=0.7, targets=["in_proj", "conv1d", "out_proj"])
    pruner = SSMPruner(model)
    report = pruner.prune(
        [first, config(0.5, {"reduce": reduce}), SSMPrunerConfig(method="wanda", sparsity=0.8, **data)]
    )
    assert set(pruner.masks) <= set(dict(model.named_parameters()))
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_parameter(name) == 0, mask), name
        row = next(row for row in report.rows if row.name == name)
        assert row.pruned == row.elements - int((~mask).sum())
    assert sum(done.removed for done in report.passes) == report.pruned


@pytest.mark.parametrize("compensation", ["bias", "least_squares"])
def test_compensation_brings_the_output_nearer(compensation, make_tiny_model, token_ids):
    ids, errors = token_ids(8, 24), []
    for kind in (None, compensation):
        model = make_tiny_model("mamba2", n_groups=4)
        values = {"dataset": ids, "seq_len": 24, "num_samples": 8, "batch_size": 4, "compensation": kind}
        before = logits(model, ids)
        SSMPruner(model).prune(config(0.5, **values))
        errors.append(float((logits(model, ids) - before).square().mean()))
    assert errors[1] < errors[0]


def test_compensation_leaves_removed_entries_removed(make_tiny_model, token_ids):
    data = {"dataset": token_ids(8, 24), "seq_len": 24, "num_samples": 8, "batch_size": 4}
    pruner = SSMPruner(make_tiny_model("mamba2", n_groups=4))
    pruner.prune(
        [
            SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["out_proj"]),
            config(0.5, compensation="least_squares", **data),
        ]
    )
    for name, mask in pruner.masks.items():
        assert torch.equal(pruner.model.get_parameter(name) == 0, mask)


@pytest.mark.parametrize(
    "kind, changes, sparsity, message",
    [
        ("mamba2", {"n_groups": 1}, 0.5, "n_groups = 1"),
        ("mamba2", {"n_groups": 4}, 0.25, r"4 groups cannot be merged to 3.*Allowed: 1, 2 \(sparsity 0.5, 0.75\)"),
        ("mamba", {}, 0.5, "no axis 'group'"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(kind, changes, sparsity, message, make_tiny_model):
    with pytest.raises(ConfigurationError, match=message):
        SSMPruner(make_tiny_model(kind, **changes)).prune(config(sparsity))


@pytest.mark.parametrize(
    "kwargs, message",
    [({"reduce": "median"}, "Allowed: mean, first, random"), ({"reduce": "first", "align": True}, "align")],
)
def test_unknown_options_are_refused(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        config(0.5, kwargs)


def test_blocks_stay_alike(make_tiny_model):
    with pytest.raises(ConfigurationError, match="uniform_sizes=False"):
        SSMPruner(make_tiny_model("mamba2")).prune(config(0.5, uniform_sizes=False))
