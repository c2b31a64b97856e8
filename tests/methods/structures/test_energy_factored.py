# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""‖Δ B‖ ‖C‖ over tokens, without the recurrence."""

import pytest
import torch

from ...reference import trace
from ...structured import biased, scores_of


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_it_is_that_of_a_naive_loop(model_type, token_ids):
    model, ids = biased(model_type), token_ids()
    for found, seen in zip(scores_of(model, "energy_factored", "state", ids), trace(model, ids)[0]):
        heads, (_, _, groups, states) = seen["step"].shape[-1], seen["B"].shape
        wanted = torch.zeros(groups, states, dtype=torch.float64)
        for head in range(heads):
            group = head * groups // heads
            into = (seen["step"][..., head, None] * seen["B"][:, :, group]).square().sum((0, 1)).sqrt()
            wanted[group] += into * seen["C"][:, :, group].square().sum((0, 1)).sqrt()
        torch.testing.assert_close(found, wanted.flatten(), rtol=1e-4, atol=0)
