# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""State of gradual pruning inside a Trainer checkpoint: one safetensors file, there whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError


STATE_FILE = "gradual_pruning.safetensors"


@dataclass(frozen=True)
class PruningState:
    """What a run needs to go on as if it had never stopped.

    Args:
        step (`int`): optimiser steps done.
        batches (`int`): gradients summed since the last update of the masks.
        settings (`dict`): method, targets and schedule, JSON-ready; a run with others does not go on from here.
        masks (`dict[str, Tensor]`): parameter name to bool mask, `True` = removed.
        sums (`dict[str, Tensor]`): parameter name to the sum of absolute gradients, float32.
    """

    step: int
    batches: int
    settings: dict[str, Any]
    masks: dict[str, Tensor]
    sums: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint's folder: beside its place first, then renamed.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = {f"mask.{name}": mask for name, mask in self.masks.items()}
        tensors |= {f"sum.{name}": value for name, value in self.sums.items()}
        header = {"step": self.step, "batches": self.batches, "settings": self.settings}
        beside = folder / f".{STATE_FILE}.new"
        try:
            save_file(
                {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
                beside,
                {"state": json.dumps(header), "format": "pt"},
            )
            os.replace(beside, folder / STATE_FILE)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {folder / STATE_FILE}: {' '.join(str(error).split())}") from error

    @classmethod
    def load(cls, folder: Path) -> PruningState:
        """The state that `save` wrote.

        Raises:
            CheckpointError: the file is not there or cannot be read.
        """
        path = folder / STATE_FILE
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            parts = {
                kind: {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}
                for kind in ("mask.", "sum.")
            }
            return cls(header["step"], header["batches"], header["settings"], parts["mask."], parts["sum."])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
