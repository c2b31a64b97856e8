# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SparseSSM's allocation against Eq. 7 of its paper (oracle 24)."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.sparsity.allocations.sensitivity import Sensitivity

from .evidence import item, linear, summaries_of


def ratios_of(allocation, summaries, sparsity=0.5, name="in_proj"):
    return allocation.ratios([item(name, block) for block in range(len(summaries))], summaries, sparsity)


def retention_by_rank(count, alpha, sparsity, most):
    """Eq. 7 written out: what the matrix of every rank keeps, least sensitive first."""
    n = min(most, count // 2)
    kept = [1 - sparsity] * count
    for rank in range(n):
        step = 0.5 if n == 1 else 1 - rank / (n - 1)
        kept[rank] = 1 - sparsity - alpha * step
        kept[count - 1 - rank] = 1 - sparsity + alpha * step
    return kept


@pytest.mark.parametrize("measure", ["sum_sq_diag", "trace"])
def test_the_measure_is_taken_from_the_hessian_diagonal(measure):
    energy = torch.rand(12)
    facts = linear(0)
    facts.statistics["col_energy"] = energy
    hessian = 2 * energy.double()
    expected = (hessian**2).sum() / 12 if measure == "sum_sq_diag" else hessian.sum()
    assert Sensitivity(sensitivity=measure).summarise([facts], 0.5) == [pytest.approx(float(expected))]


@pytest.mark.parametrize("count, most", [(2, 24), (3, 24), (4, 24), (7, 2), (60, 24), (9, 1)])
def test_retention_rises_with_the_rank_as_published(count, most):
    order = torch.randperm(count).tolist()
    ratios = ratios_of(Sensitivity(alpha=0.1, most=most), [float(rank) for rank in order])
    expected = retention_by_rank(count, 0.1, 0.5, most)
    assert ratios == pytest.approx([1 - expected[rank] for rank in order])


def test_alpha_zero_is_uniform():
    assert ratios_of(Sensitivity(alpha=0.0), [3.0, 1.0, 2.0, 5.0]) == [0.5] * 4


@pytest.mark.parametrize("count", range(1, 12))
def test_deviations_cancel_and_follow_the_sensitivity(count):
    summaries = torch.rand(count).tolist()
    ratios = ratios_of(Sensitivity(), summaries, 0.3)
    assert sum(ratios) == pytest.approx(0.3 * count)
    by_sensitivity = [ratio for _, ratio in sorted(zip(summaries, ratios))]
    assert all(a >= b for a, b in zip(by_sensitivity, by_sensitivity[1:]))


def test_a_single_matrix_keeps_the_uniform_share():
    assert ratios_of(Sensitivity(), [1.0]) == [0.5]


def test_in_proj_and_out_proj_are_ranked_apart_and_no_other_weight_is():
    names = ("in_proj", "x_proj", "dt_proj", "out_proj")
    items = [item(name, block) for block in range(4) for name in names]
    summaries = [float(10 * block + k) for block in range(4) for k in range(4)]
    ratios = dict(zip(((i.block, i.name) for i in items), Sensitivity(alpha=0.2).ratios(items, summaries, 0.5)))
    for name in ("in_proj", "out_proj"):
        assert [ratios[block, name] for block in range(4)] == pytest.approx([0.7, 0.5, 0.5, 0.3])
    for name in ("x_proj", "dt_proj"):
        assert [ratios[block, name] for block in range(4)] == [0.5] * 4


def test_segments_of_in_proj_are_ranked_each_by_itself():
    items = [item(name, block) for block in range(2) for name in ("in_proj.z", "in_proj.B")]
    ratios = Sensitivity(alpha=0.1).ratios(items, [1.0, 8.0, 2.0, 4.0], 0.5)
    assert ratios == pytest.approx([0.55, 0.45, 0.45, 0.55])


def test_equal_matrices_keep_the_budget_without_correction():
    blocks = [[linear(b, "in_proj", scale=b + 1.0), linear(b, "out_proj", scale=5.0 - b)] for b in range(4)]
    allocation = Sensitivity(alpha=0.1)
    items, summaries = summaries_of(allocation, blocks)
    wished = [ratio * 240 for ratio in allocation.ratios(items, summaries, 0.5)]
    assert allocation.counts(items, summaries, 0.5) == pytest.approx(wished, abs=1)


@pytest.mark.parametrize("kwargs", [{"alpha": -0.1}, {"alpha": 1.0}, {"most": 0}])
def test_parameters_out_of_range_are_refused_with_what_is_allowed(kwargs):
    with pytest.raises(ConfigurationError, match=r"alpha in \[0, 1\) and most >= 1"):
        Sensitivity(**kwargs)


def test_an_unknown_measure_is_refused_with_the_nearest():
    with pytest.raises(ConfigurationError, match="Did you mean 'trace'.*sum_sq_diag"):
        Sensitivity(sensitivity="tracee")
