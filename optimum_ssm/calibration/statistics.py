# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sums over calibration tokens. Every statistic is a sum, so that batches and ranks merge by addition.

| name | value | shape |
|---|---|---|
| `col_energy` | (1/T) Σ_t x_{t,j}² | (columns) |
| `gram` | (1/T) Σ_t x_t x_tᵀ | (columns, columns) |
| `conv_gram` | per channel (1/T) Σ_t w_t w_tᵀ, w_t the channel's last K inputs, zeros on the left | (channels, K, K) |
| `moments` | mean b_j and variance (1/T) Σ_t (x_{t,j} - b_j)² | (2, columns) |
| `gate_energy` | (1/T) Σ_t silu(x_{t,j})² | (columns) |
| `sequence_activity` | sqrt(Σ_s (mean_t abs(x_{s,t,j}))²) over the sequences s | (columns) |

Sums over the recurrence come from the scan itself, see `calibration.seam`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


# Tokens that tensor cores add up in one go.
TENSOR_CORE_TERMS = 2048


class Statistic:
    """A sum with the number of tokens in it, sized by its first input. Symbols: B sequences, L tokens, T = B·L in all.

    What one update adds is computed in float32, the sum over updates is float64: rounded to float32, it is the same
    whatever the order and however the updates were shared out over processes.

    Attributes:
        sum (`Tensor`, *optional*): where the inputs are; `None` before the first one.
        tokens (`int`): tokens that went into it.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.tokens = 0

    def shape(self, columns: int) -> tuple[int, ...]:
        """Shape of the sum over inputs of so many columns."""
        return (columns,)

    def update(self, x: Tensor) -> None:
        """Add the inputs `x` (B, L, columns)."""
        if self.sum is None:
            self.sum = torch.zeros(self.shape(x.shape[-1]), dtype=torch.float64, device=x.device)
        self.tokens += x.shape[0] * x.shape[1]
        self._add(x.detach().to(self.sum.device))

    def _add(self, x: Tensor) -> None:
        """Add `x`, of any float dtype; sums are of its values in float32 or better."""
        raise TypeError(f"{type(self).__name__} does not take activations")

    def merge(self, other: Statistic) -> None:
        """Add another rank's or batch's sum of the same kind."""
        if other.sum is not None:
            self.sum = other.sum.clone() if self.sum is None else self.sum + other.sum.to(self.sum.device)
        self.tokens += other.tokens

    def value(self) -> Tensor:
        """The sum per token, float32."""
        return (self.sum / max(1, self.tokens)).float()


class ColumnEnergy(Statistic):
    """Mean square of every input column: the diagonal of the Gram matrix."""

    def _add(self, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        if x.is_cuda:
            # The norm widens and squares what it reads: one pass over x, and no second tensor of its size.
            self.sum += torch.linalg.vector_norm(x, dim=(0, 1), dtype=wide).square_()
        else:  # where that takes ten times as long
            x = x.to(wide)
            self.sum += torch.linalg.vecdot(x, x, dim=1).sum(0, dtype=torch.float64)


class Gram(Statistic):
    """Second moment of the inputs, not centred: half the Hessian of the layer's squared output error."""

    def shape(self, columns: int) -> tuple[int, ...]:
        return (columns, columns)

    def _add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
            x = x.float()
            self.sum += x.T @ x
            return
        # Tensor cores: products of two such numbers are exact in float32. Their sums are cut off, not rounded, which adds
        # up over many terms; a part at a time they err about as much as float32 products.
        first, *rest = x.split(TENSOR_CORE_TERMS)
        added = torch.mm(first.T, first, out_dtype=torch.float32)
        for part in rest:
            torch.addmm(added, part.T, part, out_dtype=torch.float32, out=added)
        self.sum += added


class ConvGram(Statistic):
    """Second moment of the K inputs that each tap of a causal depthwise convolution sees, channel by channel.

    Args:
        taps (`int`): K.
    """

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.taps = taps

    def shape(self, columns: int) -> tuple[int, ...]:
        return (columns, self.taps, self.taps)

    def _add(self, x: Tensor) -> None:
        # Entry (k, j) sums x_s x_{s-lag} with lag = j - k over all s but the last K-1-j steps, which tap j does not reach:
        # one product per lag, not one per pair of taps.
        x, length = x.float(), x.shape[1]
        for lag in range(min(self.taps, length)):
            products = x[:, lag:] * x[:, : length - lag]
            seen, entry = 0, torch.zeros_like(x[0, 0])
            for j in range(lag, self.taps):  # each sees one step more than the one before it
                start, seen = seen, max(0, length - lag - (self.taps - 1 - j))
                entry = entry + products[:, start:seen].sum((0, 1))
                self.sum[:, j - lag, j] += entry
                if lag:
                    self.sum[:, j, j - lag] += entry


class Moments(Statistic):
    """Mean and variance of every column, all of it in float64: the difference of two large sums is the variance."""

    def shape(self, columns: int) -> tuple[int, ...]:
        return (2, columns)

    def _add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).double()
        self.sum += torch.stack([x.sum(0), x.square().sum(0)])

    def value(self) -> Tensor:
        """(2, columns): mean, variance; float32."""
        mean, square = self.sum / max(1, self.tokens)
        return torch.stack([mean, (square - mean.square()).clamp_min(0)]).float()


class GateEnergy(Statistic):
    """Mean square of silu of every column."""

    def _add(self, x: Tensor) -> None:
        self.sum += F.silu(x.float()).square().sum(dim=(0, 1))


class SequenceActivity(Statistic):
    """Norm over sequences of the mean absolute activation (arXiv 2504.11409, Sec. 3)."""

    def _add(self, x: Tensor) -> None:
        self.sum += x.float().abs().mean(1).square().sum(0)

    def value(self) -> Tensor:
        """Not per token: a norm over sequences."""
        return self.sum.sqrt().float()


STATISTICS = {
    "col_energy": ColumnEnergy,
    "gram": Gram,
    "conv_gram": ConvGram,
    "moments": Moments,
    "gate_energy": GateEnergy,
    "sequence_activity": SequenceActivity,
}


def site_statistic(name: str, taps: int = 0) -> Statistic:
    """An empty statistic by name; `taps` is the width of a convolution, for `conv_gram` alone."""
    if name not in STATISTICS:
        raise ValueError(f"unknown statistic {name!r}. Allowed: {', '.join(STATISTICS)}")
    return ConvGram(taps) if name == "conv_gram" else STATISTICS[name]()
