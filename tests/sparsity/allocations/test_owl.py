# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""OWL against the formula of its paper (oracle 24)."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.sparsity.allocations.owl import OWL

from .evidence import evidence, linear, summaries_of


def outlier_share(weights, energies, threshold):
    """Share of a block's |W_ij| sqrt(q_j) that exceed `threshold` times their mean, entry by entry."""
    scores = [
        abs(float(weight[i, j])) * float(energy[j]) ** 0.5
        for weight, energy in zip(weights, energies)
        for i in range(weight.shape[0])
        for j in range(weight.shape[1])
    ]
    mean = sum(scores) / len(scores)
    return sum(score > threshold * mean for score in scores) / len(scores)


def heavy_tailed(block, outliers):
    weight = torch.rand(20, 20) + 0.1
    weight.view(-1)[:outliers] = 100.0
    return evidence(weight, block=block, col_energy=torch.ones(20))


def test_a_block_is_measured_by_the_share_of_its_outliers():
    blocks = [[linear(b, "in_proj", (9, 6)), linear(b, "out_proj", (5, 11))] for b in range(3)]
    _, summaries = summaries_of(OWL(threshold=2.0), blocks)
    for block, measured in zip(blocks, summaries[::2]):
        expected = outlier_share([e.weight for e in block], [e.statistics["col_energy"] for e in block], 2.0)
        assert measured == pytest.approx(expected)
        assert measured > 0


def test_the_convolution_is_measured_with_the_energy_of_each_taps_own_input():
    weight, gram = torch.rand(6, 4), torch.rand(6, 4, 4)
    energy = gram.diagonal(dim1=1, dim2=2)
    found = OWL(threshold=1.5).summarise([evidence(weight, "conv1d", kind="conv", conv_gram=gram)], 0.5)
    scores = weight * energy.sqrt()
    assert found == [pytest.approx(float((scores > 1.5 * scores.mean()).float().mean()))]


def test_ratios_follow_the_paper():
    shares, sparsity, strength = [0.01, 0.04, 0.02], 0.6, 0.08
    blocks = [[linear(b)] for b in range(3)]
    items, _ = summaries_of(OWL(), blocks)
    gain = [2 * strength * (share - 0.01) / 0.03 for share in shares]
    kept = [g - sum(gain) / 3 + (1 - sparsity) for g in gain]
    assert OWL(strength=strength).ratios(items, shares, sparsity) == pytest.approx([1 - k for k in kept])


def test_identical_blocks_get_the_uniform_share():
    blocks = [[heavy_tailed(b, 8)] for b in range(4)]
    torch.manual_seed(1)
    items, summaries = summaries_of(OWL(), blocks)
    assert OWL().ratios(items, summaries, 0.7) == [0.7] * 4


def test_more_outliers_keep_more_within_twice_the_strength_and_the_mean_is_the_sparsity():
    blocks = [[heavy_tailed(b, outliers)] for b, outliers in enumerate((3, 1, 9, 5))]
    for strength in (0.02, 0.08, 0.3):
        items, summaries = summaries_of(OWL(strength=strength), blocks)
        ratios = OWL(strength=strength).ratios(items, summaries, 0.5)
        assert ratios[2] < ratios[3] < ratios[0] < ratios[1]
        assert max(ratios) - min(ratios) == pytest.approx(2 * strength)
        assert sum(ratios) / 4 == pytest.approx(0.5)


def test_all_weights_of_a_block_share_its_ratio():
    blocks = [[heavy_tailed(b, 3 * b + 1), linear(b, "out_proj", scale=1e-3)] for b in range(3)]
    items, summaries = summaries_of(OWL(), blocks)
    ratios = OWL().ratios(items, summaries, 0.5)
    assert ratios[::2] == ratios[1::2]


@pytest.mark.parametrize("kwargs", [{"threshold": 0.0}, {"strength": -0.1}, {"strength": 0.6}])
def test_parameters_out_of_range_are_refused_with_what_is_allowed(kwargs):
    with pytest.raises(ConfigurationError, match=r"threshold > 0 and strength in \[0, 0.5\]"):
        OWL(**kwargs)
