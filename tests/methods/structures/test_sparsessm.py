# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Votes over time for whole columns of A_log, from states that are kept in full."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods.structures.base import Units
from optimum_ssm.methods.structures.sparsessm import SparseSSMStates

from ...conftest import tiny_model
from ...reference import trace
from ...structured import prune, scores_of


def saliency(seen, mixer):
    """M_t(n) = Σ_c A_log² Σ_s h²_{t-1}, (L, N)."""
    squared = mixer.A_log.detach().double().square()
    return (seen["before"].square().sum(1) * squared).sum(1)


def test_l2_is_that_of_a_naive_loop(token_ids):
    model, ids = tiny_model("mamba"), token_ids()
    found = scores_of(model, "sparsessm", "state", ids, method_kwargs={"variant": "l2"})
    for block, scores, seen in zip(model.base_model.layers, found, trace(model, ids)[0]):
        torch.testing.assert_close(scores, saliency(seen, block.mixer).sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gone", [2, 4, 6])
def test_v1_removes_the_states_with_most_votes(gone, token_ids):
    model, ids = tiny_model("mamba"), token_ids()
    wanted = []
    for block, seen in zip(model.base_model.layers, trace(model, ids)[0]):
        by_step = saliency(seen, block.mixer)
        votes = torch.zeros(8, dtype=torch.int64)
        for t in range(1, len(by_step)):  # there is no state before step 0
            votes[by_step[t].argsort()[:gone]] += 1
        total = by_step.sum(0)
        order = sorted(range(8), key=lambda n: (-int(votes[n]), float(total[n])))
        wanted.append(sorted(order[:gone]))
    pruner = prune(model, ids, method="sparsessm", axis="state", sparsity=gone / 8, sequential=False)
    assert pruner.report.passes[0].units["removed"] == wanted


@pytest.mark.parametrize("last", [(1.0, 0.5, 2.0), (2.0, 1.0, 0.5)])
def test_every_step_but_the_first_has_a_vote(last):
    """State 0 is lowest at steps 1 and 2 and never again, though its sum is the largest; step 0 votes for state 2."""
    steps = [(1.0, 1.0, 0.0), (0.1, 2.0, 2.0), (0.1, 2.0, 2.0), (90.0, *last[1:])]
    statistics = {("scan", "state_prev"): torch.tensor(steps)[:, None]}
    units = Units("state", 3, 1, 1, {"A_log": torch.full((3, 1, 1), -2.0)}, {"A_log": "a_log"}, statistics)
    scores = SparseSSMStates().scores(units)
    assert scores.argmin() == 0 and -2 < scores[0] <= -1 and scores[1:].sort().values[0] < 0


def test_with_two_tokens_only_one_step_votes_and_both_variants_agree(token_ids):
    removed = [
        prune(tiny_model("mamba"), token_ids(4, 2), method="sparsessm", axis="state", seq_len=2,
              method_kwargs={"variant": variant}).report.passes[0].units["removed"]
        for variant in ("v1", "l2")
    ]  # fmt: skip
    assert removed[0] == removed[1]


@pytest.mark.parametrize("variant", ["v1", "l2"])
def test_mamba2_has_no_columns(variant, token_ids):
    kwargs = {"variant": variant}
    with pytest.raises(ConfigurationError, match="which the mamba2 recurrence does not give"):
        prune(tiny_model("mamba2"), token_ids(), method="sparsessm", axis="state", method_kwargs=kwargs)
