# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Wanda against a double loop over the formula of its paper (oracle 13), and its variant against a bisection."""

import math

import pytest
import torch

from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.methods.wanda import Wanda
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection


def energies(inputs):
    """(1/T) Σ_t x_{t,j}² of inputs (T, in)."""
    return {"col_energy": inputs.square().mean(0)}


def brute_force(weight, inputs, count):
    """Per row, column by column: |W_ij| ‖X_j‖₂; the `count` lowest of every row go."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(weight.shape[0]):
        metric = []
        for j in range(weight.shape[1]):
            norm = math.sqrt(sum(float(value) ** 2 for value in inputs[:, j]))
            metric.append((abs(float(weight[i, j])) * norm, j))
        for _, j in sorted(metric)[:count]:
            mask[i, j] = True
    return mask


@pytest.mark.parametrize("count", [0, 1, 6, 11])
def test_equals_a_double_loop_over_rows_and_columns(count):
    weight, inputs = torch.randn(7, 12, dtype=torch.float64), torch.randn(30, 12, dtype=torch.float64)
    pruned, mask = Wanda().prune(weight, energies(inputs), "linear", Selection(7 * count, "row"))
    assert torch.equal(mask, brute_force(weight, inputs, count))
    assert torch.equal(pruned, torch.where(mask, 0, weight))


def test_n_m_equals_the_same_loop_inside_every_group():
    weight, inputs = torch.randn(5, 16, dtype=torch.float64), torch.randn(30, 16, dtype=torch.float64)
    for text, removed in (("1:4", 3), ("2:4", 2), ("4:8", 4)):
        pattern = Pattern.parse(text)
        _, mask = Wanda().prune(weight, energies(inputs), "linear", Selection(0, "row", pattern))
        for start in range(0, 16, pattern.group):
            part = slice(start, start + pattern.group)
            assert torch.equal(mask[:, part], brute_force(weight[:, part], inputs[:, part], removed))


def test_equals_magnitude_per_row_when_all_inputs_are_equally_strong():
    weight = torch.randn(9, 16)
    statistics = {"col_energy": torch.full((16,), 0.37)}
    selection = Selection(70, "row")
    assert torch.equal(
        Wanda().prune(weight, statistics, "linear", selection)[1],
        Magnitude().prune(weight, {}, "linear", selection)[1],
    )


def test_is_invariant_when_an_input_grows_and_its_weights_shrink_alike():
    weight, inputs = torch.randn(9, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    scale = torch.logspace(-2, 2, 16, dtype=torch.float64)
    for selection in (Selection(70, "row"), Selection(70), Selection(0, "row", Pattern.parse("2:4"))):
        mask = Wanda().prune(weight, energies(inputs), "linear", selection)[1]
        scaled = Wanda().prune(weight / scale, energies(inputs * scale), "linear", selection)[1]
        assert torch.equal(mask, scaled)


def test_dead_inputs_go_first():
    weight, inputs = 1 + torch.rand(6, 10), torch.randn(40, 10)
    inputs[:, [2, 7]] = 0
    mask = Wanda().prune(weight, energies(inputs), "linear", Selection(12, "row"))[1]
    assert mask[:, [2, 7]].all() and int(mask.sum()) == 12


def test_a_convolution_is_scored_by_the_energy_of_each_taps_own_input():
    weight, windows = torch.randn(5, 4), torch.randn(5, 50, 4)
    gram = windows.transpose(1, 2) @ windows / 50
    scores = Wanda().score(weight, {"conv_gram": gram}, "conv", Selection(0))
    for channel in range(5):
        for tap in range(4):
            rms = math.sqrt(float(windows[channel, :, tap].square().mean()))
            assert float(scores[channel, tap]) == pytest.approx(abs(float(weight[channel, tap])) * rms, rel=1e-5)


def variant_of_the_paper(metric, sparsity):
    """The released search: bisect alpha from 0.4 in [0, 0.8]; per row prune the prefix of ascending scores whose sum is
    at most alpha times the row's. A row without such a prefix prunes nothing."""
    ordered, order = metric.sort(dim=1, stable=True)
    sums = ordered.cumsum(1)

    def at(alpha):
        inside = sums <= alpha * metric.sum(1, keepdim=True)
        return torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, inside)

    low, high, alpha = 0.0, 0.8, 0.4
    mask = at(alpha)
    while abs(float(mask.double().mean()) - sparsity) > 1e-3 and high - low >= 1e-3:
        low, high = (low, alpha) if float(mask.double().mean()) > sparsity else (alpha, high)
        alpha = (low + high) / 2
        mask = at(alpha)
    return mask


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7])
def test_variant_meets_its_budget_exactly_and_agrees_with_the_published_bisection(sparsity):
    weight, inputs = torch.randn(60, 48, dtype=torch.float64), torch.randn(100, 48, dtype=torch.float64)
    weight *= torch.logspace(-1, 1, 60, dtype=torch.float64)[:, None]
    statistics = energies(inputs * torch.logspace(-1, 0.5, 48, dtype=torch.float64))
    metric = weight.abs() * statistics["col_energy"].sqrt()
    published = variant_of_the_paper(metric, sparsity)
    assert abs(float(published.double().mean()) - sparsity) < 5e-3  # the search itself ended well
    method = Wanda(use_variant=True)
    same = method.prune(weight, statistics, "linear", Selection(int(published.sum()), "row"))[1]
    assert torch.equal(same, published)
    count = round(sparsity * weight.numel())
    exact = method.prune(weight, statistics, "linear", Selection(count, "row"))[1]
    assert int(exact.sum()) == count
    assert int((exact ^ published).sum()) == abs(count - int(published.sum()))  # one is a prefix of the other


def test_variant_lets_rows_lose_different_shares():
    weight, inputs = torch.randn(30, 20), torch.randn(50, 20)
    weight[:15] = weight[:15].sign() * torch.logspace(-3, 0, 20)  # rows with a long tail of small entries
    mask = Wanda(use_variant=True).prune(weight, energies(inputs), "linear", Selection(300, "row"))[1]
    assert int(mask.sum()) == 300
    assert mask[:15].sum() > 1.5 * mask[15:].sum()


def test_variant_survives_rows_of_zeros():
    weight = torch.cat([torch.zeros(2, 8), torch.rand(4, 8) + 0.5])
    mask = Wanda(use_variant=True).prune(weight, {"col_energy": torch.ones(8)}, "linear", Selection(20, "row"))[1]
    assert int(mask.sum()) == 20 and mask[:2].all()


def test_masks_are_nested_in_the_budget():
    weight, statistics = torch.randn(8, 12), energies(torch.randn(40, 12))
    for method in (Wanda(), Wanda(use_variant=True)):
        masks = [method.prune(weight, statistics, "linear", Selection(k, "row"))[1] for k in range(0, 97, 8)]
        assert all(not (small & ~large).any() for small, large in zip(masks, masks[1:]))
