# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Energy of channels into the projections that read them."""

import pytest
import torch

from ...reference import trace
from ...structured import biased, scores_of


@pytest.mark.parametrize(
    "model_type, axis, width",
    [("mamba", "channel", 1), ("mamba2", "head", 8), ("mamba2", "head_dim", 1), ("mamba2", "group", 32)],
)
def test_it_is_that_of_a_naive_loop(model_type, axis, width, token_ids):
    model, ids = biased(model_type), token_ids()
    for block, found, seen in zip(
        model.base_model.layers, scores_of(model, "energy", axis, ids), trace(model, ids)[0]
    ):
        wanted = torch.zeros(64, dtype=torch.float64)
        for name in ("out_proj", "x_proj")[: 2 if model_type == "mamba" else 1]:
            weight = block.mixer.get_submodule(name).weight.detach().double()
            for channel in range(64):
                wanted[channel] += seen[name][..., channel].square().mean() * weight[:, channel].square().sum()
        torch.testing.assert_close(found, wanted.reshape(-1, width).sum(1), rtol=1e-4, atol=0)
