# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The gated RMSNorm of Mamba-2 averages over the inner channels: what its weight must become when some are removed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


RESCALES = ("mask", "energy", "none")


def rescale(block: nn.Module, path: str, factor: float | Tensor) -> None:
    """Multiply the norm's weight: with one number, or with one for each of equal runs of channels (groups of the norm)."""
    with torch.no_grad():
        parameter = block.get_parameter(path)
        if isinstance(factor, Tensor):
            factor = factor.repeat_interleave(len(parameter) // len(factor)).to(parameter.device)
        parameter.copy_(parameter * factor)


def mask_factor(before: int, after: int) -> float:
    """sqrt(I / I'): with it the norm gives what it gave with the removed channels at zero, but for its eps.

    With S the sum of v² over the kept channels, the masked norm divides by sqrt(S / I), the sliced one by sqrt(S / I').
    Equality would also need eps · I / I', but eps is one number for the whole model.
    """
    return math.sqrt(before / after)


def norm_groups(norm: nn.Module) -> int:
    """Runs of channels over which a gated norm averages, each by itself: one before transformers 5.23."""
    channels = norm.weight.numel()
    return channels // getattr(norm, "group_size", channels)


class RootMeanSquare:
    """Sum over tokens of the root mean squares that a gated norm divides by, seen through a hook on it.

    Args:
        norm (`nn.Module`): called with (scan output, gate).
        groups (`int`): runs of channels that have a root mean square of their own.
    """

    def __init__(self, norm: nn.Module, groups: int):
        self.groups, self.tokens = groups, 0
        self.total = torch.zeros(groups, dtype=torch.float64, device=norm.weight.device)
        self._handle = norm.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [*args, *kwargs.values()]
        v = values[0].float()
        if len(values) > 1 and values[1] is not None:
            v = v * F.silu(values[1].float())
        roots = v.unflatten(-1, (self.groups, -1)).square().mean(-1).sqrt().reshape(-1, self.groups)
        self.total += roots.sum(0, dtype=torch.float64)
        self.tokens += len(roots)

    def close(self) -> tuple[Tensor, int]:
        """Remove the hook; the sums (groups), float64, and the tokens in them."""
        self._handle.remove()
        return self.total, self.tokens
