# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The way back: transformers' Mamba and Mamba-2 as a checkpoint that mamba_ssm reads."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Mamba2Config, MambaConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..errors import CheckpointError
from .directory import check_free, whole_directory
from .original_checkpoints import CLASSES, EMBEDDING, HEAD, check_tensors, convert_config


def export_original(model: PreTrainedModel, directory: str | os.PathLike, *, safe_serialization: bool = False) -> Path:
    """Write MambaForCausalLM or Mamba2ForCausalLM as mamba_ssm's MambaLMHeadModel.from_pretrained reads it.

    The default is pytorch_model.bin because mamba_ssm reads nothing else; `safe_serialization` writes safetensors.
    The directory must be absent or empty; it is written beside and renamed, so it is whole or it is not there.

    Raises:
        CheckpointError: the state-spaces layout cannot express the model, or the directory holds files.
    """
    directory = Path(directory)
    check_free(directory, overwrite=None)
    if not isinstance(model, tuple(CLASSES.values())):
        raise CheckpointError(f"cannot export {type(model).__name__}; supported: MambaForCausalLM, Mamba2ForCausalLM")
    state = model.state_dict()
    if absent := [name for name, tensor in state.items() if tensor.device.type == "meta"]:
        raise CheckpointError(f"{absent[0]} is offloaded: load the model without offload to export it")
    config = _original_config(model.config)
    tensors = {name.replace(".embeddings.", ".embedding."): _whole(tensor) for name, tensor in state.items()}
    check_tensors(tensors, convert_config(config), f"this {type(model).__name__}")
    if tied := model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDING]  # mamba_ssm's strict loading wants both names; safetensors refuses both
    with whole_directory(directory) as staging:
        (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if safe_serialization:
            own = {name: tensors[name] for name in tensors if not (tied and name == HEAD)}
            save_file(own, staging / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        else:
            torch.save(tensors, staging / WEIGHTS_NAME)
    return directory


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU and owner of its storage: torch.save writes a view's whole storage, pruned rows included."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _original_config(config: MambaConfig | Mamba2Config) -> dict[str, Any]:
    """The config.json of a model, with no key that an old mamba_ssm would not know: it refuses those."""
    inner = getattr(config, "intermediate_size", config.expand * config.hidden_size)
    for field, only in (("hidden_act", "silu"), ("layer_norm_epsilon", 1e-5)):
        if getattr(config, field) != only:
            raise CheckpointError(f"{field} = {getattr(config, field)!r} cannot be exported; supported: {only!r}")
    if inner % config.hidden_size:
        raise CheckpointError(f"intermediate_size = {inner} cannot be exported; supported: multiples of hidden_size")
    ssm = {"d_state": config.state_size, "d_conv": config.conv_kernel, "expand": inner // config.hidden_size}
    ssm |= {"bias": config.use_bias, "conv_bias": config.use_conv_bias}
    if config.model_type == "mamba":
        ssm |= {"dt_rank": config.time_step_rank}
    else:
        ssm |= {"layer": "Mamba2", "headdim": config.head_dim, "ngroups": config.n_groups}
        ssm |= {"chunk_size": config.chunk_size}
        if tuple(config.time_step_limit) != (0.0, float("inf")):  # the default, which JSON proper cannot write
            ssm |= {"dt_limit": list(config.time_step_limit)}
    original = {"d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "vocab_size": config.vocab_size}
    original |= {"ssm_cfg": ssm, "rms_norm": True, "residual_in_fp32": config.residual_in_fp32, "fused_add_norm": True}
    untied = {} if config.tie_word_embeddings else {"tie_embeddings": False}
    return original | {"pad_vocab_size_multiple": 1} | untied
