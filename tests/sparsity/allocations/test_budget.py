# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ssm.sparsity.allocations import ALLOCATIONS
from optimum_ssm.sparsity.allocations.budget import exact_counts
from optimum_ssm.sparsity.selection import round_half_up

from .evidence import item, linear, summaries_of


OF_WEIGHTS = [name for name, entry in ALLOCATIONS.items() if "weights" in entry.spreads]


parts = st.lists(st.tuples(st.floats(-1, 2), st.integers(1, 5000)), min_size=1, max_size=15)


@settings(max_examples=200, deadline=None)
@given(parts, st.data())
def test_counts_sum_to_the_budget_and_fit_into_their_parts(drawn, data):
    ratios, sizes = [ratio for ratio, _ in drawn], [size for _, size in drawn]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = exact_counts(ratios, sizes, total)
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes))


@settings(max_examples=100, deadline=None)
@given(parts, st.data())
def test_a_part_that_wishes_more_never_loses_a_smaller_share(drawn, data):
    ratios, sizes = [ratio for ratio, _ in drawn], [size for _, size in drawn]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = exact_counts(ratios, sizes, total)
    shares = sorted((ratio, count, size) for ratio, count, size in zip(ratios, counts, sizes))
    for (_, few, small), (_, many, large) in zip(shares, shares[1:]):
        assert few / small <= many / large + 1 / small + 1 / large  # whole numbers: one entry of either part


def test_wishes_that_meet_the_budget_are_granted_to_the_entry():
    assert exact_counts([0.2, 0.5, 0.8], [100, 100, 100], 150) == [20, 50, 80]


def test_a_common_offset_brings_wishes_to_the_budget():
    assert exact_counts([0.2, 0.5, 0.8], [100, 100, 100], 180) == [30, 60, 90]
    assert exact_counts([0.2, 0.5, 0.9], [100, 100, 100], 190) == [30, 60, 100]  # clipped: the others take the rest


def test_remainders_go_to_the_largest_then_to_the_first():
    assert exact_counts([0.5, 0.5, 0.5], [5, 5, 5], 8) == [3, 3, 2]
    assert exact_counts([0.51, 0.56, 0.51], [10, 10, 10], 16) == [5, 6, 5]


@pytest.mark.parametrize("total", [-1, 11])
def test_a_budget_beyond_the_parts_is_refused(total):
    with pytest.raises(ValueError, match=f"cannot remove {total} of 10"):
        exact_counts([0.5, 0.5], [5, 5], total)


@pytest.mark.parametrize("sparsity", [0, 0.1, 1 / 3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_every_allocation_spends_the_budget_to_the_entry(name, sparsity):
    allocation = ALLOCATIONS.get(name)()
    blocks = [
        [linear(block, "in_proj", (21, 13), 1 + block), linear(block, "out_proj", (13, 7)), linear(block, "x_proj")]
        for block in range(5)
    ]
    items, summaries = summaries_of(allocation, blocks, sparsity)
    items, summaries = [*items, item("A_log", 0, 33, "a_log")], [*summaries, None]
    counts = allocation.counts(items, summaries, sparsity)
    assert all(0 <= count <= entry.size for count, entry in zip(counts, items))
    if name == "uniform":
        assert counts == [round_half_up(sparsity * entry.size) for entry in items]
    else:
        assert sum(counts[:-1]) == round_half_up(sparsity * sum(entry.size for entry in items[:-1]))
    assert counts[-1] == round_half_up(sparsity * 33)  # other units: A_log has a budget of its own


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_a_log_alone_gets_its_exact_share_from_every_allocation(name):
    items = [item("A_log", block, 15, "a_log") for block in range(3)]
    assert ALLOCATIONS.get(name)().counts(items, [None] * 3, 0.5) == [8, 8, 8]
