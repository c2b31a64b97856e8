# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The mean step of a channel or head."""

import pytest
import torch

from ...reference import trace
from ...structured import biased, scores_of


@pytest.mark.parametrize("model_type, axis", [("mamba", "channel"), ("mamba2", "head")])
def test_it_is_the_mean_over_tokens(model_type, axis, token_ids):
    model, ids = biased(model_type), token_ids()
    for found, seen in zip(scores_of(model, "delta_activity", axis, ids), trace(model, ids)[0]):
        torch.testing.assert_close(found, seen["step"].mean((0, 1)), rtol=1e-5, atol=0)


def test_the_limits_of_the_step_count(token_ids):
    model, ids = biased("mamba2", time_step_limit=(0.15, 0.2)), token_ids()
    for found, seen in zip(scores_of(model, "delta_activity", "head", ids), trace(model, ids)[0]):
        assert (found >= 0.15 - 1e-6).all() and (found <= 0.2 + 1e-6).all()
        torch.testing.assert_close(found, seen["step"].mean((0, 1)), rtol=1e-5, atol=0)
