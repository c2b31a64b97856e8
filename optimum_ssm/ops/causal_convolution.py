# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The short causal convolution before a scan: in Triton on a GPU, in C on a CPU, with neighbouring channels side by side.

transformers' fallback turns [B, L, I] to [B, I, L] and back around torch's convolution; these copies take several times
longer than the convolution itself. Here both are views of [B, L, I], as the projections around the convolution want.
"""

import ctypes

import torch
from transformers.utils.import_utils import is_causal_conv1d_available

from ..errors import ConfigurationError
from .backend import check_operands, chosen_backend, use_triton
from .native_library import library, library_obstacle


ACTIVATIONS = (None, "silu", "swish")
_POINTERS = ("x", "weight", "bias", "y")
_SIZES = ("batch", "channels", "length", "taps", "silu", "threads", "x_batch", "x_step", "next")


class Convolution(ctypes.Structure):
    """`struct convolution` of the C file: pointers, sizes and strides, 8 bytes each."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _SIZES]


def can_convolve(x: torch.Tensor, weight: torch.Tensor, activation: str | None) -> bool:
    """Whether `causal_convolution` can run and is worth it: without autograd, where x has neighbouring channels side by
    side, and where the environment variable OPTIMUM_SSM_SCAN does not ask for another backend. On a GPU the package
    causal-conv1d, which transformers then calls, goes first."""
    name = chosen_backend()
    if torch.is_grad_enabled() or x.dim() != 3 or x.stride(1) != 1 or activation not in ACTIVATIONS or not x.numel():
        return False
    if x.is_cuda:
        return (name == "triton" or not is_causal_conv1d_available()) and use_triton(x, 0)
    in_c = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and name in ("auto", "native")
    return in_c and library_obstacle() is None


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """One causal filter per channel: y_{t,c} = act(bias_c + Σ_k weight_{c,k} x_{t-K+1+k,c}), with x = 0 before the start.

    Args:
        x: [B, I, L] with stride 1 over I; on a CPU float32.
        weight: [I, K].
        bias: [I].
        activation: "silu", "swish" (the same) or None.

    Returns:
        y, [B, I, L] in x's dtype, a transposed view of a contiguous [B, L, I]. Arithmetic is float32.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x; on a CPU also x of another dtype or layout.
    """
    if x.is_cuda:
        from .triton_causal_convolution import convolve

        return convolve(x, weight, bias, activation)
    batch, channels, length = x.shape
    check_operands(x, {"weight": (weight, (channels, weight.shape[-1])), "bias": (bias, (channels,))})
    if x.dtype != torch.float32 or x.stride(1) != 1:
        raise ConfigurationError(
            f"x is {x.dtype} with stride {x.stride(1)} over channels: it must be float32 with stride 1"
        )
    # Whatever is made here lives until the call is over.
    x, taps = x.detach(), weight.detach().to(torch.float32).t().contiguous()
    bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
    y = torch.empty(batch, length, channels, dtype=torch.float32, device=x.device)
    call = Convolution(batch=batch, channels=channels, length=length, taps=len(taps), silu=activation is not None)
    call.x, call.weight, call.y = x.data_ptr(), taps.data_ptr(), y.data_ptr()
    call.bias = None if bias is None else bias.data_ptr()
    call.x_batch, call.x_step, call.threads = x.stride(0), x.stride(2), torch.get_num_threads()
    library().optimum_ssm_causal_convolution(ctypes.byref(call))
    return y.transpose(1, 2)
