# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where a scan runs: in torch, which works everywhere and is the reference, or in one Triton kernel on a GPU."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from transformers.utils import logging

from ..errors import ConfigurationError


logger = logging.get_logger(__name__)

BACKENDS = ("auto", "torch", "triton")
# Set to one of BACKENDS, it decides for every scan whose caller leaves the choice open.
VARIABLE = "OPTIMUM_SSM_SCAN"
# The state of a block of channels stays in registers, and no published model has a larger one.
MAX_STATE_SIZE = 256


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


def use_triton(x: torch.Tensor, state_size: int, backend: str | None = None) -> bool:
    """Whether the scan of `x` runs in Triton.

    Args:
        x: scan input.
        state_size: N.
        backend: "torch", "triton", or "auto": Triton on a GPU where it can run, and otherwise torch, with one warning
            if that is on a GPU. `None` asks the environment variable `OPTIMUM_SSM_SCAN` first.

    Raises:
        ConfigurationError: an unknown backend, or "triton" where it cannot run; the message says why.
    """
    name = chosen_backend(backend)
    # Where there is nothing to scan there is nothing to launch either.
    if name == "torch" or (name == "auto" and not x.is_cuda) or not x.numel():
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
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
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
