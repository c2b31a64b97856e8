# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import torch

from optimum_ssm.methods.random import Random
from optimum_ssm.sparsity.selection import Selection


def scores(weight, seed=0):
    return Random(seed=seed).score(weight, {}, "linear", Selection(0))


def test_the_same_seed_draws_the_same_scores_whatever_the_global_state():
    weight = torch.randn(8, 9)
    first = scores(weight)
    torch.rand(7)
    assert torch.equal(first, scores(weight))


def test_another_seed_draws_others():
    weight = torch.randn(8, 9)
    assert not torch.equal(scores(weight, 0), scores(weight, 1))


def test_two_tensors_of_one_shape_get_different_masks():
    assert not torch.equal(scores(torch.randn(8, 9)), scores(torch.randn(8, 9)))


def test_the_global_generator_is_left_alone():
    weight = torch.randn(8, 9)
    before = torch.get_rng_state()
    scores(weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_do_not_follow_the_magnitude():
    weight = torch.randn(100, 100)
    correlation = torch.corrcoef(torch.stack([weight.abs().flatten(), scores(weight).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.05


def test_no_seed_is_too_large():
    weight = torch.randn(4, 4)
    assert not torch.equal(scores(weight, 2**40), scores(weight, 2**40 + 1))
