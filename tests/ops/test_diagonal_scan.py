# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The diagonal scan against the recurrence step by step, in float64."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.ops.diagonal_scan import diagonal_convolution, diagonal_scan, discretise, powers


def draw(batch=2, length=37, size=5, seed=0):
    random = torch.Generator().manual_seed(seed)
    angle = 6 * torch.rand(size, generator=random, dtype=torch.float64)
    decay = torch.polar(0.3 + 0.69 * torch.rand(size, generator=random, dtype=torch.float64), angle)
    return decay, torch.randn(batch, length, size, generator=random, dtype=torch.complex128)


def recurrence(decay, inputs):
    state, states = torch.zeros_like(inputs[:, 0]), []
    for t in range(inputs.shape[1]):
        state = decay * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, 1)


@pytest.mark.parametrize("scan", [diagonal_scan, diagonal_convolution])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33])
def test_states_are_those_of_the_recurrence(scan, length):
    decay, inputs = draw(length=length)
    torch.testing.assert_close(scan(decay, inputs), recurrence(decay, inputs), rtol=0, atol=1e-12)
    backward = recurrence(decay, inputs.flip(1)).flip(1)
    torch.testing.assert_close(scan(decay, inputs, reverse=True), backward, rtol=0, atol=1e-12)


def test_a_long_scan_in_single_precision_stays_near_double():
    decay = torch.polar(torch.tensor(0.999, dtype=torch.float64), torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64))
    inputs = torch.randn(1, 1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    truth = recurrence(decay, inputs)
    for scan in (diagonal_scan, diagonal_convolution):
        assert (scan(decay.to(torch.complex64), inputs.to(torch.complex64)) - truth).abs().max() < 2e-3


def test_gradients_of_the_scan():
    decay, inputs = (tensor.requires_grad_() for tensor in draw(length=6, size=3))
    assert torch.autograd.gradcheck(diagonal_scan, (decay, inputs))
    assert torch.autograd.gradcheck(lambda a, v: diagonal_scan(a, v, reverse=True), (decay, inputs))


def test_inputs_are_left_as_they_are():
    decay, inputs = draw()
    before = inputs.clone()
    diagonal_scan(decay, inputs)
    assert torch.equal(inputs, before)


def test_powers():
    decay, _ = draw()
    torch.testing.assert_close(powers(decay, 11), decay[:, None] ** torch.arange(11))
    assert powers(torch.zeros(1), 4).tolist() == [[1, 0, 0, 0]]


def test_zoh_is_the_exact_solution_for_inputs_that_are_held():
    """λ̄ and B̄ against many small Euler steps of dx/dt = λ x + u over one Δ."""
    poles = torch.tensor([-0.5 + 3j, -0.2 - 1j, -1e-9 + 0j, 0j], dtype=torch.complex128)
    step = torch.tensor([0.3, 0.05, 0.2, 0.1], dtype=torch.float64)
    decay, factor = discretise(poles, step)
    fine = 200_000
    x, driven = torch.ones_like(poles), torch.zeros_like(poles)
    ratio = 1 + poles * step / fine
    x = ratio**fine
    driven = torch.stack([step[i] / fine * (ratio[i] ** torch.arange(fine)).sum() for i in range(4)])
    torch.testing.assert_close(decay, x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factor, driven, rtol=1e-4, atol=1e-6)


def test_the_series_near_zero_joins_the_quotient():
    step = torch.ones(1, dtype=torch.float64)
    for size in (0.99e-3, 1.01e-3, 1e-12):
        pole = torch.polar(torch.tensor([size], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
        series = sum(pole**k / torch.arange(1, k + 2).prod() for k in range(6))
        torch.testing.assert_close(discretise(pole, step)[1], series, rtol=1e-12, atol=0)
    pole = torch.zeros(1, dtype=torch.complex128, requires_grad=True)
    discretise(pole, step)[1].real.sum().backward()
    assert pole.grad.item() == pytest.approx(0.5)


def test_bilinear_is_the_trapezoidal_rule():
    """x_1 = x_0 + Δ (λ x_0 + λ x_1) / 2 + Δ u."""
    poles, step = torch.tensor([-0.5 + 3j, -2 + 0j], dtype=torch.complex128), torch.tensor([0.3, 1.0]).double()
    decay, factor = discretise(poles, step, "bilinear")
    x0, u = 1.3 - 0.4j, 0.7
    x1 = decay * x0 + factor * u
    torch.testing.assert_close(x1, x0 + step * poles * (x0 + x1) / 2 + step * u)
    with pytest.raises(ConfigurationError, match="allowed: zoh, bilinear"):
        discretise(poles, step, "euler")
