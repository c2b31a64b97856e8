# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where the Triton kernels are tested: on the GPU if there is one, otherwise in Triton's interpreter; and the C ones, where
they compile.

The interpreter is chosen by an environment variable that Triton reads when it is imported (`tests/__init__.py`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from optimum_ssm.ops.native_library import library_obstacle


@pytest.fixture
def compiled() -> None:
    """A test that asks for it is skipped where the C files do not compile."""
    if obstacle := library_obstacle():
        pytest.skip(obstacle)


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device that Triton kernels run on; a test that asks for it is skipped where Triton is not installed."""
    pytest.importorskip("triton", reason="needs the package triton (Linux only)")
    if torch.cuda.is_available():
        return "cuda"
    from triton.runtime import interpreter

    patch_tensor: Callable[..., None] = interpreter._patch_lang_tensor

    def patch_with_integers(tensor: type, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Until Triton 3.7 this is int(array), which NumPy 2.4 refuses for an array of one element in one dimension.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_integers)
    return "cpu"
