# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ADMM with a growing mask against a naive float64 version (oracles 15, 19, 20, 44; 17 is in `test_alps.py`)."""

import logging

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods.admm_grad import ADMMGrad
from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection, round_half_up

from ..reference import relative_error


ROWS, COLUMNS = 20, 24
SELECTIONS = {
    "half": Selection(240),
    "70 %": Selection(336),
    "rows": Selection(247, "row"),
    "2:4": Selection(0, pattern=Pattern(2, 4)),
    "1:4": Selection(0, pattern=Pattern(1, 4)),
}
every_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


def correlated_gram(size, tokens=200):
    mix = torch.randn(size, size, dtype=torch.float64) * torch.linspace(1, 0.1, size, dtype=torch.float64)[:, None]
    inputs = torch.randn(tokens, size, dtype=torch.float64) @ mix
    return inputs.T @ inputs / tokens


def growing_mask(scores, share, selection):
    """The lowest `share` of the budget; with N:M among those that the pattern would remove, group by group."""
    if not selection.pattern.is_n_m:
        return selection.narrow(round_half_up(share * selection.count)).mask(scores)
    group, keep = selection.pattern.group, selection.pattern.keep
    candidates = []
    for row in range(len(scores)):
        for start in range(0, scores.shape[1], group):
            order = sorted(range(start, start + group), key=lambda j: float(scores[row, j]))
            candidates += [(float(scores[row, j]), row, j) for j in order[: group - keep]]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for _, row, j in sorted(candidates)[: round_half_up(share * len(candidates))]:
        mask[row, j] = True
    return mask


def naive(weight, gram, selection, gradual=True):
    """methods.md 3.5 in its own orientation (in x out), with the inverse of the paper."""
    norms = gram.diagonal().sqrt()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    matrix = gram / torch.outer(norms, norms) + 0.1 * eye
    dense = (weight * norms).T
    right, inverse = matrix @ dense, torch.linalg.inv(matrix + eye)
    dual, values = torch.zeros_like(dense), dense
    for i in range(20):
        if i < 15:
            share = 1 - (1 - (i + 1) / 15) ** 3 if gradual else 1.0
            mask = growing_mask((values + dual).T.abs(), share, selection).T
        kept = (values + dual).masked_fill(mask, 0)
        dual = dual + values - kept
        values = inverse @ (right + (kept - dual))
    return ((values + dual).masked_fill(mask, 0)).T / norms, mask.T


@every_selection
@pytest.mark.parametrize("gradual", [True, False])
def test_it_is_the_naive_algorithm(selection, gradual):
    weight, gram = torch.randn(ROWS, COLUMNS, dtype=torch.float64), correlated_gram(COLUMNS)
    expected, expected_mask = naive(weight, gram, selection, gradual)
    found, mask = ADMMGrad(gradual=gradual).prune(weight, {"gram": gram}, "linear", selection)
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(found, expected, rtol=0, atol=1e-10)
    rounded, _ = ADMMGrad(gradual=gradual).prune(weight.float(), {"gram": gram.float()}, "linear", selection)
    assert relative_error(weight, rounded, gram) == pytest.approx(relative_error(weight, expected, gram), rel=5e-3)


@every_selection
def test_uncorrelated_inputs_almost_leave_magnitude_and_kept_weights(selection):
    weight, gram = torch.randn(128, 96), torch.eye(96)
    if not selection.pattern.is_n_m:
        selection = selection.narrow(round_half_up(selection.count / ROWS / COLUMNS * weight.numel()))
    found, mask = ADMMGrad().prune(weight, {"gram": gram}, "linear", selection)
    plain, by_magnitude = Magnitude().prune(weight, {}, "linear", selection)
    assert torch.allclose(found[~mask], weight[~mask], atol=5e-3)
    assert (mask == by_magnitude).double().mean() >= 0.95
    assert relative_error(weight, found, gram) <= 1.02 * relative_error(weight, plain, gram)


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_every_group_loses_its_share(pattern):
    pattern = Pattern.parse(pattern)
    weight, gram = torch.randn(ROWS, COLUMNS), correlated_gram(COLUMNS).float()
    found, mask = ADMMGrad().prune(weight, {"gram": gram}, "linear", Selection(0, pattern=pattern))
    zeros = (found == 0).reshape(ROWS, -1, pattern.group).sum(2)
    assert (zeros == pattern.group - pattern.keep).all()
    assert torch.equal(mask, found == 0)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_budget_is_met_to_the_entry(share, scope, ties):
    weight = torch.ones(ROWS, COLUMNS) if ties else torch.randn(ROWS, COLUMNS)
    gram = torch.eye(COLUMNS) if ties else correlated_gram(COLUMNS).float()
    count = round_half_up(share * weight.numel())
    found, mask = ADMMGrad().prune(weight, {"gram": gram}, "linear", Selection(count, scope))
    assert int(mask.sum()) == count and not found[mask].any() and found.isfinite().all()
    if scope == "row":
        assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1


def test_a_budget_of_nothing_leaves_the_weight():
    weight = torch.randn(ROWS, COLUMNS)
    found, mask = ADMMGrad().prune(weight, {"gram": torch.eye(COLUMNS)}, "linear", Selection(0))
    assert found is weight and not mask.any()


def test_ill_conditioned_inputs_give_finite_weights_and_dead_ones_go_first():
    weight = torch.randn(ROWS, COLUMNS)
    direction = torch.logspace(-3, 3, COLUMNS)
    direction[[3, 8]] = 0
    gram = torch.outer(direction, direction)  # rank 1, a dynamic range of 1e6 and two inputs that never fired
    for selection in (Selection(240), Selection(250, "row"), Selection(0, pattern=Pattern(2, 4))):
        found, mask = ADMMGrad().prune(weight, {"gram": gram}, "linear", selection)
        assert found.isfinite().all() and not found[mask].any()
        assert mask[:, [3, 8]].all()
    found, mask = ADMMGrad().prune(weight, {"gram": gram}, "linear", Selection(25))
    assert int(mask[:, [3, 8]].sum()) == 25  # all from dead inputs; those that survive keep their weights
    assert torch.equal(found[:, [3, 8]], weight[:, [3, 8]].masked_fill(mask[:, [3, 8]], 0))
    assert torch.allclose(found[~mask], weight[~mask], rtol=1e-4)
    assert not ADMMGrad().score(weight, {"gram": gram}, "linear", Selection(0))[:, [3, 8]].any()


def test_damping_backs_off_and_gives_up_in_words(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    weight, gram = torch.randn(2, 4), torch.eye(4)
    gram[0, 1] = gram[1, 0] = 2.5  # an eigenvalue of -1.5, below what a ridge of 0.1 and rho of 1 make up for
    found, _ = ADMMGrad().prune(weight, {"gram": gram}, "linear", Selection(4))
    assert found.isfinite().all()
    assert "damping raised to 1" in caplog.text
    gram[0, 1] = gram[1, 0] = 2e4
    with pytest.raises(ValueError, match="not positive definite, not even with 10000 times"):
        ADMMGrad().prune(weight, {"gram": gram}, "linear", Selection(4))
    gram[0, 1] = torch.inf
    with pytest.raises(ValueError, match="Gram matrix holds non-finite values"):
        ADMMGrad().prune(weight, {"gram": gram}, "linear", Selection(4))


def test_the_score_is_the_error_of_pruning_one_entry_alone():
    weight, gram = torch.randn(ROWS, COLUMNS, dtype=torch.float64), correlated_gram(COLUMNS)
    score = ADMMGrad().score(weight, {"gram": gram}, "linear", Selection(0))
    for i, j in [(0, 0), (7, 23), (19, 11)]:
        cut = weight.clone()
        cut[i, j] = 0
        gap = weight - cut
        assert float(score[i, j]) ** 2 == pytest.approx(float(torch.trace(gap @ gram @ gap.T)), rel=1e-12)


def test_channels_of_a_convolution_are_problems_of_their_own():
    weight, gram = torch.randn(40, 4), correlated_gram(4).float()
    for selection in (Selection(80), Selection(83, "row"), Selection(0, pattern=Pattern(2, 4))):
        shared, shared_mask = ADMMGrad().prune(weight, {"gram": gram}, "linear", selection)
        alone, mask = ADMMGrad().prune(weight, {"conv_gram": gram.expand(40, 4, 4)}, "conv", selection)
        assert torch.equal(mask, shared_mask) and torch.allclose(shared, alone, atol=1e-5)
    grams = torch.stack([correlated_gram(4) for _ in range(40)]).float()
    found, mask = ADMMGrad().prune(weight, {"conv_gram": grams}, "conv", Selection(0, pattern=Pattern(2, 4)))
    for channel in (0, 7, 39):
        alone, _ = ADMMGrad(gradual=False).prune(
            weight[[channel]], {"gram": grams[channel]}, "linear", Selection(0, pattern=Pattern(2, 4))
        )
        both, _ = ADMMGrad(gradual=False).prune(
            weight, {"conv_gram": grams}, "conv", Selection(0, pattern=Pattern(2, 4))
        )
        assert torch.allclose(both[[channel]], alone, atol=1e-5)
    assert found.isfinite().all() and (mask.sum(1) == 2).all()


@pytest.mark.parametrize(
    "values", [{"damping": 0.0}, {"rho": -1.0}, {"mask_steps": 0}, {"iterations": 10, "mask_steps": 11}]
)
def test_parameters_out_of_range_are_refused(values):
    with pytest.raises(ConfigurationError, match=f"admm_grad needs .*{next(iter(values))}"):
        ADMMGrad(**values)
