# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Pruned S5 and S4D layers: cut equals masked, reload, exact budgets, unstable poles, what is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.models.s4d import S4DLayer
from optimum_ssm.models.s5 import S5Layer
from optimum_ssm.surgery.diagonal import modes, prune_diagonal
from optimum_ssm.surgery.diagonal_scores import ALLOCATIONS, METHODS, UNSTABLE, hinf_energy, kept_units

from .diagonal_models import VARIANTS, found, ids, make, slow_counts


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method, allocation", [("last", "last"), ("aire", "global"), ("random", "uniform")])
def test_cut_equals_masked(variant, method, allocation):
    dense = make(variant)
    cut, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    report = prune_diagonal(cut, 0.5, method, allocation=allocation)
    prune_diagonal(masked, 0.5, method, allocation=allocation, mask_only=True)
    with torch.no_grad():
        expected = masked(ids()).logits
        assert (cut(ids()).logits - expected).abs().max() <= 1e-5
        assert (dense(ids()).logits - expected).abs().max() > 1e-3
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, cut))
    assert (report.parameters_before, report.parameters) == (before, after) and after < before
    assert report.sparsity == 0.5 and "50.00%" in str(report)
    assert [len(layer.D) for layer in found(cut)] == [10, 10, 10]


@pytest.mark.parametrize("variant", VARIANTS)
def test_removing_a_state_changes_the_output_by_what_that_state_gave(variant):
    """y - y' is the removed states' own response: the kept states' parameters do not change."""
    layer = found(make(variant))[1]
    parts = [copy.deepcopy(layer) for _ in range(2)]
    report = prune_diagonal(parts[0], 0.5, mask_only=True)
    with torch.no_grad():
        for name in ("C", "C1", "C2"):
            if hasattr(layer, name):
                getattr(parts[1], name).sub_(getattr(parts[0], name))
        parts[1].D.zero_()
        u = torch.randn(2, 15, 10)
        if variant == "s4d":  # its nonlinearity comes after the sum
            length = 15
            torch.testing.assert_close(layer.kernel(length), sum(part.kernel(length) for part in parts))
        else:
            torch.testing.assert_close(layer(u), parts[0](u) + parts[1](u), rtol=0, atol=1e-5)
    assert report.kept == report.states // 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cut_model_reloads_bit_for_bit(variant, tmp_path):
    model = make(variant)
    report = prune_diagonal(model, 0.4)
    kept = [row.kept // (10 if variant == "s4d" else 1) for row in report.rows]
    assert model.config.layer_sizes == kept == [layer.state_size for layer in found(model)]
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.layer_sizes == kept
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert [p.shape for p in again.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["s5", "s4d"])
def test_nothing_and_everything(variant, method):
    model = make(variant)
    before = {name: p.clone() for name, p in model.named_parameters()}
    prune_diagonal(model, 0, method)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.warns(UserWarning, match="3 of 24 units are kept"):
        report = prune_diagonal(model, 1.0, method)
    assert [layer.state_size for layer in found(model)] == [1, 1, 1]
    assert report.kept == (30 if variant == "s4d" else 3)
    assert model(ids()).logits.isfinite().all()


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_does_not_decay_is_never_pruned(method, allocation):
    """The closed form alone would take |λ̄| = 1.2 for a decaying state with a small norm."""
    model = make()
    layer = found(model)[2]
    with torch.no_grad():
        layer.Lambda_re[5], layer.Lambda_im[5] = 2.0, -3.0
        layer.Lambda_re[1] = -1e-6
        layer.B[[1, 5]] *= 1e-3
    unstable = layer.Lambda_im[[1, 5]].clone()
    assert int((modes(layer)[0].abs() >= UNSTABLE).sum()) == 2
    with pytest.warns(UserWarning, match=r"do not decay.*layers\.2\.layer\.0 \(2\)"):
        report = prune_diagonal(model, 0.8, method, allocation=allocation)
    assert set(unstable.tolist()) <= set(layer.Lambda_im.tolist())
    assert report.kept == 24 - 19 and [row.unstable for row in report.rows] == [0, 0, 2]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_states_does_not_matter(variant):
    """The same states go when a layer stores them in another order."""
    model, other = make(variant), make(variant)
    order = torch.randperm(found(model)[0].state_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in found(other):
            both = torch.cat([order, order + len(order)])
            for name in ("Lambda_re", "Lambda_im", "log_step", "B"):
                if hasattr(layer, name):
                    getattr(layer, name).copy_(getattr(layer, name)[order])
            for name in ("C", "C1", "C2", "log_A_real", "A_imag"):
                if hasattr(layer, name):
                    values = getattr(layer, name)
                    values.copy_(values[:, both if values.shape[1] == len(both) else order])
        prune_diagonal(model, 0.5)
        prune_diagonal(other, 0.5)
        torch.testing.assert_close(model(ids()).logits, other(ids()).logits, rtol=0, atol=1e-5)


def test_entries_of_s4d_are_masked_one_by_one():
    model, layer_energies = make("s4d"), []
    for layer in found(model):
        layer_energies.append(hinf_energy(*modes(layer)).flatten())
    report = prune_diagonal(model, 0.5, mask_only=True, s4d_units="entry")
    left = [(layer.C.abs().sum(-1) > 0).flatten() for layer in found(model)]
    assert sum(int(mask.sum()) for mask in left) == report.kept == 120
    assert slow_counts(layer_energies, 120) == [row.kept for row in report.rows]
    assert all(energy[mask].min() >= energy[~mask].max() for energy, mask in zip(layer_energies, left))
    assert len({int(mask.view(10, 8)[c].sum()) for mask in left for c in range(10)}) > 1
    widths = [[len(channel) for channel in row.indices] for row in report.rows]
    assert widths == [mask.view(10, 8).sum(1).tolist() for mask in left]
    with pytest.raises(ConfigurationError, match="needs mask_only=True"):
        prune_diagonal(make("s4d"), 0.5, s4d_units="entry")


def test_ranks_of_s4d_keep_the_best_states_of_every_channel():
    model = make("s4d")
    energies = [hinf_energy(*modes(layer)) for layer in found(model)]
    report = prune_diagonal(model, 0.5)
    for energy, row in zip(energies, report.rows):
        width = row.kept // 10
        assert row.indices == energy.topk(width).indices.sort().values.tolist()
    ranked = [energy.sort(descending=True).values.sum(0) for energy in energies]
    assert slow_counts(ranked, 12) == [row.kept // 10 for row in report.rows]


def test_any_module_with_such_layers_and_what_belongs_to_the_user():
    torch.manual_seed(0)
    mixed = nn.Sequential(S5Layer(6, 16, 2), nn.ReLU(), S4DLayer(6, 8)).train()
    mixed[0].B.requires_grad_(False)
    mixed.double()
    report = prune_diagonal(mixed, 0.5)
    assert [row.kind for row in report.rows] == ["S5Layer", "S4DLayer"]
    assert mixed.training and not mixed[0].B.requires_grad and mixed[0].C1.requires_grad
    assert {p.dtype for p in mixed.parameters()} == {torch.float64}
    mixed(torch.randn(2, 9, 6).double()).sum().backward()
    with pytest.raises(ConfigurationError, match="no S5Layer and no S4DLayer"):
        prune_diagonal(nn.Linear(2, 2), 0.5)


def test_seeds_and_defaults():
    same = [prune_diagonal(make(), 0.5, "random", seed=seed) for seed in (0, 0, 1)]
    kept = [[row.indices for row in report.rows] for report in same]
    assert kept[0] == kept[1] != kept[2]
    defaults = {method: prune_diagonal(make(), 0.5, method).allocation for method in METHODS}
    assert defaults == {"last": "last", "aire": "last", "magnitude": "uniform", "random": "uniform"}


@pytest.mark.parametrize(
    "wrong, allowed",
    [
        ({"method": "hinf"}, "allowed: last, aire, magnitude, random"),
        ({"allocation": "owl"}, "allowed: last, uniform, global"),
        ({"bidirectional": "sum"}, "allowed: mean, energy, reference"),
        ({"s4d_units": "column"}, "allowed: rank, entry"),
        ({"ratio": 50}, "must be from 0 to 1"),
    ],
)
@pytest.mark.parametrize("variant", ["s5", "s4d"])
def test_a_wrong_argument_leaves_the_model_as_it_was(wrong, allowed, variant):
    model = make(variant)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=allowed):
        prune_diagonal(model, **{"ratio": 0.5} | wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_last_beats_the_worst_choice_on_the_output():
    """Keeping the lowest scores instead of the highest must do more harm."""
    good, bad, dense = make(), make(), make()
    prune_diagonal(good, 0.5, allocation="uniform", mask_only=True)
    for layer in found(bad):
        decay, gain = modes(layer)
        worst = kept_units(-hinf_energy(decay, gain), 4)
        with torch.no_grad():
            for C in (layer.C1, layer.C2):
                mask = torch.zeros(8).index_fill_(0, worst, 1)
                C.mul_(mask[:, None])
    with torch.no_grad():
        truth = dense.backbone(ids()).last_hidden_state
        errors = [float((m.backbone(ids()).last_hidden_state - truth).norm()) for m in (good, bad)]
    assert errors[0] < errors[1]
