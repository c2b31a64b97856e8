# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which units go and how many every block keeps: counts are exact, no block is emptied."""

import itertools

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.sparsity.allocations.global_ import Global
from optimum_ssm.sparsity.allocations.uniform import Uniform
from optimum_ssm.sparsity.allocations.units import (
    highest,
    rank_energies,
    removed_units,
    round_sizes,
    total_size,
    uniform_size,
)


def test_the_lowest_of_every_group_go_and_ties_by_index():
    scores = torch.tensor([3.0, 1, 2, 4, 9, 9, 9, 9])
    assert removed_units(scores, 2, 2).tolist() == [False, True, True, False, True, True, False, False]
    assert removed_units(scores, 1, 3).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert not removed_units(scores, 2, 4).any()


def test_energies_of_a_rank_are_sums_over_groups():
    """Group 0 sorted is 4 3 1, group 1 is 6 5 2: keeping one more in both is worth 10, then 8, then 3."""
    assert rank_energies(torch.tensor([1.0, 4, 3, 6, 2, 5]), 2).tolist() == [10, 8, 3]


def test_the_highest_scores_over_all_blocks_with_the_best_of_each():
    scores = [torch.tensor([0.3, 0.2, 0.1]), torch.tensor([9.0, 8, 7]), torch.tensor([0.25, 0.05])]
    assert highest(scores, 5) == [1, 3, 1]
    assert highest(scores, 3) == [1, 1, 1]
    assert highest(scores, 8) == [3, 3, 2]
    assert highest([torch.ones(3), torch.ones(3)], 4) == [3, 1], "equal scores go to the earlier block"


@pytest.mark.parametrize("keep", range(3, 13))
def test_global_keeps_what_a_sort_of_all_scores_keeps(keep):
    energies = [torch.rand(4, dtype=torch.float64).sort(descending=True).values * scale for scale in (1, 5, 0.1)]
    every = sorted(
        ((float(e) if k else float("inf"), -b, -k) for b, es in enumerate(energies) for k, e in enumerate(es))
    )
    kept = [-b for _, b, _ in every[::-1][:keep]]
    found = Global().kept_units(energies, keep)
    assert found == [kept.count(block) for block in range(3)] and sum(found) == keep


def test_uniform_spreads_what_cannot_be_split_evenly():
    counts = Uniform().kept_units([torch.ones(8), torch.ones(8), torch.ones(8)], 13)
    assert sum(counts) == 13 and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "size, sparsity, multiple, keep",
    [
        (8, 0.5, 1, 4),
        (24, 1 / 3, 1, 16),
        (16, 0.4, 4, 12),
        (5, 0.5, 1, 2),
        (128, 0.5, 16, 64),
        (24, 0.5, 16, 16),
        (7, 0.1, 1, 6),
    ],
)
def test_sizes_are_rounded_up_to_the_multiple(size, sparsity, multiple, keep):
    """5 at one half: round(2.5) = 3 go, half up."""
    assert uniform_size(size, sparsity, multiple) == keep


def test_sizes_that_cannot_be_are_refused_with_what_could():
    with pytest.raises(ConfigurationError, match="sparsity=0.999 leaves none of 8 units"):
        uniform_size(8, 0.999, 1)
    with pytest.raises(ConfigurationError, match="leaves nothing to remove: 4 of 8 .* such as multiple_of=4"):
        uniform_size(8, 0.5, 16)


@pytest.mark.parametrize("kept", list(itertools.product((1, 2, 3, 5, 8, 11, 12), repeat=3))[::7])
def test_rounded_sizes_come_as_near_as_multiples_can(kept):
    """Never fewer in all than asked for, and no sum of multiples between."""
    sizes, multiple = [12, 12, 12], 4
    rounded = round_sizes(list(kept), sizes, multiple)
    reachable = {sum(choice) for choice in itertools.product((4, 8, 12), repeat=3)}
    assert all(size % multiple == 0 and 4 <= size <= 12 for size in rounded)
    assert sum(rounded) == min(total for total in reachable if total >= sum(kept))


def test_rounding_keeps_exact_multiples_and_whole_blocks():
    assert round_sizes([4, 8, 12], [12, 12, 12], 4) == [4, 8, 12]
    assert round_sizes([3, 10, 7], [12, 10, 12], 1) == [3, 10, 7]
    assert round_sizes([6, 6], [6, 6], 4) == [6, 6], "a block that is no multiple may stay whole"
    assert round_sizes([2, 3], [3, 3], 4) == [3, 3], "one that is smaller than the multiple stays whole"
    assert round_sizes([5, 7], [12, 12], 4) == [4, 8], "the larger remainder is rounded up"


def test_blocks_of_their_own_sizes_share_one_count():
    assert total_size([8, 8, 8], 0.4, 1) == 14
    assert total_size([16, 16], 0.3, 8) == 22, "24 can be kept"
    assert total_size([10, 4], 0.2, 8) == 11, "12 can: 8 and the small one whole"
    assert total_size([8, 8], 0.0, 16) == 16
    with pytest.raises(ConfigurationError, match="leaves 1 of 16 units for 2 blocks; keep at least one in each"):
        total_size([8, 8], 0.95, 1)
    with pytest.raises(ConfigurationError, match="multiple_of=16 leaves nothing to remove: 8 of 16 units in 2 blocks"):
        total_size([8, 8], 0.5, 16)
    with pytest.raises(ConfigurationError, match="multiple_of=8 leaves nothing to remove"):
        total_size([16, 16], 0.1, 8)
