# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Fluctuations by two passes over the inputs, standardised within a block; budgets without one too many."""

import pytest
import torch

from optimum_ssm.errors import CalibrationError, ConfigurationError
from optimum_ssm.methods.structures import STRUCTURES

from ...conftest import tiny_model
from ...reference import trace
from ...structured import biased, prune, scores_of


AXES = [("mamba", "channel", 1), ("mamba2", "head", 8), ("mamba2", "head_dim", 1)]


def naive(seen, mixer, metric, width):
    u = seen["out_proj"].flatten(0, 1)
    weight = mixer.out_proj.weight.detach().double()
    variance = torch.stack([((u[:, c] - u[:, c].sum() / len(u)) ** 2).sum() / len(u) for c in range(u.shape[1])])
    values = {
        "IFV": variance,
        "WIFV": variance * weight.norm(dim=0) ** 2,
        "WIFN": weight.abs().mean(0) * u.square().mean(0).sqrt(),
    }[metric] ** 2
    return ((values - values.mean()) / values.std()).reshape(-1, width).mean(1)


@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
@pytest.mark.parametrize("model_type, axis, width", AXES)
def test_it_is_that_of_two_passes(model_type, axis, width, metric, token_ids):
    """Collected in batches of 3 and 1."""
    model, ids = biased(model_type), token_ids()
    found = scores_of(model, "flap", axis, ids, batch_size=3, method_kwargs={"metric": metric})
    for block, scores, seen in zip(model.base_model.layers, found, trace(model, ids)[0]):
        torch.testing.assert_close(scores, naive(seen, block.mixer, metric, width), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.7])
def test_over_all_blocks_exactly_the_share_goes(sparsity, token_ids):
    """AL-AM: round(p ΣH) heads, not one more."""
    model, ids = tiny_model("mamba2", n_groups=1, num_hidden_layers=3), token_ids()
    pruner = prune(model, ids, method="flap", axis="head", sparsity=sparsity, uniform_sizes=False)
    units = pruner.report.passes[0].units
    assert sum(units["before"]) - sum(units["kept"]) == int(sparsity * 24 + 0.5)
    assert pruner.report.passes[0].config["allocation"] is None


def test_over_all_blocks_the_lowest_go(token_ids):
    """But for the best head of every block."""
    model, ids = tiny_model("mamba2", n_groups=1, num_hidden_layers=3), token_ids()
    scores = scores_of(model, "flap", "head", ids)
    guarded = torch.cat([s.where(s < s.max(), torch.inf) for s in scores])
    lowest = set(guarded.argsort()[:12].tolist())
    pruner = prune(model, ids, method="flap", axis="head", uniform_sizes=False, sequential=False)
    gone = pruner.report.passes[0].units["removed"]
    assert {8 * block + unit for block, units in enumerate(gone) for unit in units} == lowest


def test_the_scale_of_a_block_does_not_matter(token_ids):
    model, ids = tiny_model("mamba"), token_ids()
    before = scores_of(model, "flap", "channel", ids)
    model.base_model.layers[-1].mixer.out_proj.weight.data *= 8
    torch.testing.assert_close(scores_of(model, "flap", "channel", ids)[-1], before[-1], rtol=1e-4, atol=1e-6)


def test_channels_that_cannot_be_told_apart_are_refused(token_ids):
    model = tiny_model("mamba")
    model.base_model.layers[0].mixer.out_proj.weight.data[:] = 0
    with pytest.raises(CalibrationError, match="flap: the WIFV of all channels is the same"):
        scores_of(model, "flap", "channel", token_ids())


def test_unknown_metrics_are_refused():
    with pytest.raises(ConfigurationError, match="unknown flap metric 'wifv'. Did you mean 'WIFV'"):
        STRUCTURES.build("flap", {"metric": "wifv"}, "method_kwargs")
