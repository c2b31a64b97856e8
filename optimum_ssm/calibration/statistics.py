# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sums over calibration tokens. Every statistic is a sum, so that batches and ranks merge by addition.

| name | value | shape |
|---|---|---|
| `col_energy` | (1/T) Σ_t x_{t,j}² | (in) |
| `gram` | (1/T) Σ_t x_t x_tᵀ | (in, in) |
| `conv_gram` | per channel (1/T) Σ_t w_t w_tᵀ, w_t the channel's last K inputs, zeros on the left | (channels, K, K) |
| scan sums | as `ops.selective_scan` and `ops.state_space_dual` define them, per sequence | see there |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Statistic:
    """A sum in float32 with the number of tokens in it. Symbols: B sequences, L tokens, T = B·L in all.

    Args:
        shape (`tuple[int, ...]`): shape of the sum.
        device (`torch.device`): where the sum lives.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Add the inputs `x` (B, L, channels)."""
        self.tokens += x.shape[0] * x.shape[1]
        self._add(x.detach().to(device=self.sum.device, dtype=torch.float32))

    def _add(self, x: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} does not take activations")

    def merge(self, other: Statistic) -> None:
        """Add another rank's or batch's sum of the same kind."""
        self.sum += other.sum.to(self.sum.device)
        self.tokens += other.tokens

    def value(self) -> Tensor:
        """The sum per token."""
        return self.sum / max(1, self.tokens)


class ColumnEnergy(Statistic):
    """Mean square of every input column: the diagonal of the Gram matrix."""

    def _add(self, x: Tensor) -> None:
        self.sum += x.square().sum(dim=(0, 1))


class Gram(Statistic):
    """Second moment of the inputs, not centred: half the Hessian of the layer's squared output error."""

    def _add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        self.sum.addmm_(x.T, x)


class ConvGram(Statistic):
    """Second moment of the K inputs that each tap of a causal depthwise convolution sees, channel by channel."""

    def _add(self, x: Tensor) -> None:
        taps = self.sum.shape[-1]
        windows = F.pad(x, (0, 0, taps - 1, 0)).unfold(1, taps, 1)  # (B, L, channels, K), oldest first
        self.sum += torch.einsum("blck,blcj->ckj", windows, windows)


class ScanSum(Statistic):
    """A sum that the selective scan fills in place; see `calibration.seam`."""

    def value(self) -> Tensor:
        """The raw sum: published saliencies are sums over steps and sequences."""
        return self.sum


def site_statistic(name: str, weight: Tensor, device: torch.device) -> Statistic:
    """An empty statistic of the inputs of `weight` ((out, in), or (channels, 1, K) for `conv_gram`)."""
    if name == "conv_gram":
        return ConvGram((weight.shape[0], weight.shape[-1], weight.shape[-1]), device)
    if name == "gram":
        return Gram((weight.shape[1], weight.shape[1]), device)
    if name == "col_energy":
        return ColumnEnergy((weight.shape[1],), device)
    raise ValueError(f"unknown statistic {name!r}. Allowed: col_energy, gram, conv_gram")
