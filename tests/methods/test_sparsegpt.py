# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SparseGPT against explicit re-inversion of the remaining Hessian at every column (oracles 14, 15, 16, 44)."""

import logging

import pytest
import torch

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.errors import CalibrationError, ConfigurationError
from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.methods.sparsegpt import SOLVED_WHOLE, SparseGPT, inverse_factor, triangular_inverse
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection

from ..reference import relative_error


ROWS, COLUMNS = 9, 12


@pytest.fixture
def problem():
    """A weight and the Gram matrix of correlated inputs, float64."""
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    inputs = torch.randn(80, COLUMNS, dtype=torch.float64) @ torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)
    return weight, inputs.T @ inputs / 80


def damped(gram, percdamp=0.01):
    """2Q plus percdamp times the mean of the live diagonal; dead inputs get a diagonal of 1 first."""
    hessian = 2 * gram.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    damping = percdamp * diagonal[~dead].mean()
    return hessian + torch.diag(dead.double()) + damping * torch.eye(len(hessian), dtype=torch.float64)


def step(weight, inverse, j, removed):
    """One exact OBS step for the rows in `removed`: column j goes, the columns on its right compensate."""
    error = torch.where(removed, weight[:, j], 0) / inverse[0, 0]
    weight[:, j:] -= error[:, None] * inverse[0]
    weight[:, j] = torch.where(removed, 0, weight[:, j])


def brute_sweep(weight, gram, mask, percdamp=0.01):
    """Re-inverts Hs[j:, j:] at every column."""
    weight, hessian = weight.clone(), damped(gram, percdamp)
    for j in range(weight.shape[1]):
        step(weight, torch.linalg.inv(hessian[j:, j:]), j, mask[:, j])
    return weight


def brute_choice(weight, gram, counts, blocksize, pattern=Pattern()):
    """Chooses the mask as it goes, block by block or group by group, on the weights as they then are."""
    weight, hessian = weight.clone(), damped(gram)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    width = pattern.group or blocksize
    for block, start in enumerate(range(0, weight.shape[1], width)):
        stop = min(start + width, weight.shape[1])
        inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(start, stop)]
        saliency = torch.stack([weight[:, start + k] ** 2 / inverse[0, 0] for k, inverse in enumerate(inverses)], 1)
        if pattern.is_n_m:
            order = saliency.argsort(dim=1)[:, : pattern.group - pattern.keep]
            mask[:, start:stop] = torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, order, True)
        else:
            chosen = saliency.flatten().argsort()[: counts[block]]
            flat = torch.zeros(saliency.numel(), dtype=torch.bool)
            flat[chosen] = True
            mask[:, start:stop] = flat.reshape(saliency.shape)
        for k, inverse in enumerate(inverses):
            step(weight, inverse, start + k, mask[:, start + k])
    return weight, mask


def exact_solve(weight, gram, mask):
    """Per row the least squares weights on the kept columns: Q_SS w_S = (Q w)_S."""
    solved = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = (~mask[row]).nonzero().flatten()
        target = (gram @ weight[row])[kept]
        solved[row, kept] = torch.linalg.solve(gram[kept][:, kept], target)
    return solved


@pytest.mark.parametrize("blocksize", [1, 4, 5, COLUMNS, 128])
def test_on_a_given_mask_the_blocked_sweep_equals_re_inversion_at_every_column(problem, blocksize):
    weight, gram = problem
    mask = torch.rand(ROWS, COLUMNS) < 0.5
    swept = SparseGPT(blocksize=blocksize).reconstruct(weight, mask, {"gram": gram})
    assert (swept - brute_sweep(weight, gram, mask)).abs().max() <= 1e-10
    assert not swept[mask].any()


@pytest.mark.parametrize(
    "blocksize, counts", [(1, [5, 5] + [4] * 10), (4, [17, 17, 16]), (5, [21, 21, 8]), (12, [50]), (128, [50])]
)
def test_the_mask_is_chosen_on_weights_that_carry_the_errors_from_the_left(problem, blocksize, counts):
    weight, gram = problem
    pruned, mask = SparseGPT(blocksize=blocksize).prune(weight, {"gram": gram}, "linear", Selection(50))
    expected, chosen = brute_choice(weight, gram, counts, blocksize)
    assert torch.equal(mask, chosen)
    assert (pruned - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("blocksize", [4, 8, 128])
@pytest.mark.parametrize("text", ["1:4", "2:4"])
def test_n_m_is_chosen_group_by_group_on_updated_weights(problem, text, blocksize):
    weight, gram = problem
    pattern = Pattern.parse(text)
    pruned, mask = SparseGPT(blocksize=blocksize).prune(
        weight, {"gram": gram}, "linear", Selection(0, "tensor", pattern)
    )
    expected, chosen = brute_choice(weight, gram, None, blocksize, pattern)
    assert torch.equal(mask, chosen)
    assert (pruned - expected).abs().max() <= 1e-10


def test_pruning_the_first_column_alone_is_one_exact_obs_step(problem):
    weight, gram = problem
    mask = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    mask[:, 0] = True
    swept = SparseGPT().reconstruct(weight, mask, {"gram": gram})
    inverse = torch.linalg.inv(damped(gram))
    assert (swept - (weight - weight[:, :1] / inverse[0, 0] * inverse[0])).abs().max() <= 1e-10
    assert (swept - exact_solve(weight, damped(gram), mask)).abs().max() <= 1e-10  # and so the constrained optimum


@pytest.mark.parametrize("blocksize", [4, 12])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_with_white_inputs_it_is_magnitude_inside_its_block_and_kept_weights_stay(blocksize, pattern):
    weight, pattern = torch.randn(16, 12, dtype=torch.float64), Pattern.parse(pattern)
    pruned, mask = SparseGPT(blocksize=blocksize).prune(
        weight, {"gram": torch.eye(12)}, "linear", Selection(96, "tensor", pattern)
    )
    for start in range(0, 12, blocksize):
        block = weight[:, start : start + blocksize]
        expected = Magnitude().prune(block, {}, "linear", Selection(8 * blocksize, "tensor", pattern))[1]
        assert torch.equal(mask[:, start : start + blocksize], expected)
    assert torch.equal(pruned, torch.where(mask, 0, weight))


@pytest.mark.parametrize("seed", range(5))
def test_on_one_mask_exact_solve_is_best_and_the_sweep_beats_the_mask_alone(seed):
    torch.manual_seed(seed)
    weight = torch.randn(24, 32, dtype=torch.float64)
    inputs = torch.randn(200, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64)
    gram = inputs.T @ inputs / 200
    mask = torch.rand(24, 32) < 0.5
    swept = SparseGPT().reconstruct(weight, mask, {"gram": gram})
    best = relative_error(weight, exact_solve(weight, gram, mask), gram)
    assert best <= relative_error(weight, swept, gram) < relative_error(weight, weight.masked_fill(mask, 0), gram)


@pytest.mark.parametrize("share", [0, 0.1, 1 / 3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("blocksize", [5, 128])
@pytest.mark.parametrize("levels", [None, 2])
def test_the_budget_is_exact_over_blocks_also_with_ties(problem, share, blocksize, levels):
    weight, gram = problem
    if levels:
        weight, gram = torch.ones_like(weight), torch.eye(COLUMNS)
    count = int(share * weight.numel() + 0.5)
    pruned, mask = SparseGPT(blocksize=blocksize).prune(weight, {"gram": gram}, "linear", Selection(count))
    assert int(mask.sum()) == count
    assert not pruned[mask].any() and pruned[~mask].all()


@pytest.mark.parametrize("share", [0, 0.1, 1 / 3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("blocksize", [1, 4, 5, 128])
def test_rows_that_compete_alone_lose_the_same_over_all_blocks(problem, share, blocksize):
    weight, gram = problem
    count = int(share * weight.numel() + 0.5)
    mask = SparseGPT(blocksize=blocksize).prune(weight, {"gram": gram}, "linear", Selection(count, "row"))[1]
    per_row = mask.sum(1)
    assert int(per_row.sum()) == count
    assert int(per_row.max()) - int(per_row.min()) <= 1


def test_a_budget_of_nothing_returns_the_weight_bit_for_bit(problem):
    weight, gram = problem
    pruned, mask = SparseGPT().prune(weight.float(), {"gram": gram.float()}, "linear", Selection(0))
    assert torch.equal(pruned, weight.float()) and not mask.any()


def test_the_weight_that_is_given_is_not_written_to(problem):
    weight, gram = problem
    before = weight.clone(), gram.clone()
    SparseGPT().prune(weight, {"gram": gram}, "linear", Selection(50))
    SparseGPT().reconstruct(weight, weight > 0, {"gram": gram})
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])


def test_the_convolution_is_solved_channel_by_channel_with_its_own_hessian():
    weight, windows = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 40, 4, dtype=torch.float64)
    windows = windows @ torch.randn(6, 4, 4, dtype=torch.float64)
    gram = windows.transpose(1, 2) @ windows / 40
    mask = torch.rand(6, 4) < 0.5
    swept = SparseGPT(blocksize=2).reconstruct(weight, mask, {"conv_gram": gram}, "conv")
    pruned, chosen = SparseGPT().prune(weight, {"conv_gram": gram}, "conv", Selection(12))
    assert int(chosen.sum()) == 12
    saliency = []
    for channel in range(6):
        row = slice(channel, channel + 1)
        assert (swept[row] - brute_sweep(weight[row], gram[channel], mask[row])).abs().max() <= 1e-10
        assert (pruned[row] - brute_sweep(weight[row], gram[channel], chosen[row])).abs().max() <= 1e-10
        hessian = damped(gram[channel])
        saliency += [float(weight[channel, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(4)]
    assert set(chosen.flatten().nonzero().flatten().tolist()) == set(torch.tensor(saliency).argsort()[:12].tolist())


def test_the_score_is_the_saliency_that_the_sweep_starts_from(problem):
    weight, gram = problem
    hessian = damped(gram)
    inverse = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(COLUMNS)])
    scores = SparseGPT().score(weight, {"gram": gram}, "linear", Selection(0))
    assert torch.allclose(scores, weight**2 / inverse, rtol=1e-10)


def test_the_factor_is_that_of_the_damped_inverse(problem):
    _, gram = problem
    upper, dead = inverse_factor(2 * gram, 0.01)
    assert torch.equal(upper, upper.triu())
    assert (upper.T @ upper - torch.linalg.inv(damped(gram))).abs().max() <= 1e-10
    assert not dead.any()


# Ill-conditioned statistics: nothing that text can do to a Gram matrix may end in NaN.


def rank_one():
    x = torch.randn(COLUMNS, dtype=torch.float64)
    return torch.outer(x, x)


def zero_column(problem):
    gram = problem[1].clone()
    gram[3], gram[:, 3] = 0, 0
    return gram


def wide_range(problem):
    scale = torch.logspace(-3, 3, COLUMNS, dtype=torch.float64)
    return problem[1] * torch.outer(scale, scale)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["rank one", "zero column", "range of 1e6", "single token", "all dead but one"])
def test_ill_conditioned_gram_matrices_give_finite_weights_and_an_exact_budget(problem, case, dtype, pattern):
    only = torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64)
    only[0, 0] = 2.0
    gram = {
        "rank one": rank_one(),
        "zero column": zero_column(problem),
        "range of 1e6": wide_range(problem),
        "single token": rank_one() * 1e-12,
        "all dead but one": only,
    }[case]
    selection = Selection(54, "tensor", Pattern.parse(pattern))
    pruned, mask = SparseGPT(blocksize=4).prune(problem[0].to(dtype), {"gram": gram.to(dtype)}, "linear", selection)
    assert pruned.isfinite().all()
    assert int(mask.sum()) == 54 and not pruned[mask].any()


def test_dead_inputs_are_zeroed_first_and_counted_in_the_budget(problem):
    weight, gram = problem[0] + 10 * problem[0].sign(), 1e-6 * zero_column(problem)  # faint, but not dead
    pruned, mask = SparseGPT().prune(weight, {"gram": gram}, "linear", Selection(20))
    assert mask[:, 3].all() and int(mask.sum()) == 20
    assert not pruned[:, 3].any()
    live = [j for j in range(COLUMNS) if j != 3]
    alone, same = SparseGPT().prune(weight[:, live], {"gram": gram[live][:, live]}, "linear", Selection(11))
    assert torch.equal(mask[:, live], same)
    assert torch.allclose(pruned[:, live], alone, rtol=1e-10)  # damping is the mean over live inputs only


@pytest.mark.parametrize("shape", [(1,), (33, 4), (SOLVED_WHOLE,), (SOLVED_WHOLE + 1,), (700,), (2, 1300)])
def test_the_triangular_inverse_of_any_size(shape):
    """Whole, halved, and halved several times with what is left over; L has a condition of some hundreds."""
    *batch, n = shape
    lower = torch.randn(*batch, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower = lower.tril_(-1) / n**0.5
    lower.diagonal(dim1=-2, dim2=-1).fill_(1.5)
    inverse = triangular_inverse(lower)
    assert inverse.shape == lower.shape and not inverse.triu(1).any()
    torch.testing.assert_close(inverse @ lower, torch.eye(n, dtype=torch.float64).expand_as(lower), rtol=0, atol=1e-12)


def test_damping_backs_off_tenfold_until_the_hessian_factors_and_says_so(caplog):
    draw = torch.randn(COLUMNS, COLUMNS, dtype=torch.float64)
    basis = torch.linalg.qr(draw).Q
    spectrum = torch.ones(COLUMNS, dtype=torch.float64)
    spectrum[0] = -0.05  # needs more than the first and less than the last damping
    hessian = basis @ torch.diag(spectrum) @ basis.T
    with caplog.at_level(logging.WARNING):
        upper, _ = inverse_factor(hessian, 0.01)
    mean = hessian.diagonal().mean()
    expected = torch.linalg.inv(hessian + 0.1 * mean * torch.eye(COLUMNS, dtype=torch.float64))
    assert (upper.T @ upper - expected).abs().max() <= 1e-8
    assert "damping" in caplog.text and "10 times" in caplog.text


def test_a_healthy_hessian_is_not_talked_about(problem, caplog):
    with caplog.at_level(logging.WARNING):
        inverse_factor(2 * problem[1], 0.01)
    assert not caplog.records


def test_a_hessian_that_does_not_factor_with_any_damping_raises():
    hessian = torch.eye(4, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1e6
    with pytest.raises(ValueError, match="does not factor"):
        inverse_factor(hessian, 0.01)


def test_a_run_that_meets_such_a_hessian_names_the_weight(tiny_mamba, token_ids):
    """Four tokens span no space of 32 inputs, and a damping of nothing does not help."""
    config = SSMPrunerConfig(
        method="sparsegpt", sparsity=0.5, method_kwargs={"percdamp": 1e-300}, dataset=token_ids(1, 4), seq_len=4
    )
    with pytest.raises(CalibrationError, match=r"^backbone\.layers\.0\.mixer\.in_proj: the Hessian does not factor"):
        SSMPruner(tiny_mamba).prune(config)


def test_a_run_on_fewer_tokens_than_inputs_is_finite(tiny_mamba, token_ids):
    SSMPruner(tiny_mamba).prune(SSMPrunerConfig(method="sparsegpt", sparsity=0.5, dataset=token_ids(1, 4), seq_len=4))
    assert all(parameter.isfinite().all() for parameter in tiny_mamba.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_statistics_raise(problem, value):
    gram = problem[1].clone()
    gram[2, 2] = value
    with pytest.raises(ValueError, match="non-finite"):
        SparseGPT().prune(problem[0], {"gram": gram}, "linear", Selection(10))


def test_blocks_must_hold_whole_groups(problem):
    with pytest.raises(ConfigurationError, match="blocksize=6 must be a multiple of the pattern's 4"):
        SparseGPT(blocksize=6).prune(
            problem[0], {"gram": problem[1]}, "linear", Selection(0, "tensor", Pattern.parse("2:4"))
        )


@pytest.mark.parametrize(
    "kwargs", [{"blocksize": 0}, {"percdamp": 0.0}, {"percdamp": -1.0}, {"percdamp": float("nan")}]
)
def test_parameters_out_of_range_are_refused_with_what_is_allowed(kwargs):
    with pytest.raises(ConfigurationError, match="blocksize >= 1 and percdamp > 0"):
        SparseGPT(**kwargs)
