# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba's `dt_proj.weight @ time_step` without the copy that torch makes of the product.

torch computes it as (time_step^T weight^T)^T and then copies it, to make it contiguous over time. The copy takes several
times longer than the product, and the scans here read it either way.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class _Uncopied(TorchFunctionMode):
    """W [I, K] @ x [B, K, L], where x^T has its K side by side, gives [B, I, L] with I side by side."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.matmul and len(args) == 2 and not torch.is_grad_enabled():
            left, right = args
            if left.dim() == 2 and right.dim() == 3 and right.stride(1) == 1:
                return F.linear(right.mT, left).mT
        return func(*args, **(kwargs or {}))


@contextmanager
def uncopied_left_products(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it is open, the forwards of `modules` do without the copy; only theirs, because a mode costs every call."""
    open_modes: list[_Uncopied] = []

    def enter(*_: Any) -> None:
        open_modes.append(_Uncopied())
        open_modes[-1].__enter__()

    def leave(*_: Any) -> None:
        if open_modes:  # another hook may have raised before `enter`
            open_modes.pop().__exit__(None, None, None)

    handles = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        while open_modes:  # torch calls no hook where a forward is interrupted from the keyboard
            leave()
