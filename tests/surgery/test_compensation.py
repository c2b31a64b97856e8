# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the output projection makes up for: the mean of the output, or all of it that is linear in what is left."""

import copy

import pytest
import torch
from torch import nn

from optimum_ssm.errors import CalibrationError
from optimum_ssm.methods._quadratic import exact_solve
from optimum_ssm.surgery.compensation import DAMPING, compensate

from .. import reference
from ..conftest import tiny_model
from ..structured import biased, largest, prune


def contributions(model, ids, index=0):
    """What one block adds to the residual stream, (B, L, d), float64."""
    return reference.trace(model, ids)[0][index]["mixed"]


@pytest.mark.parametrize("model_type, axis", [("mamba", "channel"), ("mamba2", "head")])
@pytest.mark.parametrize("use_bias", [False, True])
def test_bias_brings_the_mean_output_to_the_dense_one(model_type, axis, use_bias, token_ids):
    """On the calibration tokens, added to a bias that is there already."""
    model, ids = tiny_model(model_type, num_hidden_layers=1, use_bias=use_bias), token_ids()
    dense = contributions(model, ids).mean((0, 1))
    plain = prune(copy.deepcopy(model), ids, method="flap", axis=axis).model
    assert largest(contributions(plain, ids).mean((0, 1)), dense) > 1e-2
    pruned = prune(model, ids, method="flap", axis=axis, compensation="bias").model
    assert largest(contributions(pruned, ids).mean((0, 1)), dense) < 1e-6
    a, b = (m.base_model.layers[0].mixer.out_proj for m in (plain, pruned))
    assert torch.equal(a.weight, b.weight) and pruned.config.use_bias
    in_proj = pruned.base_model.layers[0].mixer.in_proj
    assert use_bias or not in_proj.bias.any(), "stock classes give in_proj a bias too: zero"


def test_bias_is_that_of_the_published_rule_where_other_inputs_do_not_change(token_ids):
    """FLAP adds W_out[:, removed] times the mean of the removed inputs. Here nothing else reads the channels."""
    model, ids = biased("mamba", num_hidden_layers=1), token_ids()
    block = model.base_model.layers[0]
    block.mixer.x_proj.weight.data[:, :32] = 0
    block.mixer.out_proj.weight.data[:, 32:] *= 50  # these stay
    u = reference.trace(model, ids)[0][0]["out_proj"].mean((0, 1))
    wanted = block.mixer.out_proj.bias.double() + block.mixer.out_proj.weight[:, :32].double() @ u[:32]
    pruned = prune(model, ids, method="energy", compensation="bias")
    assert pruned.report.passes[0].units["removed"] == [list(range(32))]
    assert largest(pruned.model.base_model.layers[0].mixer.out_proj.bias, wanted) < 1e-6


def test_a_constant_channel_is_made_up_for_exactly(token_ids):
    """Its fluctuation is 0, so it goes first, and the bias takes all of its place."""
    model, ids = tiny_model("mamba", num_hidden_layers=1), token_ids()
    mixer = model.base_model.layers[0].mixer
    gone = [3, 17, 40, 41]
    for (
        channel
    ) in gone:  # u = y silu(z) is constant: x is one number by the bias of the convolution, and nothing decays
        mixer.in_proj.weight.data[[channel, 64 + channel]] = 0
        mixer.x_proj.weight.data[:, channel] = 0
    mixer = biased_gate(model, gone)
    before = contributions(model, ids)
    pruned = prune(model, ids, method="flap", axis="channel", sparsity=len(gone) / 64, compensation="bias",
                   method_kwargs={"metric": "IFV"})  # fmt: skip
    assert pruned.report.passes[0].units["removed"] == [gone]
    assert largest(contributions(model, ids), before) < 1e-6
    assert mixer.out_proj.bias is not None


def biased_gate(model, channels):
    """z is one number in these channels; Δ is 0 in them, so that only D x is left of the scan."""
    mixer = model.base_model.layers[0].mixer
    mixer.in_proj.bias = nn.Parameter(torch.zeros(128))
    mixer.in_proj.bias.data[[64 + channel for channel in channels]] = 1.5
    mixer.out_proj.bias = nn.Parameter(torch.zeros(32))
    mixer.use_bias = model.config.use_bias = True
    mixer.dt_proj.weight.data[channels] = 0
    mixer.dt_proj.bias.data[channels] = -100
    return mixer


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
@pytest.mark.parametrize("method", ["random", "state_energy"])
def test_least_squares_never_raises_the_error_of_a_block(model_type, method, token_ids):
    model, ids = tiny_model(model_type, num_hidden_layers=1), token_ids()
    dense = contributions(model, ids)
    plain = prune(copy.deepcopy(model), ids, method=method, axis="state")
    fitted = prune(model, ids, method=method, axis="state", compensation="least_squares")
    assert fitted.report.passes[0].units == plain.report.passes[0].units
    before, after = ((contributions(pruner.model, ids) - dense).square().sum() for pruner in (plain, fitted))
    assert 0 < after < 0.9 * before
    measured = fitted.report.passes[0].block_errors[0]
    assert measured == pytest.approx(float(after / dense.square().sum()), rel=1e-4)


def test_least_squares_is_the_closed_form(token_ids):
    model, ids = biased("mamba", num_hidden_layers=1), token_ids()
    dense = contributions(model, ids)
    plain = prune(copy.deepcopy(model), ids, method="magnitude", axis="channel").model
    seen = reference.trace(plain, ids)[0][0]
    u, lost = seen["out_proj"].flatten(0, 1), (dense - seen["mixed"]).flatten(0, 1)
    gram = u.T @ u / len(u)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    wanted = plain.base_model.layers[0].mixer.out_proj.weight.double() + (lost.T @ u / len(u)) @ damped.inverse()
    fitted = prune(model, ids, method="magnitude", axis="channel", compensation="least_squares").model
    found = fitted.base_model.layers[0].mixer.out_proj
    torch.testing.assert_close(found.weight.double(), wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.bias, plain.base_model.layers[0].mixer.out_proj.bias)


class Shifted(nn.Module):
    """A block whose projection is all there is; the dense one gave something else."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.out_proj = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        return x[..., : self.out_proj.out_features] + self.out_proj(x)


def test_entries_that_are_gone_stay_gone_and_the_others_are_the_best_there_are():
    block, x = Shifted(8, 3).double(), torch.randn(4, 30, 8, dtype=torch.float64)
    gone = torch.rand(3, 8) < 0.5
    block.out_proj.weight.data[gone] = 0
    before = block.out_proj.weight.detach().clone()
    target = torch.randn(3, 8, dtype=torch.float64)
    dense = x[..., :3] + x @ target.T
    rows = x.reshape(-1, 8)
    gram = rows.T @ rows / len(rows)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(8)
    free = (target - before) @ gram @ damped.inverse()
    with torch.no_grad():
        compensate("least_squares", block, "out_proj", zip(x.split(2), dense.split(2)), block, gone=gone)
    assert not block.out_proj.weight[gone].any()
    torch.testing.assert_close(
        block.out_proj.weight.data, before + exact_solve(free, gone, damped), rtol=1e-4, atol=1e-5
    )


def test_samples_of_several_processes_add_up():
    """A process that sees half of the samples gives the same weights once its sums are doubled by the other's."""
    block, x = Shifted(8, 3), torch.randn(2, 30, 8)
    dense = x @ torch.randn(8, 3)
    twin = copy.deepcopy(block)
    with torch.no_grad():
        for kind in ("bias", "least_squares"):
            compensate(kind, block, "out_proj", [(x, dense), (x, dense)], block)
            compensate(kind, twin, "out_proj", [(x, dense)], twin, total=lambda tensor: tensor.mul_(2))
    torch.testing.assert_close(block.out_proj.weight, twin.out_proj.weight)
    torch.testing.assert_close(block.out_proj.bias, twin.out_proj.bias)


def test_inputs_that_are_all_zero_are_refused():
    block = Shifted(4, 2)
    with pytest.raises(CalibrationError, match="no invertible Gram matrix"), torch.no_grad():
        compensate("least_squares", block, "out_proj", [(torch.zeros(1, 5, 4), torch.ones(1, 5, 2))], block)
    assert not block.out_proj._forward_pre_hooks
