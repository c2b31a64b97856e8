# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The gated RMSNorm of Mamba-2 averages over the inner channels: what its weight must become when some are removed."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


RESCALES = ("mask", "energy", "none")


def rescale(block: nn.Module, path: str, factor: float) -> None:
    """Multiply the norm's weight."""
    parameter = block.get_parameter(path)
    with torch.no_grad():
        parameter.copy_(parameter.float() * factor)


def mask_factor(before: int, after: int) -> float:
    """sqrt(I / I'): with it the norm gives what it gave with the removed channels at zero, but for its eps.

    With S the sum of v² over the kept channels, the masked norm divides by sqrt(S / I), the sliced one by sqrt(S / I').
    Equality would also need eps · I / I', but eps is one number for the whole model.
    """
    return math.sqrt(before / after)


class RootMeanSquare:
    """Mean over tokens of the root mean square that a gated norm divides by, seen through a hook on it.

    Args:
        norm (`nn.Module`): called with (scan output, gate).
    """

    def __init__(self, norm: nn.Module):
        self.total, self.tokens = 0.0, 0
        self._handle = norm.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [*args, *kwargs.values()]
        v = values[0].float()
        if len(values) > 1 and values[1] is not None:
            v = v * F.silu(values[1].float())
        roots = v.square().mean(-1).sqrt()
        self.total += float(roots.sum(dtype=torch.float64))
        self.tokens += roots.numel()

    def close(self) -> float:
        """Remove the hook; the mean, 0 where nothing was seen."""
        self._handle.remove()
        return self.total / self.tokens if self.tokens else 0.0
