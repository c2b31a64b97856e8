# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Modelling code beside the weights, for readers who have transformers but not optimum_ssm."""

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..errors import CheckpointError
from ..models import PREFIX, modelling


def save_remote_code(model: PreTrainedModel, directory: str | os.PathLike) -> Path:
    """Copy the modelling file of a model with sizes per block beside its saved weights, and name it in config.json.

    `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` then loads without optimum_ssm. Where
    optimum_ssm is imported, its own classes are used, and no trust is asked for.

    Args:
        model (`PreTrainedModel`): the model that was saved.
        directory (`str` or `os.PathLike`): where `model.save_pretrained` wrote it.

    Returns:
        `Path`: the copied file.

    Raises:
        CheckpointError: the model is a stock one, which needs no code, or the directory does not hold it.
    """
    config_file = Path(directory) / CONFIG_NAME
    model_type = model.config.model_type
    if not model_type.startswith(PREFIX):
        raise CheckpointError(f"{type(model).__name__} is a class of transformers: its checkpoints need no code")
    module = modelling(model_type)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file} cannot be read, save the model first: {error}") from error
    if not isinstance(config, dict) or config.get("model_type") != model_type:
        raise CheckpointError(f"{config_file} is not that of a model of type {model_type!r}")
    source = Path(module.__file__)
    config["auto_map"] = {auto: f"{source.stem}.{cls.__name__}" for auto, cls in module.CLASSES.items()}
    try:
        copied = Path(shutil.copyfile(source, Path(directory) / source.name))
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error}") from error
    return copied
