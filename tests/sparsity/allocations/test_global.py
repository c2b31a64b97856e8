# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from optimum_ssm.sparsity.allocations.global_ import Global

from .evidence import evidence, summaries_of


def brute_force(tensors, total):
    """How many of the `total` smallest magnitudes lie in each tensor, by sorting all of them in one Python list."""
    every = sorted((float(abs(value)), part) for part, tensor in enumerate(tensors) for value in tensor.flatten())
    return [sum(part == wanted for _, part in every[:total]) for wanted in range(len(tensors))]


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.7, 0.999])
def test_one_threshold_over_all_weights_equals_a_sort_of_all_scores(sparsity):
    weights = [0.1 * torch.randn(12, 9), torch.randn(30, 4), 5 * torch.randn(7, 7)]
    items, summaries = summaries_of(Global(), [[evidence(weight, block=i)] for i, weight in enumerate(weights)])
    total = int(sparsity * (108 + 120 + 49) + 0.5)
    counts = Global().counts(items, summaries, sparsity)
    assert counts == brute_force(weights, total)
    assert sum(counts) == total


def test_equal_scores_are_taken_from_the_first_weight():
    weights = [torch.ones(2, 3), torch.ones(2, 3)]
    items, summaries = summaries_of(Global(), [[evidence(weight, block=i)] for i, weight in enumerate(weights)])
    assert Global().counts(items, summaries, 0.75) == [6, 3]


def test_it_asks_for_what_the_method_itself_needs():
    assert Global().statistics("linear", ("gram",)) == ("gram",)
    assert Global().statistics("linear", ()) == ()


def test_ratios_are_the_counts_as_shares():
    weights = [torch.rand(4, 5), 2 + torch.rand(4, 5)]
    items, summaries = summaries_of(Global(), [[evidence(weight, block=i)] for i, weight in enumerate(weights)])
    assert Global().ratios(items, summaries, 0.25) == [0.5, 0.0]
