# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods.gradient_magnitude import GradientMagnitude
from optimum_ssm.sparsity.selection import Selection


def test_scores_are_the_magnitude_times_a_power_of_the_gradient():
    weight, gradient = torch.randn(5, 7), torch.rand(5, 7)
    for alpha in (0.5, 1.0, 2.0):
        scores = GradientMagnitude(alpha=alpha).score(weight, {"grad_abs": gradient}, "linear", Selection(0))
        for i in range(5):
            for j in range(7):
                expected = abs(float(weight[i, j])) * float(gradient[i, j]) ** alpha
                assert float(scores[i, j]) == pytest.approx(expected, rel=1e-5)


def test_alpha_zero_is_global_magnitude_and_needs_no_gradient(make_tiny_model, token_ids):
    assert GradientMagnitude(alpha=0.0).statistics("linear") == ()
    masks = []
    for values in (
        {"method": "gradient_magnitude", "method_kwargs": {"alpha": 0.0}},
        {"method": "magnitude", "scope": "global"},
    ):
        pruner = SSMPruner(make_tiny_model("mamba"))
        pruner.prune(SSMPrunerConfig(sparsity=0.6, dataset=token_ids(), seq_len=24, **values))
        masks.append(pruner.masks)
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_gradients_are_those_of_the_next_token_loss_averaged_over_batches(make_tiny_model, token_ids):
    """The mask, from a plain backward pass per batch through the model."""
    model, ids = make_tiny_model("mamba2"), token_ids(6, 24)
    name = "backbone.layers.1.mixer.out_proj.weight"
    weight = model.get_parameter(name)
    mean = torch.zeros_like(weight)
    for batch in ids.split(2):
        model.zero_grad()
        logits = model(batch, use_cache=False).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        mean += weight.grad.abs() / 3
    scores = (weight.detach().abs() * mean).flatten()
    pruner = SSMPruner(make_tiny_model("mamba2"))
    pruner.prune(
        SSMPrunerConfig(
            method="gradient_magnitude", sparsity=0.5, targets=[name], dataset=ids, seq_len=24, batch_size=2
        )
    )
    mask = pruner.masks[name].flatten()
    assert float(scores[mask].max()) <= float(scores[~mask].min()) * (1 + 1e-4)


def test_a_negative_alpha_is_refused():
    with pytest.raises(ConfigurationError, match="alpha >= 0, got -1"):
        GradientMagnitude(alpha=-1.0)
