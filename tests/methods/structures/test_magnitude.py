# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Norms of what units own."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods.structures import STRUCTURES

from ...structured import biased, scores_of


def rows(mixer, model_type, sides):
    """B and C rows of every state, (states, d) each."""
    if model_type == "mamba":
        weight, start, count = mixer.x_proj.weight, 6, 8
    else:
        weight, start, count = mixer.in_proj.weight, 128, 16
    weight = weight.detach().double()
    return [weight[start + side * count : start + (side + 1) * count] for side in sides]


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_of_a_state_it_is_the_product_of_the_norms_of_b_and_c(model_type):
    model = biased(model_type)
    found = scores_of(model, "magnitude", "state", None)
    sums = scores_of(model, "magnitude", "state", None, method_kwargs={"norm": "sum_abs"})
    for block, product, total in zip(model.base_model.layers, found, sums):
        b, c = rows(block.mixer, model_type, (0, 1))
        torch.testing.assert_close(product, b.norm(dim=1) * c.norm(dim=1))
        torch.testing.assert_close(total, b.abs().sum(1) + c.abs().sum(1))


def test_of_a_head_it_is_the_norm_of_all_its_linear_weights():
    """Rows of z, x and dt, columns of out_proj; no convolution, no bias, no norm."""
    model = biased("mamba2")
    for block, found in zip(model.base_model.layers, scores_of(model, "magnitude", "head", None)):
        for head in range(8):
            of = slice(8 * head, 8 * head + 8)
            w, out = block.mixer.in_proj.weight.detach().double(), block.mixer.out_proj.weight.detach().double()
            parts = [w[:64][of], w[64:128][of], w[160 + head], out[:, of]]
            torch.testing.assert_close(found[head], sum(part.square().sum() for part in parts).sqrt())


def test_unknown_norms_are_refused():
    with pytest.raises(ConfigurationError, match="unknown magnitude norm 'l2'. Allowed: product, sum_abs"):
        STRUCTURES.build("magnitude", {"norm": "l2"}, "method_kwargs")
