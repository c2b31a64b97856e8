# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The gated RMSNorm as one Triton kernel: every activation is read once and written once."""

import torch
import triton
import triton.language as tl

from ..errors import ConfigurationError
from .backend import check_operands, on_device_of


def normalise(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """What `gated_norm` gives, with the same arguments.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x, or channels that do not divide into groups.
    """
    batch, length, channels = x.shape
    check_operands(x, {"gate": (gate, x.shape), "weight": (weight, (channels,))})
    if channels % group_size:
        raise ConfigurationError(f"{channels} channels do not divide into groups of {group_size}")
    y = torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    strides = x.stride(0), x.stride(1), gate.stride(0), gate.stride(1)
    sizes = {"GROUP": group_size, "BLOCK": triton.next_power_of_2(group_size), "num_warps": warps(group_size)}
    with on_device_of(x):
        _norm_kernel[batch * length, channels // group_size](
            x, gate, weight.contiguous(), y, length, channels, *strides, eps, **sizes
        )
    return y


def warps(group_size: int) -> int:
    """Of a program: some 16 channels a thread."""
    return min(16, max(1, triton.next_power_of_2(group_size) // 512))


@triton.jit
def _norm_kernel(
    # [B, L, I] with stride 1 over I; the same; [I]; [B, L, I] contiguous
    x,
    gate,
    weight,
    y,
    length,
    channels,
    x_batch,
    x_step,
    gate_batch,
    gate_step,
    eps,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    inside = within < GROUP
    channel = tl.program_id(1) * GROUP + within
    sequence, step = row // length, row % length
    u = tl.load(x + sequence * x_batch + step * x_step + channel, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gate + sequence * gate_batch + step * gate_step + channel, mask=inside, other=0.0).to(tl.float32)
    u *= z * tl.sigmoid(z)
    scale = tl.rsqrt(tl.sum(u * u, 0) / GROUP + eps)
    w = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * channels + channel, (u * scale * w).to(y.dtype.element_ty), mask=inside)
