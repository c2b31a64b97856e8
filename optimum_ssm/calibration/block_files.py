# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Files of pruned blocks that main memory has no room for, from which accelerate's hooks read."""

from __future__ import annotations

import weakref
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from ..errors import CalibrationError
from .scratch import Scratch


_folders: weakref.WeakKeyDictionary[nn.Module, Scratch] = weakref.WeakKeyDictionary()
_numbers = count()  # of the files in them


def write_block(model: nn.Module, name: str, block: nn.Module, device: torch.device) -> OffloadedWeightsLoader:
    """The block's parameters in a file that lives as long as hooks read it, those of a copy of the model among them.

    Raises:
        CalibrationError: the disk does not take it.
    """
    if model not in _folders:
        _folders[model] = Scratch("weights")
    # the name alone would come again: a dropped block gives it to a later one, which is still read from a file of its own
    path = _folders[model].path / f"{name}-{next(_numbers)}.safetensors"
    state = {key: parameter.detach().cpu().contiguous() for key, parameter in block.named_parameters()}
    try:
        save_file(state, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # a part of it would take the room that is missing
            path.unlink(missing_ok=True)
        size = sum(value.nbytes for value in state.values())
        raise CalibrationError(
            f"{name}: main memory is short of {size:,} bytes for the pruned block, and {path.parent.parent}, where temporary "
            f"files go, does not take them: {error}. Set TMPDIR to a larger disk that can be written to"
        ) from error
    index = {
        key: {"safetensors_file": str(path), "weight_name": key, "dtype": str(value.dtype).removeprefix("torch.")}
        for key, value in state.items()
    }
    # as a word: not every safetensors takes a torch.device
    weights = OffloadedWeightsLoader(index=index, device=None if device.type == "cpu" else str(device))
    weights.file = _File(path, _folders[model])
    return weights


class _File:
    """A file that goes with the last object that holds it, and with it a directory that nothing else needs."""

    def __init__(self, path: Path, folder: Scratch):
        self._folder = folder
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> _File:
        return self  # what is copied with it reads the same file
