# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The one seam into transformers: the module-level scan that a mixer calls, replaced while calibration runs.

transformers looks the function up in its modelling module at every call, so replacing the module's global sees every
layer. The replacement is this library's scan: it can sum over the hidden state on the way, and on the CPU it is several
times faster than the fallback. The convolution before it is replaced where this library has a faster one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_mamba_ssm_available

from ..families.base import Family
from ..ops import selective_scan as mamba_scan
from ..ops import state_space_dual as mamba2_scan
from ..ops.backend import chosen_backend
from ..ops.causal_convolution import can_convolve, causal_convolution
from ..ops.differentiable_scan import differentiable_selective_scan
from ..ops.gated_norm import can_normalise, gated_norm
from ..ops.scan_moments import SCAN_MOMENTS, mamba2_moments, mamba_moments
from .left_product import uncopied_left_products
from .timing import phase


# The convolution of every modelling module that has one, a global like the scan.
_CONVOLUTION = "causal_conv1d_fn"
# Mamba-2's norm after the scan: a class.
_NORM = "MambaRMSNormGated"
# Sums that each recurrence can give, by name.
AVAILABLE_SUMS = {
    "mamba": (*mamba_scan.SCAN_SUMS, *SCAN_MOMENTS),
    "mamba2": (*mamba2_scan.SCAN_SUMS, *SCAN_MOMENTS),
}


class ScanSeam:
    """What the replaced scan adds to while it runs.

    Attributes:
        sums (`dict[str, Tensor]`): accumulators by name, made at the first call after `start`; float64, but for
            those of every time step, which are too large for that.
        tokens (`int`): tokens that went into them.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._moments: tuple[str, ...] = ()
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0

    def start(self, names: tuple[str, ...]) -> None:
        """Begin new sums of these names; with no name the scan only computes its output."""
        self._names = tuple(name for name in names if name not in SCAN_MOMENTS)
        self._moments = tuple(name for name in names if name in SCAN_MOMENTS)
        self.sums, self.tokens = {}, 0

    @property
    def summing(self) -> bool:
        """Whether any sum is asked for."""
        return bool(self._names or self._moments)

    def _add_moments(self, found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.double()

    def _of_scan(self) -> dict[str, Tensor] | None:
        """The sums that the scan itself fills."""
        return {name: self.sums[name] for name in self._names} or None

    def mamba(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Any:
        """`mamba_selective_scan` with the sums. Shapes as in `ops.selective_scan`."""
        kwargs = _without_fallback_flags(kwargs)
        if self._names and self._names[0] not in self.sums:
            sizes = {"channels": x.shape[1], "state_size": A.shape[1], "length": x.shape[2], "device": x.device}
            for name in self._names:
                dtype = torch.float32 if "length" in mamba_scan.SCAN_SUMS[name].dims else torch.float64
                self.sums |= mamba_scan.allocate_sums((name,), **sizes, dtype=dtype)
        self.tokens += x.shape[0] * x.shape[2]
        self._add_moments(mamba_moments(self._moments, x, dt, B, C, kwargs))
        return mamba_scan.selective_scan(x, dt, A, B, C, sums=self._of_scan(), **kwargs)

    def mamba2(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, **kwargs: Any) -> Any:
        """`mamba2_chunk_scan` with the sums. Shapes as in `ops.state_space_dual`."""
        kwargs["chunk_size"] = 128 if x.is_cuda else 64  # the model's own suits the fused kernel, these suit torch
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if self._names and self._names[0] not in self.sums:
            self.sums |= mamba2_scan.allocate_sums(
                self._names, heads=x.shape[2], state_size=B.shape[3], device=x.device, dtype=torch.float64
            )
        self.tokens += x.shape[0] * x.shape[1]
        self._add_moments(mamba2_moments(self._moments, x, dt, B, C, kwargs))
        return mamba2_scan.state_space_dual(x, dt, A, B, C, sums=self._of_scan(), **kwargs)


@contextmanager
def replaced_scan(family: Family, model: nn.Module) -> Iterator[ScanSeam]:
    """Replace the scan of `model`'s modelling module by this library's; the original is back at exit, come what may.

    On CUDA with mamba_ssm installed, calls that ask for no sums are left to the fused kernel, unless `OPTIMUM_SSM_SCAN`
    names a backend; all others run this library's scan, in Triton where it can (`ops.backend`). Under autograd Mamba-1
    runs this library's differentiable scan, Mamba-2 transformers' own, which is made of matrix products already.

    The convolution before it runs in Triton or, on a CPU with a C compiler, in C as well, and Mamba's time steps are not
    copied on their way to the scan. Mamba-2's gated norm after it runs in Triton on a GPU.
    """
    mixers = [mixer for _, block in family.blocks(model) if (mixer := family.mixer(block)) is not None]
    module = sys.modules[type(mixers[0]).__module__]
    original, convolution = getattr(module, family.scan), getattr(module, _CONVOLUTION, None)
    seam = ScanSeam()
    ours = getattr(seam, family.recurrence)

    def scan(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with phase("scan with sums" if seam.summing else "scan"):
            return chosen(x, *args, **kwargs)

    def chosen(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        fused = x.is_cuda and not seam.summing and chosen_backend() == "auto" and is_mamba_ssm_available()
        if fused:
            return original(x, *args, **kwargs)
        if not torch.is_grad_enabled():
            return ours(x, *args, **kwargs)
        if family.recurrence == "mamba":
            return differentiable_selective_scan(x, *args, **_without_fallback_flags(kwargs))
        return original(x, *args, **kwargs)

    def convolve(x: Tensor, weight: Tensor, bias: Any = None, activation: Any = None, **kwargs: Any) -> Tensor:
        with phase("convolution"):
            return chosen_convolution(x, weight, bias, activation, **kwargs)

    def chosen_convolution(x: Tensor, weight: Tensor, bias: Any, activation: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("seq_idx") is None and can_convolve(x, weight, activation):
            return causal_convolution(x, weight, bias, activation)
        return convolution(x, weight, bias, activation=activation, **kwargs)

    norm = getattr(module, _NORM, None)
    normalise = None if norm is None else norm.forward

    def chosen_norm(self: nn.Module, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        size = getattr(self, "group_size", hidden_states.shape[-1])
        if can_normalise(hidden_states, gate, size):
            return gated_norm(hidden_states, gate, self.weight, size, self.variance_epsilon)
        return normalise(self, hidden_states, gate)

    with ExitStack() as replaced:
        replaced.enter_context(_attribute(module, family.scan, scan))
        if convolution is not None:
            replaced.enter_context(_attribute(module, _CONVOLUTION, convolve))
        if norm is not None:
            replaced.enter_context(_attribute(norm, "forward", chosen_norm))
        if family.recurrence == "mamba":
            replaced.enter_context(uncopied_left_products(mixers))
        yield seam


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _without_fallback_flags(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without the two arguments that choose between torch fallbacks which are not used here."""
    return {name: value for name, value in kwargs.items() if name not in ("use_mambapy", "use_associative_scan")}
