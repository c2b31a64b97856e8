# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The output energy of a state is what the scan's output loses with it, to the last digit."""

import copy

import pytest
import torch
from torch.nn import functional as F

from optimum_ssm.surgery.cut import zero_masks

from ...conftest import tiny_model
from ...reference import trace
from ...structured import axes_of, biased, prune, scores_of


MODELS = ("mamba", "mamba2")


def scanned(model, ids, index=0):
    """Σ_n C h of one block, without D x: (L, B, I) or (L, B, H, P)."""
    seen = trace(model, ids)[0][index]
    return (seen["readout"] * seen["after"]).sum(-1)


def by_state(seen, weight=1.0):
    """Σ over everything that reads a state of w (C h)², (states) or (groups · states) in order."""
    energy = (seen["readout"] * seen["after"]).square().sum((0, 1))
    if energy.dim() == 3:
        energy = energy.sum(1)  # over the channels of a head
    energy = energy * weight
    groups = seen["B"].shape[2]
    return energy.reshape(groups, -1, energy.shape[-1]).sum(1).flatten()


@pytest.mark.parametrize("model_type", MODELS)
def test_it_is_that_of_a_naive_loop(model_type, token_ids):
    model, ids = biased(model_type), token_ids()
    for found, seen in zip(scores_of(model, "state_energy", "state", ids), trace(model, ids)[0]):
        torch.testing.assert_close(found, by_state(seen), rtol=1e-4, atol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_weighted_by_what_follows(model_type, token_ids):
    model, ids = biased(model_type), token_ids()
    found = scores_of(model, "state_energy", "state", ids, method_kwargs={"weighted": True})
    for block, scores, seen in zip(model.base_model.layers, found, trace(model, ids)[0]):
        gate = F.silu(seen["gate"]).square().mean((0, 1))
        weight = gate * block.mixer.out_proj.weight.detach().double().square().sum(0)
        rows = seen["step"].shape[-1]
        wanted = by_state(seen, weight.reshape(rows, -1).mean(1)[:, None])
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_of_one_state_it_is_the_squared_change_of_the_output_when_it_goes(model_type, token_ids):
    model, ids = biased(model_type), token_ids()
    energy, dense = by_state(trace(model, ids)[0][0]), scanned(model, ids)
    (axis, *_) = axes_of(model, "state")
    for state in (0, axis.units // 2, axis.units - 1):
        other, removed = copy.deepcopy(model), torch.zeros(axis.units, dtype=torch.bool)
        removed[state] = True
        zero_masks(other.base_model.layers[0], axis, removed)
        lost = (scanned(other, ids) - dense).square().sum()
        torch.testing.assert_close(lost, energy[state], rtol=1e-11, atol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_removed_states_take_their_sum_out_of_the_output_and_nothing_else(model_type, token_ids):
    model, ids = biased(model_type), token_ids()
    (axis, *_), seen = axes_of(model, "state"), trace(model, ids)[0][0]
    removed = torch.rand(axis.units) < 0.4
    other = copy.deepcopy(model)
    zero_masks(other.base_model.layers[0], axis, removed)
    groups, heads = axis.groups, seen["step"].shape[-1]
    of_head = removed.reshape(groups, -1).repeat_interleave(heads // groups, 0)  # (I or H, N)
    of_head = of_head[:, None] if seen["after"].dim() == 5 else of_head
    gone = (seen["readout"] * seen["after"] * of_head).sum(-1)
    assert (scanned(model, ids) - scanned(other, ids) - gone).abs().max() < 1e-12
    assert gone.abs().max() > 1e-3


def test_memoryless_states_lose_what_they_remember(token_ids):
    """y - y' = Σ C dA h_{t-1}: the instantaneous term stays, as A_log = 38 says it."""
    model, ids = biased("mamba"), token_ids()
    other, gone = copy.deepcopy(model), [1, 4, 5]
    other.base_model.layers[0].mixer.A_log.data[:, gone] = 38
    seen = trace(model, ids)[0][0]
    lost = (seen["readout"] * seen["decay"] * seen["before"])[..., gone].sum(-1)
    assert (scanned(model, ids) - scanned(other, ids) - lost).abs().max() < 1e-12
    assert lost.abs().max() > 1e-3


@pytest.mark.parametrize("model_type", MODELS)
def test_memoryless_states_fold_into_one_number_per_token(model_type, token_ids):
    """y of the kept states + q Δ x with q = Σ B C over the folded ones, one number per token and group."""
    model, ids = biased(model_type), token_ids()
    seen, gone = trace(model, ids)[0][0], [0, 3, 6]
    kept = [n for n in range(8) if n not in gone]
    heads, groups = seen["step"].shape[-1], seen["B"].shape[2]
    q = (seen["B"] * seen["C"])[..., gone].sum(-1)
    q = (seen["step"] * q.repeat_interleave(heads // groups, -1))[..., None]
    drive = seen["after"] - seen["decay"] * seen["before"]  # Δ B x
    wanted = (
        seen["readout"] * torch.where(torch.isin(torch.arange(8), torch.tensor(gone)), drive, seen["after"])
    ).sum(-1)
    x = (drive / (seen["step"][..., None, None] if heads == 8 else seen["step"][..., None]) / spread(seen))[..., 0]
    folded = (q if heads == 8 else q[..., 0]) * x
    found = (seen["readout"] * seen["after"])[..., kept].sum(-1) + folded
    assert (found - wanted).abs().max() < 1e-11 * wanted.abs().max().clamp_min(1)


def spread(seen):
    """B for every channel or head, broadcast like the state."""
    maps = seen["B"].repeat_interleave(seen["step"].shape[-1] // seen["B"].shape[2], 2)
    return maps[..., None, :] if seen["after"].dim() == 5 else maps


@pytest.mark.parametrize("method", ["state_energy", "last", "aire", "energy_factored"])
def test_the_split_between_b_and_c_does_not_matter(method, token_ids):
    """B rows times c, C rows over c, another c for every state. Mamba has neither convolution nor activation on them."""
    model, ids = tiny_model("mamba"), token_ids()
    before = scores_of(model, method, "state", ids)
    factor = torch.tensor([0.25, 0.5, 1, 2, 4, 8, 0.125, 16])[:, None]
    for block in model.base_model.layers:
        block.mixer.x_proj.weight.data[6:14] *= factor
        block.mixer.x_proj.weight.data[14:] /= factor
    for a, b in zip(before, scores_of(model, method, "state", ids)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", MODELS)
def test_what_goes_at_a_lower_share_also_goes_at_a_higher_one(model_type, token_ids):
    """On the dense model's activations, so that the statistics are the same."""
    gone = []
    for share in (0.0, 0.125, 1 / 3, 0.5, 0.7, 0.875):
        found = prune(biased(model_type), token_ids(), method="state_energy", sparsity=share, sequential=False)
        units = found.report.passes[0].units
        gone.append([set(removed) for removed in units["removed"]] if units else [set(), set()])
    counts = [sum(map(len, removed)) for removed in gone]
    assert counts[0] == 0 and counts == sorted(set(counts))
    for small, large in zip(gone, gone[1:]):
        assert all(before <= after for before, after in zip(small, large, strict=True))
