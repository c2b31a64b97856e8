# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is derived from a Gram matrix is derived once, however many weights or segments of one have that matrix."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


T = TypeVar("T")


def once_per_matrix(function: Callable[..., T]) -> Callable[..., T]:
    """Remember the last result of `function(matrix, *args)` for each matrix, for as long as that tensor object lives.

    A matrix that was written to in between is another one. Results must not be changed in place. The segments of
    `in_proj` (z, x, B, C, dt) are given the same tensor by the block loop, so they share one factorisation.
    """
    found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @wraps(function)
    def remembered(matrix: Tensor, *args: Any) -> T:
        if matrix.is_inference():  # counts no writes
            return function(matrix, *args)
        key = (matrix._version, args)
        last = found.get(matrix)
        if last is None or last[0] != key:
            found[matrix] = last = (key, function(matrix, *args))
        return last[1]

    return remembered
