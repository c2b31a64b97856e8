# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The greedy allocation against an exhaustive search over its own grid."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods.sparsegpt import SparseGPT
from optimum_ssm.sparsity.allocations.error import Error
from optimum_ssm.sparsity.selection import Selection, round_half_up

from ...reference import relative_error
from .evidence import evidence, item, summaries_of


def correlated(block, shape=(10, 12), mixing=1.0, name="in_proj"):
    inputs = torch.randn(80, shape[1]) @ (torch.eye(shape[1]) + mixing * torch.randn(shape[1], shape[1]))
    return evidence(torch.randn(shape), name, block, gram=inputs.T @ inputs / 80)


def test_a_curve_is_the_measured_error_of_the_solver_on_a_grid_around_the_sparsity():
    facts = correlated(0)
    (curve,) = Error(points=3, spread=0.2).summarise([facts], 0.5)
    for ratio, (count, error) in zip((0.3, 0.5, 0.7), curve):
        assert count == round_half_up(ratio * 120)
        pruned = SparseGPT().prune(facts.weight, facts.statistics, "linear", Selection(count))[0]
        assert error == pytest.approx(relative_error(facts.weight, pruned, facts.statistics["gram"]), rel=1e-4)


def test_curves_are_convex_and_keep_their_ends():
    allocation = Error(points=9, spread=0.4)
    for curve in allocation.summarise([correlated(b, mixing=b) for b in range(4)], 0.5):
        slopes = [(e1 - e0) / (c1 - c0) for (c0, e0), (c1, e1) in itertools.pairwise(curve)]
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(slopes))
        assert (curve[0][0], curve[-1][0]) == (round_half_up(0.1 * 120), round_half_up(0.9 * 120))


def test_no_other_point_of_the_grid_with_the_same_budget_has_a_smaller_summed_error():
    blocks = [[correlated(b, mixing=0.5 * b) for _ in range(1)] for b in range(4)]
    allocation = Error(points=5, spread=0.2)
    items, curves = summaries_of(allocation, blocks)
    counts = allocation.counts(items, curves, 0.5)

    def error(curve, count):
        for (c0, e0), (c1, e1) in itertools.pairwise(curve):
            if c0 <= count <= c1:
                return e0 + (e1 - e0) * (count - c0) / (c1 - c0)
        raise AssertionError(count)

    found = sum(error(curve, count) for curve, count in zip(curves, counts))
    best = min(
        sum(e for _, e in choice)
        for choice in itertools.product(*curves)
        if sum(c for c, _ in choice) >= sum(counts)  # at least as much removed
    )
    assert sum(counts) == 240
    assert found <= best + 1e-9


def test_a_weight_that_its_neighbours_can_rebuild_loses_more():
    redundant, independent = correlated(0, mixing=0.0), correlated(1, mixing=0.0)
    shared = torch.randn(200, 2) @ torch.randn(2, 12) + 0.05 * torch.randn(200, 12)
    redundant.statistics["gram"] = shared.T @ shared / 200
    items, curves = summaries_of(Error(), [[redundant], [independent]])
    counts = Error().counts(items, curves, 0.5)
    assert counts[0] > counts[1] and sum(counts) == 120


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.floats(0, 0.999),
    st.sampled_from([1e-6, 1e-3, 0.05, 0.2, 0.9]),
)
def test_the_budget_is_exact_however_small_weights_and_spread_are(sizes, sparsity, spread):
    """Rounding on the grid must not cost or grant an entry."""
    blocks = [
        [evidence(torch.arange(1.0, size + 1)[None], block=b, gram=torch.eye(size))] for b, size in enumerate(sizes)
    ]
    allocation = Error(spread=spread, points=3)
    items, curves = summaries_of(allocation, blocks, sparsity)
    counts = allocation.counts(items, curves, sparsity)
    assert sum(counts) == round_half_up(sparsity * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes))


def test_a_convolution_is_measured_by_the_gram_matrices_of_its_windows():
    allocation = Error()
    assert allocation.statistics("conv", ()) == ("conv_gram",)
    assert allocation.statistics("linear", ()) == ("gram",)
    assert allocation.statistics("a_log", ()) is None
    assert Error(solver="wanda").statistics("linear", ()) == ("gram", "col_energy")


@pytest.mark.parametrize("kwargs", [{"spread": 0.0}, {"spread": 1.0}, {"points": 1}])
def test_parameters_out_of_range_are_refused_with_what_is_allowed(kwargs):
    with pytest.raises(ConfigurationError, match=r"spread in \(0, 1\) and points >= 2"):
        Error(**kwargs)


def test_an_unknown_solver_is_refused_with_the_nearest():
    with pytest.raises(ConfigurationError, match="unknown method 'sparsegtp'.*Did you mean 'sparsegpt'"):
        Error(solver="sparsegtp")


def test_ratios_are_the_counts_as_shares():
    curves = [[(0, 0.0), (10, 1.0)], [(0, 0.0), (10, 0.5)]]
    assert Error().ratios([item(size=10), item(block=1, size=10)], curves, 0.5) == [0.0, 1.0]
