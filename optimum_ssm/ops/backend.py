# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where a scan runs: in torch, which works everywhere and is the reference, in one Triton kernel on a GPU, or in C on a
CPU."""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec

import torch
from transformers.utils import logging

from ..errors import ConfigurationError
from .native_library import library_obstacle


logger = logging.get_logger(__name__)

BACKENDS = ("auto", "torch", "triton", "native")
# Set to one of BACKENDS, it decides for every scan whose caller leaves the choice open.
VARIABLE = "OPTIMUM_SSM_SCAN"
# The state of a block of channels stays in registers, and no published model has a larger one.
MAX_STATE_SIZE = 256
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def chosen_backend(backend: str | None = None) -> str:
    """`backend`, or what the environment variable `OPTIMUM_SSM_SCAN` says, or "auto".

    Raises:
        ConfigurationError: it is not one of `BACKENDS`.
    """
    name, origin = (backend, "backend") if backend is not None else (os.environ.get(VARIABLE) or "auto", VARIABLE)
    if name not in BACKENDS:
        raise ConfigurationError(f"{origin} is {name!r}: allowed are {', '.join(BACKENDS)}")
    return name


def check_operands(x: torch.Tensor, shapes: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]) -> None:
    """Refuses tensors that a kernel would read beyond their end, and those on another device than `x`.

    Args:
        x: scan input.
        shapes: of every other operand, by name, the tensor (or None) and the shape that it must have.

    Raises:
        ConfigurationError: a wrong shape or device; the message names the operand.
    """
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ConfigurationError(f"{name!r} has shape {list(tensor.shape)}: it must be {list(shape)}")
        if tensor is not None and tensor.device != x.device:
            raise ConfigurationError(f"{name!r} is on {tensor.device}: it must be on {x.device}, as x")


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Where Triton launches what works on `x`: on its GPU, which need not be the current one; in the interpreter nowhere."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def active_backend(device: torch.device) -> str:
    """Which kernels a pass on `device` will use as far as it can, "torch", "triton" or "native"."""
    name = chosen_backend()
    if name != "auto":
        return name
    if device.type == "cpu":
        return "native" if library_obstacle() is None else "torch"
    return "triton" if _triton_is_installed() else "torch"


def scan_backend(x: torch.Tensor, state_size: int, backend: str | None = None) -> str:
    """Where Mamba's selective scan of `x` runs, "torch", "triton" or "native".

    Args:
        x: scan input.
        state_size: N.
        backend: one of `BACKENDS`; "auto" is Triton on a GPU and C on a CPU where they can run, and otherwise torch, with
            one warning. `None` asks the environment variable `OPTIMUM_SSM_SCAN` first.

    Raises:
        ConfigurationError: an unknown backend, or "triton" or "native" where it cannot run; the message says why.
    """
    name = chosen_backend(backend)
    if name == "native" or (name == "auto" and x.device.type == "cpu"):
        return "native" if _use_native(x, explicit=name == "native") else "torch"
    return "triton" if use_triton(x, state_size, name) else "torch"


def _use_native(x: torch.Tensor, explicit: bool) -> bool:
    obstacle = _native_obstacle(x)
    if obstacle and explicit:
        raise ConfigurationError(f"the native scan cannot run: {obstacle}")
    # Where there is nothing to scan there is nothing to call either. float64 is for comparisons, which torch serves.
    if not x.numel() or x.dtype not in KERNEL_DTYPES:
        return False
    if obstacle:
        logger.warning_once(f"The scan runs in torch, several times slower than compiled: {obstacle}.")
    return not obstacle


def _native_obstacle(x: torch.Tensor) -> str | None:
    """Why C cannot scan `x`, if it cannot. The first tensor that it can compiles the library."""
    if x.device.type != "cpu":
        return f"x is on {x.device}, it must be on the CPU"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}, allowed are float32, float16 and bfloat16"
    return library_obstacle()


def use_triton(x: torch.Tensor, state_size: int, backend: str | None = None) -> bool:
    """Whether a kernel that exists in torch and in Triton runs in Triton.

    Args:
        x: scan input.
        state_size: N.
        backend: "torch", "triton", or "auto": Triton on a GPU where it can run, and otherwise torch, with one warning
            if that is on a GPU; "native", which only Mamba's scan has, is torch. `None` asks the environment variable
            `OPTIMUM_SSM_SCAN` first.

    Raises:
        ConfigurationError: an unknown backend, or "triton" where it cannot run; the message says why.
    """
    name = chosen_backend(backend)
    # Where there is nothing to scan there is nothing to launch either.
    if name in ("torch", "native") or (name == "auto" and not x.is_cuda) or not x.numel():
        return False
    obstacle = _obstacle(x, state_size)
    if obstacle and name == "triton":
        raise ConfigurationError(f"the Triton scan cannot run: {obstacle}")
    if obstacle:
        logger.warning_once(f"The scan runs in torch, several times slower than in Triton: {obstacle}.")
    return not obstacle


def _obstacle(x: torch.Tensor, state_size: int) -> str | None:
    """Why Triton cannot scan `x`, if it cannot."""
    if not _triton_is_installed():
        return "the package triton is not installed"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}, allowed are float32, float16 and bfloat16"
    if state_size > MAX_STATE_SIZE:
        return f"the state size is {state_size}, at most {MAX_STATE_SIZE} is allowed"
    if not x.is_cuda and not _triton_interprets():
        return f"x is on {x.device}, where only Triton's interpreter runs (TRITON_INTERPRET=1 before any import)"
    return None


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


def _triton_interprets() -> bool:
    """Whether kernels run in Triton's interpreter: what its own functions became when it was imported."""
    import triton
    import triton.language as tl

    return not isinstance(tl.sum, triton.JITFunction)
