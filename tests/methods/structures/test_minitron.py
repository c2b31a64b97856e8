# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Activation norms of x: equal numbers of heads in every group, the same dims in all heads."""

import torch

from ...conftest import tiny_model
from ...reference import trace
from ...structured import biased, prune, scores_of


def activity(seen):
    """sqrt(Σ_s (mean_t abs(x))²) of the x rows before the convolution, (heads, dims)."""
    x = seen["conv1d"][..., :64, -1]
    return x.abs().mean(1).square().sum(0).sqrt().reshape(8, 8)


def test_scores_are_norms_over_the_other_axis(token_ids):
    model, ids = biased("mamba2"), token_ids()
    heads, dims = (scores_of(model, "minitron", axis, ids) for axis in ("head", "head_dim"))
    for of_head, of_dim, seen in zip(heads, dims, trace(model, ids)[0]):
        wanted = activity(seen)
        torch.testing.assert_close(of_head, wanted.square().sum(1).sqrt(), rtol=1e-5, atol=0)
        torch.testing.assert_close(of_dim, wanted.square().sum(0).sqrt().repeat(8), rtol=1e-5, atol=0)


def test_all_heads_keep_the_same_dims(token_ids):
    pruner = prune(tiny_model("mamba2"), token_ids(), method="minitron", axis="head_dim")
    for removed in pruner.report.passes[0].units["removed"]:
        by_head = torch.tensor(removed).reshape(8, 4) - 8 * torch.arange(8)[:, None]
        assert (by_head == by_head[0]).all()


def test_every_group_keeps_as_many_heads(token_ids):
    """One group far stronger than the other loses as many."""
    model = tiny_model("mamba2")
    for block in model.base_model.layers:
        block.mixer.in_proj.weight.data[64:96] *= 10
    for removed in prune(model, token_ids(), method="minitron", axis="head").report.passes[0].units["removed"]:
        assert sum(head < 4 for head in removed) == sum(head >= 4 for head in removed) == 2


def test_dims_first_and_heads_on_the_dims_that_are_left(token_ids):
    """The paper's order as a recipe: the second pass scores heads on what the first one kept."""
    model, ids = tiny_model("mamba2", num_hidden_layers=1), token_ids()
    dense = activity(trace(model, ids)[0][0])
    pruner = prune(model, ids, {"method": "minitron", "axis": "head_dim"}, {"method": "minitron", "axis": "head"})
    dims, heads = (done.units["removed"][0] for done in pruner.report.passes)
    kept = [p for p in range(8) if p not in dims[:4]]
    score = dense[:, kept].norm(dim=1).reshape(2, 4)
    wanted = score.argsort(1)[:, :2] + torch.tensor([[0], [4]])
    assert sorted(wanted.flatten().tolist()) == heads
    # 4 heads of 4 dims, 2 groups of 8 states: in_proj, conv1d with bias, A_log, D, dt_bias, norm, out_proj
    wanted = (2 * 16 + 32 + 4) * 32 + (16 + 32) * 5 + 3 * 4 + 16 + 32 * 16
    assert sum(p.numel() for p in model.base_model.layers[0].mixer.parameters()) == wanted
