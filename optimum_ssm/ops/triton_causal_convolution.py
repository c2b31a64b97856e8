# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The causal depthwise convolution in front of the scan, with its activation, as one Triton kernel.

transformers' fallback turns [B, L, C] activations to [B, C, L] for torch's convolution and turns the result back for the
projection that follows: five passes over the activations where this kernel reads them once and writes them once.
"""

import torch
import triton
import triton.language as tl

from .backend import check_operands, on_device_of


def convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """What `causal_convolution` gives, on a GPU. x may have any strides; those of a transposed [B, L, C] are read in whole
    rows.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x.
    """
    batch, channels, length = x.shape
    check_operands(x, {"weight": (weight, (channels, weight.shape[-1])), "bias": (bias, (channels,))})
    y = x.new_empty(batch, length, channels)
    sizes = {"BLOCK_L": 32, "BLOCK_C": min(128, triton.next_power_of_2(channels)), "TAPS": weight.shape[1]}
    grid = (triton.cdiv(channels, sizes["BLOCK_C"]), triton.cdiv(length, sizes["BLOCK_L"]), batch)
    with on_device_of(x):
        _conv_kernel[grid](
            x, weight.contiguous(), bias, y, channels, length, *x.stride(), SILU=activation is not None, **sizes
        )
    return y.transpose(1, 2)


@triton.jit
def _conv_kernel(
    # [B, C, L] with any strides; [C, TAPS]; [C] or None; [B, L, C]
    x,
    weight,
    bias,
    y,
    channels,
    length,
    x_batch,
    x_channel,
    x_step,
    SILU: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TAPS: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    sequence = tl.program_id(2).to(tl.int64)
    in_channels = channel < channels
    row = x + sequence * x_batch + channel[None, :].to(tl.int64) * x_channel
    total = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for k in tl.static_range(TAPS):
        s = t - (TAPS - 1) + k
        seen = (s >= 0) & (s < length)
        # The taps of neighbouring steps overlap: all but the first read of an entry comes from the cache.
        value = tl.load(row + s[:, None].to(tl.int64) * x_step, mask=seen[:, None] & in_channels[None, :], other=0.0)
        tap = tl.load(weight + channel * TAPS + k, mask=in_channels, other=0.0)
        total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    tile = y + (sequence * length + t[:, None]) * channels + channel[None, :]
    tl.store(tile, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & in_channels[None, :])
