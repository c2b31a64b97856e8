# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan with sums over time in C: what `selective_scan` runs on a CPU where it compiles.

`native/selective_scan.c` says how it computes, `native_library.py` how it becomes a library. Inputs of two bytes an
element become float32 here, inputs of any strides are read where they lie.
"""

import ctypes

import torch

from .backend import check_operands
from .native_library import library
from .recurrence import Inputs


_OVER_TIME = ("decay_error", "state_energy", "state_prev_total")
_TIME_INDEXED = ("state_prev", "decay_sum")
_ROWS = ("x", "dt", "z", "B", "C")
_INPUTS = (*_ROWS, "A", "D", "delta_bias")
_OUTPUTS = ("y", "last_state", *_OVER_TIME, "gate_energy", *_TIME_INDEXED)
_SIZES = ("batch", "channels", "states", "length", "softplus", *(f"{name}_is_double" for name in _TIME_INDEXED))


class Call(ctypes.Structure):
    """`struct call` of the C file: pointers, sizes and strides, 8 bytes each."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in (*_INPUTS, *_OUTPUTS)]
        + [(name, ctypes.c_int64) for name in (*_SIZES, "threads")]
        + [(f"{name}_strides", ctypes.c_int64 * 3) for name in (*_ROWS, *_TIME_INDEXED)]
    )


def scan(inputs: Inputs, sums: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, I, L] in x's dtype and the last state [B, I, N] in float32; adds to `sums`.

    Arguments are as in `selective_scan`, which has checked `sums`. Arithmetic is float32 whatever the dtypes; what is
    summed over time is added up in float64. Numbers below the smallest normal one count as 0.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x.
        MemoryError: no memory for the states of `torch.get_num_threads()` panels of 128 channels.
    """
    x, (channels, states) = inputs.x, inputs.A.shape
    batch, _, length = x.shape
    rows, maps = x.shape, (batch, states, length)
    shapes = {"dt": rows, "z": rows, "B": maps, "C": maps, "A": (x.shape[1], states)}
    shapes |= {"D": (channels,), "delta_bias": (channels,)}
    check_operands(x, {name: (getattr(inputs, name), shape) for name, shape in shapes.items()})
    # Whatever is made here lives until the call is over.
    tensors = {name: _as_float32(getattr(inputs, name), contiguous=name not in _ROWS) for name in _INPUTS}
    single, double = ({"dtype": dtype, "device": x.device} for dtype in (torch.float32, torch.float64))
    y = tensors["y"] = torch.empty(batch, length, channels, **single)
    state = tensors["last_state"] = torch.empty(batch, states, channels, **single)
    totals = {name: torch.empty(states, channels, **double) for name in _OVER_TIME if name in sums}
    if "gate_energy" in sums:
        totals["gate_energy"] = torch.empty(channels, **double)
    tensors |= totals | {name: sums[name] for name in _TIME_INDEXED if name in sums}
    call = Call(batch=batch, channels=channels, states=states, length=length, softplus=inputs.delta_softplus)
    call.threads = torch.get_num_threads()
    for name, tensor in tensors.items():
        setattr(call, name, None if tensor is None else tensor.data_ptr())
        if tensor is not None and name in (*_ROWS, *_TIME_INDEXED):
            setattr(call, f"{name}_strides", tensor.stride())
        if name in _TIME_INDEXED:
            setattr(call, f"{name}_is_double", tensor.dtype == torch.float64)
    if library().optimum_ssm_selective_scan(ctypes.byref(call)):
        raise MemoryError(f"the native scan found no memory for {batch} x {states} states of {call.threads} panels")
    for name, total in totals.items():
        sums[name].add_(total if name == "gate_energy" else total.t())
    return y.to(x.dtype).transpose(1, 2), state.transpose(1, 2)


def _as_float32(tensor: torch.Tensor | None, contiguous: bool) -> torch.Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.detach().to(torch.float32)
    return tensor.contiguous() if contiguous else tensor
