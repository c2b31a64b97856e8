# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SparseSSM on A_log against naive loops over its definitions (oracles 22, 23)."""

import pytest
import torch

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.methods.sparsegpt import SparseGPT
from optimum_ssm.methods.sparsessm import SparseSSM
from optimum_ssm.methods.wanda import Wanda
from optimum_ssm.ops import selective_scan as scan
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection

from ..reference import trace


CHANNELS, STATES, LENGTH = 6, 8, 9


@pytest.fixture
def a_log():
    return torch.rand(CHANNELS, STATES) * 3 - 0.5


@pytest.fixture
def sums():
    """Time-indexed sums as the scan gives them: no state before step 0, decays in (0, 1)."""
    state_prev = torch.rand(LENGTH, CHANNELS, STATES) * torch.logspace(-2, 1, LENGTH)[:, None, None]
    state_prev[0] = 0
    return {"state_prev": state_prev, "decay_sum": torch.rand(LENGTH, CHANNELS, STATES)}


def scanned(a_log, samples, length, C=None):
    """The sums of this library's own scan over random inputs."""
    draw = torch.randn
    found = scan.allocate_sums(
        ["state_prev", "state_prev_total", "decay_sum", "decay_error"],
        channels=CHANNELS,
        state_size=STATES,
        length=length,
    )
    C = draw(samples, STATES, length) if C is None else C
    inputs = draw(samples, CHANNELS, length), draw(samples, CHANNELS, length)
    B = draw(samples, STATES, length)
    scan.selective_scan(*inputs, -torch.exp(a_log), B, C, delta_softplus=True, sums=found)
    return found


def pruned(method, a_log, statistics, count, **kwargs):
    return method.prune(a_log, statistics, "a_log", Selection(count, **kwargs))[1]


def lowest(scores, count):
    """The `count` lowest entries of a matrix by a full sort."""
    order = sorted(range(scores.numel()), key=lambda i: (float(scores.flatten()[i]), i))[:count]
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.reshape(scores.shape)


@pytest.mark.parametrize("count", [1, 17, 24, 47])
def test_v1_counts_the_steps_at_which_an_entry_is_among_the_lowest(a_log, sums, count):
    votes, total = torch.zeros(CHANNELS, STATES), torch.zeros(CHANNELS, STATES)
    for t in range(1, LENGTH):
        saliency = a_log**2 * sums["state_prev"][t]
        votes += lowest(saliency, count)
        total += saliency
    order = sorted(
        range(votes.numel()), key=lambda i: (-float(votes.flatten()[i]), float(total.flatten()[i]), i)
    )  # most votes first; equal votes: lower total saliency first
    mask = pruned(SparseSSM(variant="v1"), a_log, sums, count)
    assert mask.flatten().nonzero().flatten().tolist() == sorted(order[:count])


def test_step_0_casts_no_vote(a_log, sums):
    expected = SparseSSM(variant="v1").score(a_log, sums, "a_log", Selection(24))
    for first in (torch.rand(CHANNELS, STATES), torch.full((CHANNELS, STATES), 1e6)):
        sums["state_prev"][0] = first
        assert torch.equal(SparseSSM(variant="v1").score(a_log, sums, "a_log", Selection(24)), expected)


@pytest.mark.parametrize("count", [1, 10, 24, 40])
def test_v1_over_two_steps_prunes_the_same_set_as_l2(a_log, count):
    found = scanned(a_log, samples=3, length=2)
    assert not found["state_prev"][0].any()
    v1 = pruned(SparseSSM(variant="v1"), a_log, found, count)
    l2 = pruned(SparseSSM(variant="l2"), a_log, found, count)
    assert torch.equal(v1, l2) and int(v1.sum()) == count


def test_v1_votes_inside_the_groups_of_n_m(a_log, sums):
    pattern = Pattern.parse("2:4")
    votes, total = torch.zeros(CHANNELS, 2, 4), torch.zeros(CHANNELS, 2, 4)
    for t in range(1, LENGTH):
        saliency = (a_log**2 * sums["state_prev"][t]).reshape(CHANNELS, 2, 4)
        votes += torch.zeros_like(votes).scatter(2, saliency.argsort(dim=2)[..., :2], 1.0)
        total += saliency
    mask = pruned(SparseSSM(variant="v1"), a_log, sums, 0, pattern=pattern).reshape(CHANNELS, 2, 4)
    for c in range(CHANNELS):
        for g in range(2):
            order = sorted(range(4), key=lambda i: (-float(votes[c, g, i]), float(total[c, g, i])))
            assert mask[c, g].nonzero().flatten().tolist() == sorted(order[:2])


def test_l2_is_theorem_1(a_log):
    found = scanned(a_log, samples=3, length=12)
    expected = a_log.double() ** 2 * found["state_prev"].double().sum(0)
    scores = SparseSSM(variant="l2").score(a_log, found, "a_log", Selection(5))
    assert torch.allclose(scores.double(), expected, rtol=1e-5)


WEIGHTS = {
    "power": lambda t: (t + 1) ** -1.5,
    "discount": lambda t: 0.8**t,
    "linear": lambda t: LENGTH - t,
    "window": lambda t: float(t < LENGTH // 4),
    "uniform": lambda t: 1.0,
}


@pytest.mark.parametrize("mode", WEIGHTS)
def test_v2_is_the_weighted_sum_over_time(a_log, sums, mode):
    raw = [float(WEIGHTS[mode](t)) for t in range(LENGTH)]
    expected = sum(w / sum(raw) * sums["decay_sum"][t] ** 2 * sums["state_prev"][t] for t, w in enumerate(raw))
    method = SparseSSM(variant="v2", time_weight=mode, time_power=1.5, time_discount=0.8)
    assert torch.allclose(method.score(a_log, sums, "a_log", Selection(5)), expected, rtol=1e-5)


def test_v2_weighs_by_power_and_under_n_m_by_window_unless_told(a_log, sums):
    def scores(pattern, **kwargs):
        return SparseSSM(variant="v2", **kwargs).score(
            a_log, sums, "a_log", Selection(5, pattern=Pattern.parse(pattern))
        )

    assert torch.equal(scores("unstructured"), scores("unstructured", time_weight="power", time_power=1.0))
    assert torch.equal(scores("2:4"), scores("unstructured", time_weight="window"))
    assert torch.equal(scores("2:4", time_weight="linear"), scores("unstructured", time_weight="linear"))


def test_v2_uniform_of_one_sequence_is_proportional_to_the_energy_that_the_decay_carries(a_log):
    found = scanned(a_log, samples=1, length=16)
    expected = (found["decay_sum"] ** 2 * found["state_prev"]).sum(0) / 16
    scores = SparseSSM(variant="v2", time_weight="uniform").score(a_log, found, "a_log", Selection(5))
    assert torch.allclose(scores, expected, rtol=1e-5)


def test_c2_with_a_readout_of_one_is_proportional_to_v2_uniform_of_one_sequence(a_log):
    found = scanned(a_log, samples=1, length=16, C=torch.ones(1, STATES, 16))
    c2 = SparseSSM().score(a_log, found, "a_log", Selection(5))
    v2 = SparseSSM(variant="v2", time_weight="uniform").score(a_log, found, "a_log", Selection(5))
    assert torch.allclose(c2, 16 * v2, rtol=1e-5)


def test_c2_of_an_entry_is_the_squared_output_error_of_making_it_memoryless(a_log):
    """The scan is run again with that entry's decay at 0 (A = -exp(38)); the definition, not the formula."""
    samples, length = 2, 12
    x, dt = torch.randn(samples, CHANNELS, length).double(), torch.randn(samples, CHANNELS, length).double()
    B, C = torch.randn(samples, STATES, length).double(), torch.randn(samples, STATES, length).double()
    sums = scan.allocate_sums(
        ["decay_error"], channels=CHANNELS, state_size=STATES, length=length, dtype=torch.float64
    )
    A = -torch.exp(a_log.double())
    dense = scan.selective_scan(x, dt, A, B, C, delta_softplus=True, sums=sums)
    scores = SparseSSM().score(a_log, sums, "a_log", Selection(5))
    for c, n in [(0, 0), (2, 5), (5, 7)]:
        cut = A.clone()
        cut[c, n] = -torch.exp(torch.tensor(38.0))
        error = (scan.selective_scan(x, dt, cut, B, C, delta_softplus=True) - dense).square().sum()
        assert float(scores[c, n]) == pytest.approx(float(error), rel=1e-9)


def by_definition(variant, a_log, seen, count):
    """Keep-scores from every state of a block, in float64: sequences are summed over at every step."""
    squared, decay = seen["before"].square().sum(1), seen["decay"].sum(1)  # (L, I, N)
    if variant == "c2":
        return (seen["readout"] * seen["decay"] * seen["before"]).square().sum((0, 1))
    if variant == "l2":
        return a_log**2 * squared.sum(0)
    if variant == "v2":
        weights = [1 / (t + 1) for t in range(len(squared))]
        return sum(w / sum(weights) * decay[t] ** 2 * squared[t] for t, w in enumerate(weights))
    votes = sum(lowest(a_log**2 * at_t, count).double() for at_t in squared[1:])
    total = (a_log**2 * squared).sum(0)
    return total / (2 * total.max()) - votes


@pytest.mark.parametrize("variant, fill", [("c2", "memoryless"), ("v2", "memoryless"), ("v1", "zero"), ("l2", "zero")])
def test_a_run_over_a_model_removes_what_the_definition_says_in_float64(tiny_mamba, token_ids, variant, fill):
    ids = token_ids(5)
    blocks = [(block.mixer.A_log.detach().double(), seen) for block, seen in
              zip(tiny_mamba.base_model.layers, trace(tiny_mamba, ids)[0], strict=True)]  # fmt: skip
    config = SSMPrunerConfig(
        method="sparsessm",
        sparsity=0.4,
        targets=["A_log"],
        a_log_fill=fill,
        method_kwargs={"variant": variant},
        dataset=ids,
        seq_len=ids.shape[1],
        batch_size=2,
        sequential=False,
    )
    pruner = SSMPruner(tiny_mamba)
    pruner.prune(config)
    for index, (a_log, seen) in enumerate(blocks):
        mask = pruner.masks[f"backbone.layers.{index}.mixer.A_log"]
        count = int(0.4 * a_log.numel() + 0.5)
        assert torch.equal(mask, lowest(by_definition(variant, a_log, seen, count), count))


@pytest.mark.parametrize("share", [0, 0.1, 1 / 3, 0.5, 0.7, 0.999])
@pytest.mark.parametrize("variant", ["c2", "v1", "v2", "l2"])
@pytest.mark.parametrize("ties", [False, True])
def test_the_budget_is_exact_also_with_ties(a_log, variant, share, ties):
    found = scanned(a_log, samples=2, length=LENGTH)
    if ties:
        a_log, found = torch.zeros_like(a_log), {name: torch.ones_like(value) for name, value in found.items()}
    count = int(share * a_log.numel() + 0.5)
    assert int(pruned(SparseSSM(variant=variant), a_log, found, count).sum()) == count


@pytest.mark.parametrize("variant, fill", [("c2", "memoryless"), ("v2", "memoryless"), ("v1", "zero"), ("l2", "zero")])
def test_the_fill_that_the_saliency_estimates_is_declared(variant, fill):
    assert SparseSSM(variant=variant).fill("a_log") == fill
    assert SparseSSM(variant=variant).fill("linear") is None


def test_projections_go_to_the_solver():
    weight, inputs = torch.randn(8, 12), torch.randn(60, 12)
    gram = inputs.T @ inputs / 60
    statistics = {"gram": gram, "col_energy": gram.diagonal()}
    for solver, kwargs, expected in (
        ("sparsegpt", {"blocksize": 4, "percdamp": 0.1}, SparseGPT(blocksize=4, percdamp=0.1)),
        ("wanda", {"use_variant": True}, Wanda(use_variant=True)),
    ):
        method = SparseSSM(solver=solver, solver_kwargs=kwargs)
        assert method.statistics("linear") == expected.statistics("linear")
        found = method.prune(weight, statistics, "linear", Selection(40))
        wanted = expected.prune(weight, statistics, "linear", Selection(40))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"variant": "c3"}, "unknown sparsessm variant 'c3'.*Allowed: c2, v1, v2, l2"),
        ({"time_weight": "linaer"}, "unknown sparsessm time_weight 'linaer'.*Did you mean 'linear'"),
        ({"solver": "sparsessm"}, "cannot be its own solver"),
        ({"solver": "sparsegtp"}, "unknown method 'sparsegtp'.*Did you mean 'sparsegpt'"),
        ({"solver_kwargs": {"blocksizes": 4}}, "unknown solver_kwargs key.*'blocksizes'.*Did you mean 'blocksize'"),
        ({"solver_kwargs": {"blocksize": 0}}, "blocksize >= 1"),
    ],
)
def test_parameters_that_do_not_exist_are_refused_with_the_nearest(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        SparseSSM(**kwargs)
