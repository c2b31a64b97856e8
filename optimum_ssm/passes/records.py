# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What became of a block as JSON and tensors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..families.matching import Target
from ..surgery.merge import Merged
from .outcome import BlockOutcome, MergeOutcome, Outcome, UnitOutcome


CLASSES = {kind.__name__: kind for kind in (BlockOutcome, Outcome, UnitOutcome, MergeOutcome, Merged)}


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON-ready values; its tensors go into `tensors`, masks eight entries to a byte.

    Targets are packed by their labels. Classes are those that an outcome is made of.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        name = f"outcome {len(tensors)}"
        if value.dtype != torch.bool:
            tensors[name] = value.detach().cpu().clone()  # safetensors takes no two tensors that share memory
            return {"tensor": name}
        tensors[name] = torch.from_numpy(np.packbits(value.detach().cpu().reshape(-1).numpy()))
        return {"mask": name, "shape": list(value.shape)}
    if isinstance(value, Target):
        return {"target": value.label}
    if isinstance(value, Mapping):
        return {"dict": [[pack(key, tensors), pack(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [pack(entry, tensors) for entry in value]}
    if CLASSES.get(type(value).__name__) is not type(value):
        raise CheckpointError(f"resume_from cannot keep a {type(value).__name__}; leave it out for this pass")
    fields = {field.name: pack(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
    return {"class": type(value).__name__, "fields": fields}


def unpack(packed: Any, tensors: Mapping[str, Tensor], targets: Mapping[str, Target]) -> Any:
    """What `pack` was given.

    Args:
        packed (`Any`), tensors (`Mapping[str, Tensor]`): what `pack` made.
        targets (`Mapping[str, Target]`): by label.
    """
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "mask" in packed:
        shape = torch.Size(packed["shape"])
        bits = np.unpackbits(tensors[packed["mask"]].numpy(), count=shape.numel())
        return torch.from_numpy(bits.astype(bool)).reshape(shape)
    if "target" in packed:
        return targets[packed["target"]]
    if "dict" in packed:
        return {unpack(k, tensors, targets): unpack(v, tensors, targets) for k, v in packed["dict"]}
    for kind in (list, tuple):
        if kind.__name__ in packed:
            return kind(unpack(entry, tensors, targets) for entry in packed[kind.__name__])
    fields = {name: unpack(value, tensors, targets) for name, value in packed["fields"].items()}
    return CLASSES[packed["class"]](**fields)
