# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a finished piece of a run depends on, in few words, and what differs between two."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..calibration.offload import read_parameter, work_device
from ..configuration import SSMPrunerConfig
from ..digest import digest
from ..ops.backend import active_backend
from ..version import __version__


# Fields that say where something is, not what is computed. The text itself is compared by its token ids.
PLACES = ("resume_from", "offload", "device", "max_memory", "dataset", "dataset_name", "dataset_split", "text_column")
FORMAT = 3  # of the pieces themselves
NAMES = ("_name_or_path", "name_or_path", "transformers_version", "architectures")


def fingerprint(
    config: SSMPrunerConfig,
    number: int,
    model: nn.Module,
    digests: Mapping[str, str],
    ids: Tensor | None,
    removed: Mapping[str, Tensor],
    processes: int,
) -> dict[str, Any]:
    """Everything that the result of a pass depends on.

    Args:
        config (`SSMPrunerConfig`): the pass.
        number (`int`): which pass of the model's history it is, from 1.
        model (`PreTrainedModel`): as it is before the pass.
        digests (`Mapping[str, str]`): of its parameters, from `parameter_digests`.
        ids (`Tensor`, *optional*): the calibration blocks of all processes.
        removed (`Mapping[str, Tensor]`): masks of earlier passes.
        processes (`int`): how many share the calibration text.
    """
    shape = {k: v for k, v in model.config.to_dict().items() if k not in NAMES}
    masks = {name: digest(mask) for name, mask in removed.items()}
    found = {
        "the model's config": _of(shape),
        "the model's weights": _of(digests),
        "the masks of earlier passes": _of(masks),
    }
    return foreseen(config, number, model, ids, processes) | found


def foreseen(
    config: SSMPrunerConfig, number: int, model: nn.Module, ids: Tensor | None, processes: int
) -> dict[str, Any]:
    """What is known of a `fingerprint` while passes before are still to come. Arguments as there."""
    settings = {k: v for k, v in config.to_dict().items() if k not in PLACES}
    device = work_device(model) if config.device is None else torch.device(config.device)
    found = {
        "optimum_ssm": __version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "pass": number,
        "processes": processes,
        "device": device.type,
        "kernels (OPTIMUM_SSM_SCAN)": active_backend(device),
        "format": FORMAT,
        "the calibration text": "none" if ids is None else digest(ids),
        **{f"config.{name}": value for name, value in settings.items()},
    }
    return json.loads(json.dumps(found, default=str))  # as it comes back from a file


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words."""
    names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    return [
        f"{name} is another" if name.startswith("the ") else f"{name} was {there.get(name)!r}, is {here.get(name)!r}"
        for name in names
    ]


def parameter_digests(model: nn.Module) -> dict[str, str]:
    """`digest` of every parameter by qualified name, also of offloaded ones."""
    here = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_meta}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets go of the interpreter's lock
        found = dict(zip(here, pool.map(digest, here.values())))
    away = (name for name, parameter in model.named_parameters() if parameter.is_meta)
    return found | {name: digest(read_parameter(model, name)) for name in away}


def _of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
