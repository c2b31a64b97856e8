# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Freed memory that stays with the process from one block to the next, where the C library is glibc.

A block's forward on a CPU allocates and frees the same tensors again and again. By default glibc gives them back to the
kernel in between, and the kernel clears every page before it gives it again: for a small model that takes as long as a
third of the arithmetic.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest that glibc takes; what is as large always comes from the kernel, together with what malloc puts around it.
_LARGEST, _AROUND = 32 << 20, 4096
_KEPT = 1 << 30
# What a user has set stays as it is.
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")

_open = [0]  # how many contexts are


@contextmanager
def kept_heap() -> Iterator[None]:
    """Up to a gigabyte of freed memory is kept for the next allocations; at the last exit it goes back to the kernel.

    Afterwards glibc keeps as much as it does in any process that once freed a tensor of 32 MB. Nothing is done with
    another C library, or where environment variables say how malloc is to work.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    named = any(name in os.environ for name in _VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if named or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    _open[0] += 1
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        _open[0] -= 1
        if not _open[0]:
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
            libc.malloc_trim(ctypes.c_size_t(0))


def samples_that_fit(block: nn.Module, seq_len: int, batch_size: int) -> int:
    """As many of the `batch_size` samples of a forward pass as keep its widest product within what glibc can keep.

    It divides `batch_size`: batches then begin at the same samples whatever number of processes shares them out.

    Args:
        block (`nn.Module`): a block on a CPU.
        seq_len (`int`): tokens of a sample.
        batch_size (`int`): the most.
    """
    widest = max((module.weight.shape[0] for module in block.modules() if isinstance(module, nn.Linear)), default=1)
    most = max(1, (_LARGEST - _AROUND) // (4 * widest * seq_len))
    return max(size for size in range(1, min(batch_size, most) + 1) if batch_size % size == 0)
