# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""AIRE is LAST with another gain; what they share is in test_last.py."""

import torch

from ...conftest import tiny_model
from ...structured import scores_of


def test_slow_and_fast_states_weigh_otherwise_than_in_last(token_ids):
    """A slow state's largest gain grows with 1/α², the energy of its response with 1/α only."""
    model, ids = tiny_model("mamba"), token_ids()
    for block in model.base_model.layers:
        block.mixer.A_log.data[:, 0], block.mixer.A_log.data[:, 1:] = -6.0, 1.0
    for last, aire in zip(scores_of(model, "last", "state", ids), scores_of(model, "aire", "state", ids)):
        assert last[0] / aire[0] > 50 * (last[1:] / aire[1:]).max()
        torch.testing.assert_close((last / aire)[1:], (last / aire)[1:2].expand(7), rtol=1e-4, atol=0)
