# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ALPS against a naive float64 version and exact solves (oracles 15, 16, 17, 19, 20, 44)."""

import logging
from itertools import combinations

import pytest
import torch

from optimum_ssm import SSMPruner, SSMPrunerConfig, register_method
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods._quadratic import Quadratic, conjugate_gradients, exact_solve
from optimum_ssm.methods.admm_grad import ADMMGrad
from optimum_ssm.methods.alps import ALPS
from optimum_ssm.methods.base import WeightMethod
from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.methods.sparsegpt import SparseGPT
from optimum_ssm.methods.wanda import Wanda
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection, round_half_up

from ..reference import relative_error


ROWS, COLUMNS = 20, 24
SELECTIONS = {
    "half": Selection(240),
    "70 %": Selection(336),
    "rows": Selection(247, "row"),
    "2:4": Selection(0, pattern=Pattern(2, 4)),
    "4:8": Selection(0, pattern=Pattern(4, 8)),
}
every_selection = pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)


@pytest.fixture
def problem():
    """A weight and the Gram matrix of correlated inputs, float64."""
    return torch.randn(ROWS, COLUMNS, dtype=torch.float64), correlated_gram(COLUMNS)


def correlated_gram(size, tokens=200):
    mix = torch.randn(size, size, dtype=torch.float64) * torch.linspace(1, 0.1, size, dtype=torch.float64)[:, None]
    inputs = torch.randn(tokens, size, dtype=torch.float64) @ mix
    return inputs.T @ inputs / tokens


def damped(gram, damping=0.01):
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def objective(weight, pruned, gram):
    gap = weight - pruned
    return float(torch.trace(gap @ gram @ gap.T))


def naive_search(weight, gram, selection):
    """methods.md 3.4, steps 1 to 3, in its own orientation (in x out) and with a linear solve at every step."""
    matrix = damped(gram)
    scale = matrix.diagonal().sqrt()
    matrix = matrix / torch.outer(scale, scale)
    dense = (weight * scale).T
    right, eye = matrix @ dense, torch.eye(len(gram), dtype=gram.dtype)

    def keep(values):
        return values.masked_fill(selection.mask(values.T.abs()).T, 0)

    pruned, multiplier, rho, moved = keep(dense), torch.zeros_like(dense), 0.1, False
    seen, size = pruned != 0, int((pruned != 0).sum())
    for step in range(1, 301):
        solution = torch.linalg.solve(matrix + rho * eye, right - multiplier + rho * pruned)
        pruned = keep(solution + multiplier / rho)
        multiplier = multiplier + rho * (solution - pruned)
        if step % 3:
            continue
        support = pruned != 0
        changed, seen = int((support ^ seen).sum()), support
        if step > 30 and changed <= 3e-4 * size:
            break
        if changed > 0.1 * size:
            rho, moved = rho * 1.3, True
        elif changed > 0.005 * size:
            rho, moved = rho * 1.2, True
        elif moved and changed:
            rho *= 1.1
        elif moved:
            break
        else:
            rho /= 5
            if changed:
                pruned, multiplier = keep(dense), torch.zeros_like(dense)
                seen = pruned != 0
    return keep(solution).T == 0


@every_selection
def test_it_is_the_naive_algorithm(problem, selection):
    weight, gram = problem
    expected_mask = naive_search(weight, gram, selection)
    expected = exact_solve(weight, expected_mask, damped(gram))
    found, mask = ALPS(cg_steps=200).prune(weight, {"gram": gram}, "linear", selection)
    assert torch.equal(mask, expected_mask)
    best = objective(weight, expected, damped(gram))
    assert best <= objective(weight, found, damped(gram)) <= (1 + 1e-5) * best  # CG stops at a residual of 1e-4
    rounded, _ = ALPS().prune(weight.float(), {"gram": gram.float()}, "linear", selection)
    assert relative_error(weight, rounded, gram) == pytest.approx(relative_error(weight, expected, gram), rel=5e-3)


@every_selection
def test_uncorrelated_inputs_leave_magnitude_and_kept_weights(selection):
    weight, gram = torch.randn(ROWS, COLUMNS), torch.eye(COLUMNS)
    found, mask = ALPS().prune(weight, {"gram": gram}, "linear", selection)
    plain, by_magnitude = Magnitude().prune(weight, {}, "linear", selection)
    assert torch.allclose(found[~mask], weight[~mask], atol=1e-6)
    assert torch.equal(mask, by_magnitude)
    assert relative_error(weight, found, gram) <= (1 + 1e-6) * relative_error(weight, plain, gram)


def test_on_one_mask_exact_solves_are_lowest_and_conjugate_gradients_reach_them(problem):
    weight, gram = problem
    mask = Selection(240).mask(torch.rand_like(weight))
    statistics = {"gram": gram}
    exact, exact_damped = exact_solve(weight, mask, gram), exact_solve(weight, mask, damped(gram))
    swept = SparseGPT().reconstruct(weight, mask, statistics)
    few = ALPS(cg_steps=10).reconstruct(weight, mask, statistics)
    others = (exact_damped, swept, few, weight.masked_fill(mask, 0))
    assert all(relative_error(weight, exact, gram) < relative_error(weight, other, gram) for other in others)
    q = Quadratic.of(gram, 0.01)
    dense = q.enter(weight)
    many = conjugate_gradients(dense.masked_fill(mask, 0), dense, mask, q.matrix, 500, tolerance=1e-12)
    many = q.leave(many, weight, mask)
    assert torch.allclose(many, exact_damped, rtol=0, atol=1e-6)
    assert objective(weight, many, damped(gram)) <= objective(weight, few, damped(gram))
    assert objective(weight, many, damped(gram)) <= objective(weight, swept, damped(gram))
    assert not many[mask].any()


@pytest.fixture
def trained_problems(assets, load_trained, clean_registries):
    """`trained_problems(name)`: weight and Gram matrix of every linear weight, from the package's own calibration."""

    def collect(name):
        found = []

        @register_method("recorder")
        class Recorder(WeightMethod):
            summary = source = "a test"
            default_targets = ("in_proj", "x_proj", "dt_proj", "out_proj")

            def statistics(self, kind):
                return ("gram",)

            def score(self, weight, statistics, kind, selection):
                return weight

            def prune(self, weight, statistics, kind, selection):
                found.append((weight.clone(), statistics["gram"]))
                return weight, torch.zeros_like(weight, dtype=torch.bool)

        config = SSMPrunerConfig(
            method="recorder",
            sparsity=0.5,
            dataset=str(assets / "wikitext-2" / "calibration.txt"),
            num_samples=8,
            seq_len=256,
        )
        SSMPruner.from_pretrained(assets / name, config, dtype="float32").prune()
        return found

    return collect


@pytest.mark.parametrize("name, compared", [("mamba-tiny", 66), ("mamba2-tiny", 36)])
def test_on_real_activations_every_method_beats_the_next(trained_problems, name, compared):
    """ALPS, ADMM-Grad, SparseGPT, Wanda, magnitude; the last two within rows, or groups: 102 of 102 cases (oracle 17)."""
    violations, cases = [], 0
    for index, (weight, gram) in enumerate(trained_problems(name)):
        statistics = {"gram": gram, "col_energy": gram.diagonal()}
        for budget in ("0.5", "0.7", "2:4"):
            pattern = Pattern.parse(budget) if ":" in budget else Pattern()
            if not pattern.fits(weight.shape[1]):
                continue
            count = 0 if pattern.is_n_m else round_half_up(float(budget) * weight.numel())
            tensor, row = Selection(count, pattern=pattern), Selection(count, "row", pattern)
            methods = [(method, tensor) for method in (ALPS(), ADMMGrad(), SparseGPT())]
            errors = [
                relative_error(weight, method.prune(weight, statistics, "linear", selection)[0], gram)
                for method, selection in (*methods, (Wanda(), row), (Magnitude(), row))
            ]
            cases += 1
            if not 0 < errors[0] <= errors[1] <= errors[2] <= errors[3] <= errors[4]:
                violations.append((index, tuple(weight.shape), budget, errors))
    assert not violations
    assert cases == compared


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8"])
def test_every_group_loses_its_share(problem, pattern):
    pattern = Pattern.parse(pattern)
    weight, gram = problem
    found, mask = ALPS().prune(weight, {"gram": gram}, "linear", Selection(0, pattern=pattern))
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
    found, mask = ALPS().prune(weight, {"gram": gram}, "linear", Selection(count, scope))
    assert int(mask.sum()) == count and not found[mask].any() and found.isfinite().all()
    if scope == "row":
        assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1


def test_a_budget_of_nothing_leaves_the_weight(problem):
    weight, gram = problem
    found, mask = ALPS().prune(weight, {"gram": gram}, "linear", Selection(0))
    assert found is weight and not mask.any()


def test_ill_conditioned_inputs_give_finite_weights_and_dead_ones_go_first():
    weight = torch.randn(ROWS, COLUMNS)
    direction = torch.logspace(-3, 3, COLUMNS)
    direction[[3, 8]] = 0
    gram = torch.outer(direction, direction)  # rank 1, a dynamic range of 1e6 and two inputs that never fired
    for selection in (Selection(240), Selection(250, "row"), Selection(0, pattern=Pattern(2, 4))):
        found, mask = ALPS().prune(weight, {"gram": gram}, "linear", selection)
        assert found.isfinite().all() and not found[mask].any()
        assert mask[:, [3, 8]].all()
    found, mask = ALPS().prune(weight, {"gram": gram}, "linear", Selection(25))
    assert int(mask[:, [3, 8]].sum()) == 25  # all from dead inputs; those that survive keep their weights
    assert torch.equal(found[:, [3, 8]], weight[:, [3, 8]].masked_fill(mask[:, [3, 8]], 0))
    assert torch.allclose(found[~mask], weight[~mask], rtol=1e-4)
    assert not ALPS().score(weight, {"gram": gram}, "linear", Selection(0))[:, [3, 8]].any()


def test_damping_backs_off_and_gives_up_in_words(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    weight, gram = torch.randn(2, 4), torch.eye(4)
    gram[0, 1] = gram[1, 0] = 1.05  # an eigenvalue of -0.05: five times the damping of 1 %
    found, _ = ALPS().prune(weight, {"gram": gram}, "linear", Selection(4))
    assert found.isfinite().all()
    assert "damping raised to 0.1" in caplog.text
    gram[0, 1] = gram[1, 0] = 2e4
    with pytest.raises(ValueError, match="not positive definite, not even with 1000 times"):
        ALPS().prune(weight, {"gram": gram}, "linear", Selection(4))
    gram[0, 1] = torch.nan
    with pytest.raises(ValueError, match="Gram matrix holds non-finite values"):
        ALPS().prune(weight, {"gram": gram}, "linear", Selection(4))


def test_of_a_convolution_no_other_mask_of_the_budget_is_better():
    weight, gram = torch.randn(3, 4), torch.stack([correlated_gram(4) for _ in range(3)]).float()
    everywhere = torch.stack([damped(channel.double()) for channel in gram])

    def error(mask):
        gap = weight.double() - exact_solve(weight.double(), mask, everywhere)
        return float(torch.einsum("ck,ckj,cj->", gap, everywhere, gap))

    def all_masks(count):
        for chosen in combinations(range(12), count):
            mask = torch.zeros(12, dtype=torch.bool)
            mask[list(chosen)] = True
            yield mask.reshape(3, 4)

    pairs = [mask for mask in all_masks(6) if (mask.sum(1) == 2).all()]
    for selection in (Selection(0, pattern=Pattern(2, 4)), Selection(6, "row")):
        found, mask = ALPS().prune(weight, {"conv_gram": gram}, "conv", selection)
        assert error(mask) == pytest.approx(min(error(pair) for pair in pairs), rel=1e-5)
        assert torch.allclose(found.double(), exact_solve(weight.double(), mask, everywhere), atol=1e-3)
    met = 0
    for count in range(1, 12):
        _, mask = ALPS().prune(weight, {"conv_gram": gram}, "conv", Selection(count))
        assert int(mask.sum()) == count
        met += error(mask) <= (1 + 1e-5) * min(error(other) for other in all_masks(count))
    assert met >= 9  # a budget that ends inside a step of a convex hull may miss the best mask


def test_dead_taps_of_a_convolution_go_first():
    weight, gram = torch.randn(5, 4), torch.stack([correlated_gram(4) for _ in range(5)]).float()
    gram[0] = 0
    gram[1, 2], gram[1, :, 2] = 0, 0
    for selection in (Selection(5), Selection(10, "row"), Selection(0, pattern=Pattern(2, 4))):
        found, mask = ALPS().prune(weight, {"conv_gram": gram}, "conv", selection)
        assert found.isfinite().all() and not found[mask].any() and mask[1, 2]
    assert ALPS().prune(weight, {"conv_gram": gram}, "conv", Selection(5))[1][0].all()
    with pytest.raises(ValueError, match="subsets of 12 taps are too many"):
        ALPS().prune(torch.randn(1, 12), {"conv_gram": torch.eye(12)[None]}, "conv", Selection(5))


def test_the_score_is_the_error_of_pruning_one_entry_alone(problem):
    weight, gram = problem
    score = ALPS().score(weight, {"gram": gram}, "linear", Selection(0))
    assert torch.allclose(score.square(), weight.square() * damped(gram).diagonal())


@pytest.mark.parametrize(
    "values", [{"damping": 0.0}, {"rho0": 0.0}, {"iterations": 0}, {"update_every": 0}, {"cg_steps": -1}]
)
def test_parameters_out_of_range_are_refused(values):
    with pytest.raises(ConfigurationError, match=f"alps needs .*{next(iter(values))}"):
        ALPS(**values)
