# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sums over the inputs of the scan, which need no recurrence: sizes of the time step, of B, C and x.

| name | sum over sequences and steps of | Mamba-1 | Mamba-2 |
|---|---|---|---|
| `tokens` | 1 | (1) | (1) |
| `dt` | Δ | (I) | (H) |
| `x_energy` | x² (Mamba-2: also over the head's channels) | (I) | (H) |
| `b_energy`, `c_energy` | B², C² | (1, N) | (G, N) |
| `dt_b_energy` | (Δ B)² | (I, N) | (H, N) |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


SCAN_MOMENTS = ("tokens", "dt", "x_energy", "b_energy", "c_energy", "dt_b_energy")


def moments(
    names: Iterable[str],
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    bias: Tensor | None = None,
    softplus: bool = False,
    limit: tuple[float, float] = (0.0, float("inf")),
) -> dict[str, Tensor]:
    """The named sums over one call of the scan, float32.

    Args:
        names (`Iterable[str]`): some of `SCAN_MOMENTS`.
        x, dt, B, C (`Tensor`): as in `ops.state_space_dual`: (B, L, H, P), (B, L, H), (B, L, G, N) twice. Mamba-1 has
            P = 1, H = I and G = 1.
        bias (`Tensor`, *optional*), softplus (`bool`), limit (`tuple`): how Δ follows from dt.
    """
    names = list(names)
    if not names:  # as in every call that only needs the scan's output
        return {}
    delta = dt.float() if bias is None else dt.float() + bias.float()
    delta = (F.softplus(delta) if softplus else delta).clamp(*limit)
    B, C = B.float(), C.float()
    heads, groups = delta.shape[-1], B.shape[2]
    make = {
        "tokens": lambda: torch.full((1,), float(x.shape[0] * x.shape[1]), device=x.device),
        "dt": lambda: delta.sum((0, 1)),
        "x_energy": lambda: x.float().square().sum((0, 1, 3)),
        "b_energy": lambda: B.square().sum((0, 1)),
        "c_energy": lambda: C.square().sum((0, 1)),
        "dt_b_energy": lambda: torch.einsum(
            "blgh,blgn->ghn", delta.square().unflatten(2, (groups, heads // groups)), B.square()
        ).flatten(0, 1),
    }
    return {name: make[name]() for name in names}


def mamba_moments(names: Iterable[str], x: Tensor, dt: Tensor, B: Tensor, C: Tensor, kwargs: dict[str, Any]) -> dict:
    """The same of a call of Mamba-1's scan: x and dt (B, I, L), B and C (B, N, L)."""
    turned = (
        x.transpose(1, 2)[..., None],
        dt.transpose(1, 2),
        B.transpose(1, 2)[:, :, None],
        C.transpose(1, 2)[:, :, None],
    )
    return moments(names, *turned, bias=kwargs.get("delta_bias"), softplus=kwargs.get("delta_softplus", False))


def mamba2_moments(names: Iterable[str], x: Tensor, dt: Tensor, B: Tensor, C: Tensor, kwargs: dict[str, Any]) -> dict:
    """The same of a call of Mamba-2's scan."""
    limit = kwargs.get("dt_limit") or (0.0, float("inf"))
    return moments(
        names, x, dt, B, C, bias=kwargs.get("dt_bias"), softplus=kwargs.get("dt_softplus", False), limit=limit
    )
