# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The weight files of a checkpoint on disk."""

from __future__ import annotations

import os
from pathlib import Path

from transformers.utils import cached_file


# The order in which transformers looks for weights; index files are not weights.
PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")


def file_bytes(source: str | os.PathLike) -> int | None:
    """Bytes of the weight files that transformers loads from a directory or from the cache of a Hub repository.

    `None` where there are none under transformers' names, as in the cache of an id that was never loaded.
    """
    folder = Path(source)
    if not folder.is_dir():
        config = cached_file(source, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return None
        folder = Path(config).parent
    found = next((files for pattern in PATTERNS if (files := list(folder.glob(pattern)))), [])
    return sum(file.stat().st_size for file in found) or None
