# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The column sweep in C: what `column_sweep` runs on a CPU where it compiles. `native/column_sweep.c` says how."""

import ctypes

import torch

from ..errors import ConfigurationError
from ..sparsity.pattern import Pattern
from .backend import check_operands
from .native_library import library


_POINTERS = ("block", "factor", "dead", "chosen", "errors")
_SIZES = ("rows", "columns", "group", "removed", "block_row", "block_column", "chosen_row", "chosen_column", "threads")


class Sweep(ctypes.Structure):
    """`struct sweep` of the C file: pointers, sizes and strides, 8 bytes each."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _SIZES]


def sweep(
    block: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, chosen: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Arguments and result as in `column_sweep.sweep_columns`; `factor` is (columns, columns), float32, as is `block`.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than `block`, or columns that are no whole groups.
        MemoryError: no memory for a few rows of every thread.
    """
    rows, columns = block.shape
    shapes = {"factor": (factor, (columns, columns)), "dead": (dead, (columns,)), "chosen": (chosen, (rows, columns))}
    check_operands(block, shapes)
    if pattern.group and columns % pattern.group:
        raise ConfigurationError(f"{columns} columns do not divide into groups of {pattern.group}")
    errors = block.new_empty(columns, rows)
    # Whatever is made here lives until the call is over.
    factor, dead = factor.contiguous(), dead.contiguous()
    call = Sweep(rows=rows, columns=columns, group=pattern.group, removed=pattern.group - pattern.keep)
    call.block, call.factor, call.dead = block.data_ptr(), factor.data_ptr(), dead.data_ptr()
    call.chosen, call.errors, call.threads = chosen.data_ptr(), errors.data_ptr(), torch.get_num_threads()
    (call.block_row, call.block_column), (call.chosen_row, call.chosen_column) = block.stride(), chosen.stride()
    if library().optimum_ssm_column_sweep(ctypes.byref(call)):
        raise MemoryError(f"the native column sweep found no memory for {columns} columns in {call.threads} threads")
    return errors.T
