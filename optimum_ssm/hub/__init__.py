# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Disk and network: checkpoints, model cards, and the original state-spaces format in both directions."""

from importlib import import_module
from typing import Any


_EXPORTS = {"load_original": "original_checkpoints", "export_original": "original_export"}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
