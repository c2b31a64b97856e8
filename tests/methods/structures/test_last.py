# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""LAST's score against a naive one, and what is known of its gain."""

import pytest
import torch
from torch.nn import functional as F

from optimum_ssm.methods.structures.aire import Aire
from optimum_ssm.methods.structures.last import Last

from ...reference import trace
from ...structured import biased, scores_of


def naive(model, seen, mixer, gain, weighted):
    """B̂² Ĉ² Σ w gain(Δ̂, α), head by head, from the traced forward."""
    heads, (_, _, groups, states) = seen["step"].shape[-1], seen["B"].shape
    rates = mixer.A_log.detach().double().exp().reshape(heads, -1).expand(heads, states)
    inner = seen["gate"].shape[-1]
    x = convolved(seen, mixer)[..., :inner]
    gate = F.silu(seen["gate"]).square().mean((0, 1)) * mixer.out_proj.weight.detach().double().square().sum(0)
    weight = x.square().mean((0, 1)).reshape(heads, -1).sum(1) * gate.reshape(heads, -1).mean(1)
    total = torch.zeros(groups, states, dtype=torch.float64)
    for head in range(heads):
        step = seen["step"][..., head].mean()
        total[head * groups // heads] += gain(step, rates[head]) * (weight[head] if weighted else 1)
    b, c = (seen[name].square().mean((0, 1)) for name in "BC")
    return (b * c * total).flatten()


def convolved(seen, mixer):
    taps = mixer.conv1d.weight.detach().double()[:, 0]
    return F.silu((seen["conv1d"] * taps).sum(-1) + mixer.conv1d.bias.detach().double())


GAINS = {
    "last": lambda step, rate: (step / (1 - torch.exp(-rate * step))) ** 2,
    "aire": lambda step, rate: step**2 / (1 - torch.exp(-2 * rate * step)),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
@pytest.mark.parametrize("method", GAINS)
def test_it_is_that_of_a_naive_loop(method, model_type, weighted, token_ids):
    model, ids = biased(model_type), token_ids()
    found = scores_of(model, method, "state", ids, method_kwargs={"weighted": weighted})
    for block, scores, seen in zip(model.base_model.layers, found, trace(model, ids)[0]):
        wanted = naive(model, seen, block.mixer, GAINS[method], weighted)
        torch.testing.assert_close(scores, wanted, rtol=2e-4, atol=0)


def test_the_gain_of_slow_states_is_one_over_the_rate():
    rate = torch.logspace(-9, 2, 40, dtype=torch.float64)
    tiny = torch.full_like(rate, 1e-8) / rate
    torch.testing.assert_close(Last.gain(tiny, rate), rate**-2, rtol=1e-7, atol=0)


def test_the_gain_lies_between_its_bounds():
    """1/α + Δ/2 <= f <= 1/α + Δ."""
    step, rate = (torch.logspace(-6, 3, 60, dtype=torch.float64) for _ in range(2))
    gain = Last.gain(step[:, None], rate[None]).sqrt()
    slack = 1 + 1e-12
    assert (gain * slack >= 1 / rate + step[:, None] / 2).all()
    assert (gain <= (1 / rate + step[:, None]) * slack).all()


def test_the_gain_bounds_the_peak_of_time_varying_recurrences():
    """sup |y| <= sup |B| sup |C| f(Δ_max) for inputs of size 1, and comes near it for constant ones."""
    draw, near = torch.Generator().manual_seed(0), 0.0
    for case in range(100):
        rate = float(torch.rand(1, generator=draw) * 5 + 0.01)
        spread = 1.0 if case % 2 else 0.0
        step = 0.3 * torch.exp(spread * torch.randn(200, generator=draw)).double()
        b, c = (1 + spread * (torch.randn(200, generator=draw).double()) for _ in range(2))
        x = torch.sign(torch.randn(200, generator=draw).double()) if case % 2 else torch.ones(200).double()
        h, peak = torch.zeros(()).double(), 0.0
        for t in range(200):
            h = torch.exp(-rate * step[t]) * h + step[t] * b[t] * x[t]
            peak = max(peak, float((c[t] * h).abs()))
        bound = b.abs().max() * c.abs().max() * Last.gain(step.max(), torch.tensor(rate).double()).sqrt()
        assert peak <= bound * (1 + 1e-12)
        near = max(near, float(peak / bound))
    assert near > 0.99


def test_aire_is_the_energy_of_the_impulse_response():
    step, rate = torch.tensor(0.2).double(), torch.tensor([0.3, 2.0, 9.0]).double()
    response = step * torch.exp(-rate * step) ** torch.arange(2000).double()[:, None]
    torch.testing.assert_close(Aire.gain(step, rate), response.square().sum(0), rtol=1e-9, atol=0)


def test_in_mamba2_all_of_them_order_the_states_of_a_group_alike(token_ids):
    """The states of a head share their pole, so only ‖B‖ ‖C‖ is left to tell them apart."""
    model, ids = biased("mamba2"), token_ids()
    scores = {name: scores_of(model, name, "state", ids) for name in ("last", "aire", "state_energy")}
    for index, seen in enumerate(trace(model, ids)[0]):
        plain = (seen["B"].square().mean((0, 1)) * seen["C"].square().mean((0, 1))).argsort(1)
        for name in ("last", "aire"):
            assert torch.equal(scores[name][index].reshape(2, -1).argsort(1), plain)
    both = [
        (a.reshape(2, -1).argsort(1), b.reshape(2, -1).argsort(1))
        for a, b in zip(scores["last"], scores["state_energy"])
    ]
    assert any(not torch.equal(a, b) for a, b in both), "the measured energy sees more"
