# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Diagonal linear time-invariant systems x_t = λ̄ x_{t-1} + v_t: discretisation, scan by doubling, convolution by FFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigurationError


RULES = ("zoh", "bilinear")
_SERIES_BELOW = 1e-3  # of |λΔ|, where expm1(λΔ) / λΔ is taken from its series: the quotient has no value at 0


def discretise(poles: Tensor, step: Tensor, rule: str = "zoh") -> tuple[Tensor, Tensor]:
    """Decays λ̄ and input factors B̄ / B of continuous poles λ (arXiv 2208.04933, Eq. 6; arXiv 2206.11893, Sec. 3.1).

    `"zoh"`: λ̄ = exp(λΔ), B̄ = ((λ̄ - 1) / λ) B. `"bilinear"`: λ̄ = (1 + Δλ/2) / (1 - Δλ/2), B̄ = Δ B / (1 - Δλ/2).

    Args:
        poles (`Tensor`): complex, any shape.
        step (`Tensor`): Δ, real, positive, broadcast to the poles.
        rule (`str`): `"zoh"` or `"bilinear"`.

    Raises:
        ConfigurationError: the rule is unknown.
    """
    if rule not in RULES:
        raise ConfigurationError(f"unknown discretisation {rule!r}; allowed: {', '.join(RULES)}")
    z = poles * step
    if rule == "bilinear":
        return (1 + z / 2) / (1 - z / 2), step / (1 - z / 2)
    small = z.abs() < _SERIES_BELOW
    safe = torch.where(
        small, torch.ones_like(z), z
    )  # a quotient by 0 would also spoil the gradient of the other branch
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4))
    return torch.exp(z), step * torch.where(small, series, _expm1(safe) / safe)


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without loss near 0, from real functions: not every device has `torch.expm1` of complex numbers."""
    real = torch.expm1(z.real) * z.imag.cos() - 2 * (z.imag / 2).sin().square()
    return torch.complex(real, z.real.exp() * z.imag.sin())


def diagonal_scan(decay: Tensor, inputs: Tensor, reverse: bool = False) -> Tensor:
    """All states of x_t = λ̄ x_{t-1} + v_t with x_{-1} = 0, in log₂ L steps of doubling, differentiable in both.

    After the step with shift k every x_t is the sum over its last 2k inputs: x[k:] += λ̄^k x[:-k]. Backward is the same
    scan with conj(λ̄) from the end; one tensor of states is kept for it.

    Args:
        decay (`Tensor`): λ̄, (P), real or complex.
        inputs (`Tensor`): v, (…, L, P), of the same dtype.
        reverse (`bool`): run from the last time step to the first.

    Returns:
        `Tensor`: x, (…, L, P).
    """
    if reverse:
        return diagonal_scan(decay, inputs.flip(-2)).flip(-2)
    return _Doubling.apply(decay, inputs)


def diagonal_convolution(decay: Tensor, inputs: Tensor, reverse: bool = False) -> Tensor:
    """What `diagonal_scan` gives, as a convolution with λ̄^t by FFT of length 2L. Arguments as there, complex."""
    if reverse:
        return diagonal_convolution(decay, inputs.flip(-2)).flip(-2)
    length = inputs.shape[-2]
    spectrum = torch.fft.fft(inputs, 2 * length, dim=-2) * torch.fft.fft(powers(decay, length).mT, 2 * length, dim=-2)
    return torch.fft.ifft(spectrum, dim=-2)[..., :length, :]


def powers(decay: Tensor, length: int) -> Tensor:
    """λ̄^t for t = 0 … length - 1 in a new last dimension, by doubling: no logarithm, which λ̄ = 0 has not."""
    found, step = torch.ones_like(decay)[..., None], decay[..., None]
    while found.shape[-1] < length:
        found, step = torch.cat([found, found * step], -1), step * step
    return found[..., :length]


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor) -> Tensor:
        states = _double(decay, inputs.clone())
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        adjoint = _double(decay.conj(), grad.flip(-2)).flip(-2)  # g_t = ∂L/∂x_t + conj(λ̄) g_{t+1}
        before = states[..., :-1, :].conj()
        return (adjoint[..., 1:, :] * before).flatten(0, -2).sum(0), adjoint


def _double(decay: Tensor, states: Tensor) -> Tensor:
    shift = 1
    while shift < states.shape[-2]:
        states[..., shift:, :] += decay * states[..., :-shift, :]
        decay, shift = decay * decay, 2 * shift
    return states
