# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What becomes of the gated norm's weight when channels go: the factor of the mask, that of the energy, none."""

import copy

import pytest
import torch
from torch.nn import functional as F

from optimum_ssm.surgery.norm import RESCALES, RootMeanSquare, mask_factor, rescale

from .. import reference
from ..conftest import tiny_model
from ..structured import prune


WEIGHT = "mixer.norm.weight"


def norms(model):
    return [block.get_parameter(WEIGHT).detach().clone() for block in model.base_model.layers]


def factors(pruner, before):
    """What every block's kept norm weights were multiplied with, (channels left)."""
    found = []
    for block, old, gone in zip(pruner.model.base_model.layers, before, pruner.report.passes[-1].units["removed"]):
        width = len(old) // pruner.report.passes[-1].units["before"][0]
        keep = torch.ones(len(old) // width, dtype=torch.bool)
        keep[gone] = False
        found.append(block.get_parameter(WEIGHT).detach() / old.reshape(-1, width)[keep].flatten())
    return found


@pytest.mark.parametrize("axis", ["head", "head_dim"])
def test_mask_multiplies_with_the_root_of_the_sizes(axis, token_ids):
    model = tiny_model("mamba2")
    before = norms(model)
    for factor in factors(prune(model, method="random", axis=axis), before):
        torch.testing.assert_close(factor, torch.full_like(factor, 2**0.5))


def test_none_leaves_it(token_ids):
    model = tiny_model("mamba2")
    before = norms(model)
    for factor in factors(prune(model, method="random", axis="head", norm_rescale="none"), before):
        torch.testing.assert_close(factor, torch.ones_like(factor), rtol=0, atol=0)


def roots(model, ids, index):
    """Mean over tokens of the root mean square of v in every norm group of one block, by the reference, (groups)."""
    mixer = model.base_model.layers[index].mixer
    group = getattr(mixer.norm, "group_size", mixer.intermediate_size)
    seen = reference.trace(model, ids)[0][index]
    y = (seen["readout"] * seen["after"]).sum(-1).movedim(0, 1)  # (B, L, H, P)
    drive = seen["conv1d"]
    convolved = (drive * mixer.conv1d.weight.detach().double()[:, 0]).sum(-1) + mixer.conv1d.bias.detach().double()
    x = F.silu(convolved)[..., : mixer.intermediate_size].unflatten(-1, (mixer.num_heads, mixer.head_dim))
    v = (y + mixer.D.detach().double()[:, None] * x).flatten(-2) * F.silu(seen["gate"])
    return v.unflatten(-1, (-1, group)).square().mean(-1).sqrt().mean((0, 1))


@pytest.mark.parametrize("groups", [1, 2])
def test_energy_keeps_the_scale_of_what_leaves_the_norm(groups, token_ids):
    """w' = w E[rms after] / E[rms before], in every group of the norm by itself."""
    model, ids = tiny_model("mamba2", n_groups=groups, num_hidden_layers=1), token_ids()
    dense, before = roots(model, ids, 0), norms(model)
    pruner = prune(model, ids, method="flap", axis="head", norm_rescale="energy")
    (factor,) = factors(pruner, before)
    wanted = (roots(model, ids, 0) / dense).repeat_interleave(len(factor) // len(dense))
    torch.testing.assert_close(factor.double(), wanted, rtol=1e-5, atol=0)
    assert not torch.allclose(factor, torch.full_like(factor, mask_factor(2, 1)), rtol=1e-2)


def test_energy_reads_the_inputs_that_the_pruned_model_gives(token_ids):
    """The second block's factor is taken where its inputs come from a pruned first one."""
    model, ids = tiny_model("mamba2"), token_ids()
    first = prune(copy.deepcopy(model), ids, method="flap", axis="head", norm_rescale="energy")
    other = prune(model, ids, method="flap", axis="head", norm_rescale="energy", sequential=False)
    a, b = (p.model.base_model.layers for p in (first, other))
    assert torch.equal(a[0].mixer.norm.weight, b[0].mixer.norm.weight)
    assert not torch.equal(a[1].mixer.norm.weight, b[1].mixer.norm.weight)


@pytest.mark.parametrize("rescaling", RESCALES)
def test_axes_without_a_norm_do_not_touch_it(rescaling, token_ids):
    model = tiny_model("mamba2")
    before = norms(model)
    prune(model, token_ids(), method="random", axis="state", norm_rescale=rescaling)
    assert all(torch.equal(a, b) for a, b in zip(norms(model), before))


def test_the_watch_sees_the_gate_and_lets_go():
    norm = tiny_model("mamba2", num_hidden_layers=1).base_model.layers[0].mixer.norm
    x, gate = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    watched = RootMeanSquare(norm, 1)
    norm(x, gate)
    norm(x, gate=gate)
    total, tokens = watched.close()
    assert tokens == 12
    torch.testing.assert_close(total / tokens, (x * F.silu(gate)).square().mean(-1).sqrt().double().mean()[None])
    assert not norm._forward_pre_hooks
    assert RootMeanSquare(norm, 2).close()[1] == 0


def test_rescale_keeps_dtype_and_takes_one_factor_per_group():
    block = tiny_model("mamba2", num_hidden_layers=1).to(torch.bfloat16).base_model.layers[0]
    old = block.mixer.norm.weight.detach().clone()
    rescale(block, WEIGHT, 0.7)
    assert block.mixer.norm.weight.dtype == torch.bfloat16
    assert torch.equal(block.mixer.norm.weight.detach(), (old.float() * 0.7).bfloat16())
    block.mixer.norm.weight.data.copy_(old)
    rescale(block, WEIGHT, torch.tensor([0.5, 2.0]))
    assert torch.equal(block.mixer.norm.weight.detach(), torch.cat([old[:32] * 0.5, old[32:] * 2]))
