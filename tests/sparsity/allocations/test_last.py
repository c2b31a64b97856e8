# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LAST's normalisation: what the paper proves of it, and its fast form against the slow one."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.sparsity.allocations.last import Last, last_scores

from .evidence import item


def descending(count, seed=0, scale=1.0):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.rand(count, generator=draw, dtype=torch.float64).exp().sort(descending=True).values


def slow(energies):
    """s_(k) by the definition, O(n²)."""
    return [float(energies[k]) / sum(float(e) for e in energies[: k + 1]) for k in range(len(energies))]


def test_the_fast_form_is_the_slow_one():
    energies = descending(40)
    torch.testing.assert_close(
        last_scores(energies), torch.tensor(slow(energies), dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_facts_of_the_score():
    scores, k = last_scores(descending(30)), torch.arange(1, 31, dtype=torch.float64)
    assert scores[0] == 1
    assert (scores.diff() < 0).all()
    assert (scores <= 1 / k + 1e-15).all()
    torch.testing.assert_close(last_scores(torch.full((30,), 3.7)), 1 / k)
    torch.testing.assert_close(last_scores(1e6 * descending(30)), scores)


def test_energies_of_zero_score_zero():
    assert last_scores(torch.tensor([2.0, 2, 0, 0])).tolist() == [1, 0.5, 0, 0]
    assert last_scores(torch.zeros(3)).tolist() == [0, 0, 0]


def brute_force(energies, keep):
    """The keep highest of all normalised scores, every block's first one guarded; ties to the earlier block."""
    every = sorted(((2.0 if k == 0 else s, -b, -k) for b, es in enumerate(energies) for k, s in enumerate(slow(es))))
    kept = [-b for _, b, _ in every[::-1][:keep]]
    return [kept.count(block) for block in range(len(energies))]


@pytest.mark.parametrize("keep", [3, 4, 7, 12, 20, 24])
def test_the_globally_highest_are_kept_and_no_block_is_emptied(keep):
    energies = [descending(8, seed, scale) for seed, scale in ((0, 1.0), (1, 1e4), (2, 1e-4))]
    energies[1] **= 3  # steeper
    found = Last().kept_units(energies, keep)
    assert found == brute_force(energies, keep)
    assert sum(found) == keep and min(found) >= 1


def test_the_scale_of_a_block_does_not_matter():
    energies = [descending(8, seed) for seed in range(3)]
    scaled = [energy * scale for energy, scale in zip(energies, (1, 1e5, 1e-5))]
    assert Last().kept_units(energies, 11) == Last().kept_units(scaled, 11)


def test_a_block_of_zeros_keeps_one():
    assert Last().kept_units([torch.zeros(4), torch.ones(4)], 5) == [1, 4]


def test_scores_that_are_no_energies_are_refused():
    with pytest.raises(ConfigurationError, match="needs energies, and this method's scores can be negative"):
        Last().kept_units([torch.tensor([1.0, -1.0])], 1)


def test_weights_are_refused():
    with pytest.raises(ConfigurationError, match="spreads units of a structural axis, not weights"):
        Last().ratios([item()], [None], 0.5)
