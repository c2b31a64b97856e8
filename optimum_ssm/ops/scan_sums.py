# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the two scans share: how a sum over time is described, allocated and checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import CalibrationError, ConfigurationError


SUM_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class ScanSum:
    """One sum that a scan can accumulate.

    Attributes:
        dims: the names of its dimensions, in order; "length" is the number of tokens of a sequence.
        meaning: its definition, in the symbols of the scan's docstring. Sums have the units of what is summed: they
            are never divided by a number of tokens or sequences.
    """

    dims: tuple[str, ...]
    meaning: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the sum, given the size of every dimension by name."""
        return tuple(sizes[dim] for dim in self.dims)


def allocate(
    table: Mapping[str, ScanSum],
    names: Iterable[str],
    sizes: Mapping[str, int],
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Zeros for every name of `names`, with the shape that `table` gives it.

    Raises:
        ConfigurationError: a name is not in `table`, or `dtype` is neither float32 nor float64.
    """
    names = list(names)
    _check_names(names, table)
    if dtype not in SUM_DTYPES:
        raise ConfigurationError(f"sums cannot be {dtype}: allowed are {_listed(SUM_DTYPES)}")
    return {name: torch.zeros(table[name].shape(sizes), device=device, dtype=dtype) for name in names}


def check_sums(
    sums: Mapping[str, torch.Tensor], table: Mapping[str, ScanSum], sizes: Mapping[str, int], device: torch.device
) -> None:
    """Refuses accumulators that the scan could only add to wrongly.

    The shape is compared exactly: an in-place addition would otherwise broadcast and give wrong sums in silence.

    Raises:
        ConfigurationError: an unknown name, or a wrong shape, dtype or device. The message names the sum.
    """
    _check_names(sums, table)
    for name, total in sums.items():
        shape = table[name].shape(sizes)
        if tuple(total.shape) != shape:
            wanted = f"{list(shape)} ({', '.join(table[name].dims)})"
            raise ConfigurationError(f"sum {name!r} has shape {list(total.shape)}: it must be {wanted}")
        if total.dtype not in SUM_DTYPES:
            raise ConfigurationError(f"sum {name!r} is {total.dtype}: allowed are {_listed(SUM_DTYPES)}")
        if total.device != device:
            raise ConfigurationError(f"sum {name!r} is on {total.device}: it must be on {device}, as the scan's input")


def check_inputs(scan: str, chunk_size: int | None, **tensors: torch.Tensor | None) -> None:
    """Refuses what neither scan can run: an impossible chunk, or inputs for which autograd expects a graph.

    The scans overwrite their buffers and cannot be differentiated: a silent detached output would be a wrong gradient.

    Raises:
        ConfigurationError: chunk_size < 1.
        CalibrationError: grad mode is on and one of `tensors` requires grad. The message names it.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ConfigurationError(f"chunk_size is {chunk_size}: it must be at least 1")
    for name, tensor in tensors.items():
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise CalibrationError(
                f"{scan} is not differentiable but {name!r} requires grad: call it under torch.no_grad()"
            )


def partial_sums(
    sums: Iterable[str], shape: tuple[int, int, int, int], device: torch.device
) -> dict[str, torch.Tensor]:
    """Room for what every program of a Mamba-2 kernel adds up, by the names of `sums`: [B, programs of a head, H, N] each.

    Added up by `add_partial_sums` and not in the kernel: without atomic additions, equal inputs give equal bits.
    """
    return {name: torch.empty(shape, dtype=torch.float32, device=device) for name in sums}


def add_partial_sums(sums: Mapping[str, torch.Tensor], partial: Mapping[str, torch.Tensor]) -> None:
    """Adds what `partial_sums` made room for to "state_energy" [H, N] and "decay_error" [H], over all other dimensions."""
    for name, values in partial.items():
        sums[name].add_(values.sum((0, 1) if sums[name].dim() == 2 else (0, 1, 3)))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the state and of all arithmetic: float64 for a float64 input, otherwise float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_names(names: Iterable[str], table: Mapping[str, ScanSum]) -> None:
    for name in names:
        if name not in table:
            raise ConfigurationError(f"unknown sum {name!r}: allowed are {_listed(table)}")


def _listed(values: Iterable) -> str:
    return ", ".join(str(value) for value in values)
