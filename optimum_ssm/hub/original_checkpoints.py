# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layout of mamba_ssm (`state-spaces/*` on the Hub): recognised and loaded.

AutoModel refuses their config.json (`d_model`, `n_layer`, no `model_type`), and a transformers class that is handed
the directory ignores its keys and builds the default size, 29 GB for Mamba-2. So the config is mapped first and
compared with the shapes in the file before a model is built. Source: github.com/state-spaces/mamba, mamba_ssm/.
"""

import os
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig, Mamba2Config, MambaConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.logging import get_logger

from ..errors import CheckpointError, ConfigurationError


logger = get_logger(__name__)

# The original repositories hold no tokenizer; these models were trained with this one (50,277 tokens).
ORIGINAL_TOKENIZER = "EleutherAI/gpt-neox-20b"

CLASSES = {"mamba": transformers.MambaForCausalLM, "mamba2": transformers.Mamba2ForCausalLM}
EMBEDDING, HEAD, _FIRST_MIXER = "backbone.embedding.weight", "lm_head.weight", "backbone.layers.0.mixer."

# The keys of config.json that may occur: those that are read, those that choose an implementation or an initialisation
# and so change no trained model, and, with the values allowed, those of which transformers has only one variant. Any
# other key could change the model and is refused.
_TOP = "d_model n_layer vocab_size pad_vocab_size_multiple tie_embeddings residual_in_fp32 ssm_cfg"
_TOP += " fused_add_norm attn_cfg _name_or_path architectures dtype torch_dtype transformers_version"
_TOP_FIXED = {"attn_layer_idx": ([], None), "d_intermediate": (0,), "rms_norm": (True,)}
_SSM = "layer d_state d_conv expand bias conv_bias dt_min dt_max dt_init_floor"
_SSM1 = f"{_SSM} dt_rank dt_init dt_scale use_fast_path"
_SSM2 = f"{_SSM} headdim ngroups chunk_size dt_limit d_ssm conv_init A_init_range use_mem_eff_path sequence_parallel"
_SSM2_FIXED = {"D_has_hdim": (False,), "rmsnorm": (True,), "norm_before_gate": (False,), "process_group": (None,)}
_TOP_KEYS: dict[str, tuple[Any, ...]] = dict.fromkeys(_TOP.split(), ()) | _TOP_FIXED
_SSM_KEYS = {"Mamba1": dict.fromkeys(_SSM1.split(), ()), "Mamba2": dict.fromkeys(_SSM2.split(), ()) | _SSM2_FIXED}

# Arguments of from_pretrained that would load something else than what was checked, or run code from a pickle.
_RESERVED = "config key_mapping state_dict output_loading_info ignore_mismatched_sizes weights_only subfolder variant"


def is_original_config(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is mamba_ssm's: it has `d_model` and `n_layer` and no `model_type`."""
    return "d_model" in config and "n_layer" in config and "model_type" not in config


def convert_config(config: dict[str, Any]) -> MambaConfig | Mamba2Config:
    """Map a parsed config.json of mamba_ssm to the transformers config of the same model.

    Keys that are absent get mamba_ssm's defaults; the vocabulary is rounded up to `pad_vocab_size_multiple`.

    Raises:
        CheckpointError: a key is unknown, or its value is malformed or has no counterpart in transformers.
    """
    if not is_original_config(config):
        raise CheckpointError("not a state-spaces config.json: that has d_model and n_layer, and no model_type")
    _check_keys(config, _TOP_KEYS)
    ssm = config.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise _refusal("ssm_cfg", ssm, "an object")
    layer = ssm.get("layer", "Mamba1")
    if str(layer) not in _SSM_KEYS:
        raise _refusal("layer", layer, ", ".join(_SSM_KEYS))
    _check_keys(ssm, _SSM_KEYS[layer])
    pad = _typed(config, "pad_vocab_size_multiple", 8)
    fields: dict[str, Any] = {
        "hidden_size": _typed(config, "d_model"),
        "num_hidden_layers": _typed(config, "n_layer"),
        "vocab_size": -(-_typed(config, "vocab_size", 50277) // pad) * pad,
        "tie_word_embeddings": _typed(config, "tie_embeddings", True),
        "residual_in_fp32": _typed(config, "residual_in_fp32", True),
        "state_size": _typed(ssm, "d_state", 128 if layer == "Mamba2" else 16),
        "conv_kernel": _typed(ssm, "d_conv", 4),
        "expand": _typed(ssm, "expand", 2),
        "use_bias": _typed(ssm, "bias", False),
        "use_conv_bias": _typed(ssm, "conv_bias", True),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    }
    if layer == "Mamba2":
        return Mamba2Config(**fields, **_mamba2_fields(ssm, fields["hidden_size"] * fields["expand"]))
    rank = ssm.get("dt_rank", "auto")
    return MambaConfig(**fields, time_step_rank=rank if rank == "auto" else _typed(ssm, "dt_rank"))


def _mamba2_fields(ssm: dict[str, Any], inner: int) -> dict[str, Any]:
    head_dim, groups = _typed(ssm, "headdim", 64), _typed(ssm, "ngroups", 1)
    heads, limit = inner // head_dim, ssm.get("dt_limit", (0.0, float("inf")))
    if heads * head_dim != inner:
        raise _refusal("headdim", head_dim, f"a divisor of d_model * expand = {inner}")
    if heads % groups:
        raise _refusal("ngroups", groups, f"a divisor of the number of heads = {heads}")
    if ssm.get("d_ssm") not in (None, inner):
        raise _refusal("d_ssm", ssm["d_ssm"], f"d_model * expand = {inner}")
    if not isinstance(limit, (list, tuple)) or [type(bound) in (int, float) for bound in limit] != [True, True]:
        raise _refusal("dt_limit", limit, "the smallest and the largest time step")
    sizes = {"head_dim": head_dim, "num_heads": heads, "n_groups": groups}
    return sizes | {"chunk_size": _typed(ssm, "chunk_size", 256), "time_step_limit": tuple(map(float, limit))}


def _refusal(key: str, value: Any, supported: str) -> CheckpointError:
    return CheckpointError(f"config.json: {key} = {value!r} cannot be loaded; supported: {supported}")


def _check_keys(section: dict[str, Any], keys: dict[str, tuple[Any, ...]]) -> None:
    for key, value in section.items():
        if key not in keys:
            raise _refusal(key, value, "the keys " + ", ".join(keys))
        if keys[key] and value not in keys[key]:
            raise _refusal(key, value, repr(keys[key][0]))


def _typed(section: dict[str, Any], key: str, default: int | bool | None = None) -> Any:
    """The value of a flag (the default is one) or of a size (a positive integer)."""
    value, flag = section.get(key, default), isinstance(default, bool)
    size = isinstance(value, (int, float)) and value >= 1 and value % 1 == 0
    if isinstance(value, bool) is not flag or not (flag or size):
        raise _refusal(key, value, "true, false" if flag else "a positive integer")
    return value if flag else int(value)


def load_original(
    path_or_id: str | os.PathLike,
    config: dict[str, Any],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load a state-spaces checkpoint, from a directory or the Hub, as MambaForCausalLM or Mamba2ForCausalLM.

    `config` is its parsed config.json; `device_map`, `dtype`, `use_safetensors`, ... go to from_pretrained. Without a
    dtype, or with "auto", the model gets that of the embedding. Pickles are read with `weights_only`, never executed.

    Raises:
        CheckpointError: the config or the weights cannot be read, disagree, or have no counterpart in transformers.
        ConfigurationError: an argument would bypass these checks.
    """
    if reserved := sorted({*_RESERVED.split()} & from_pretrained_kwargs.keys()):
        raise ConfigurationError(f"{reserved} cannot be set for original checkpoints; allowed: device_map, dtype, ...")
    mapped = convert_config(config)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    files = _weight_files(path_or_id, from_pretrained_kwargs.pop("use_safetensors", None), hub)
    tensors = {name: tensor for file in files for name, tensor in _read(file).items()}
    where = f"{path_or_id}/{files[0].name}" if len(files) == 1 else str(path_or_id)
    check_tensors(tensors, mapped, where)
    dtype = from_pretrained_kwargs.pop("dtype", None) or from_pretrained_kwargs.pop("torch_dtype", None) or "auto"
    if dtype == "auto":
        # transformers takes the dtype of whichever tensor comes first in the file, often that of an fp32 A_log
        dtype = tensors[EMBEDDING].dtype
        if others := sorted({str(tensor.dtype) for tensor in tensors.values()} - {str(dtype)}):
            logger.warning(f"{where}: tensors in {', '.join(others)} are cast to {dtype}; pass dtype= to keep them.")
    del tensors
    # The files that were checked are the ones to load: no second look at the Hub, no conversion started there. Without
    # a generation config from_pretrained would make one of mamba_ssm's config.json.
    from_pretrained_kwargs.setdefault("generation_config", GenerationConfig.from_model_config(mapped))
    model, info = CLASSES[mapped.model_type].from_pretrained(
        files[0].parent,
        config=mapped,
        key_mapping={r"^backbone\.embedding\.": "backbone.embeddings."},
        use_safetensors=files[0].suffix == ".safetensors",
        output_loading_info=True,
        dtype=dtype,
        **from_pretrained_kwargs,
    )
    if wrong := {kind: sorted(map(str, names)) for kind, names in info.items() if names}:
        raise CheckpointError(f"{where}: not every tensor found its place: {wrong}")
    if getattr(mapped, "n_groups", 1) > 1 and not hasattr(model.backbone.layers[0].mixer.norm, "group_size"):
        logger.warning("transformers < 5.23 normalises over all groups at once: logits differ from mamba_ssm's.")
    model._weight_conversions = None  # else save_pretrained undoes the renaming, and AutoModel cannot load the result
    model.name_or_path = model.config.name_or_path = str(path_or_id)
    return model


def _weight_files(path_or_id: str | os.PathLike, use_safetensors: bool | None, hub: dict[str, Any]) -> list[Path]:
    """The local files that hold the weights; the first kind of file found wins, as in from_pretrained."""
    kinds = {None: (SAFE_WEIGHTS_NAME, WEIGHTS_NAME), True: (SAFE_WEIGHTS_NAME,), False: (WEIGHTS_NAME,)}
    names = [name for kind in kinds[use_safetensors] for name in (kind, f"{kind}.index.json")]
    try:
        for name in names:
            found = cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **hub)
            if found is not None and name.endswith(".json"):
                return [Path(shard) for shard in get_checkpoint_shard_files(path_or_id, found, **hub)[0]]
            if found is not None:
                return [Path(found)]
    except (OSError, KeyError, ValueError) as error:  # transformers' word for failures of the Hub; a malformed index
        raise CheckpointError(f"{path_or_id}: {name} cannot be had ({_line(error)})") from error
    raise CheckpointError(f"{path_or_id} holds no weights; looked for {', '.join(names)}")


def _line(error: BaseException) -> str:
    # torch hides why it refused a pickle in the middle of a page of advice
    cause = re.search(r"WeightsUnpickler error: *([^\n]+)", str(error))
    return cause.group(1) if cause else f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _read(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped from disk where the format allows it; never runs what a pickle asks for."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # files of torch < 1.6 are no zip archives: they cannot be mapped and are read whole
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, UnpicklingError) or "weights only" in str(error).lower():
            why = f"{file.name} holds more than tensors and was not executed ({_line(error)})"
            raise CheckpointError(f"{why}; ask its author for a model.safetensors") from error
        raise CheckpointError(f"{file.name} cannot be read ({_line(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        found = tensors.values() if isinstance(tensors, dict) else [tensors]
        kinds = ", ".join(sorted({type(value).__name__ for value in found}))
        raise CheckpointError(f"{file.name} holds {kinds}; supported: one dict of names and tensors")
    return tensors


def check_tensors(tensors: dict[str, torch.Tensor], config: MambaConfig | Mamba2Config, where: str) -> None:
    """Compare tensors in the original layout with a mapped config; raises CheckpointError on the first offender."""
    with torch.device("meta"):
        skeleton = CLASSES[config.model_type](config).state_dict()
    wanted = {name.replace(".embeddings.", ".embedding."): list(tensor.shape) for name, tensor in skeleton.items()}
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if config.tie_word_embeddings and HEAD not in found:
        del wanted[HEAD]  # mamba_ssm writes it also when tied; files re-saved as safetensors lack it
    comparable = {name: len(shape) for name, shape in found.items()} == {name: len(wanted[name]) for name in wanted}
    for name in {**wanted, **found}:
        if (has := found.get(name, "absent")) != (asked := wanted.get(name, "absent")):
            sizes = [(key, size, _sizes(wanted)[key]) for key, size in _sizes(found).items()] if comparable else []
            hints = [f"; {key}: {one} by the tensors, {two} by config.json" for key, one, two in sizes if one != two]
            raise CheckpointError(f"tensor {name} is {has} in {where}, {asked} by config.json{''.join(hints)}")
    if config.tie_word_embeddings and HEAD in found and not torch.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise CheckpointError(f"{where}: tie_embeddings is True in config.json, but {HEAD} is not {EMBEDDING}")


def _sizes(shapes: dict[str, list[int]]) -> dict[str, int]:
    """Sizes in mamba_ssm's words as the tensors imply them; Mamba-2's G and N only show as their product."""
    inner, conv = shapes[_FIRST_MIXER + "out_proj.weight"][1], shapes[_FIRST_MIXER + "conv1d.weight"]
    (vocab, hidden), a_log = shapes[EMBEDDING], shapes[_FIRST_MIXER + "A_log"]
    sizes = {"padded vocab_size": vocab, "d_model": hidden, "d_model * expand": inner, "d_conv": conv[2]}
    if len(a_log) == 2:
        return sizes | {"d_state": a_log[1], "dt_rank": shapes[_FIRST_MIXER + "dt_proj.weight"][1]}
    return sizes | {"number of heads": a_log[0], "ngroups * d_state": (conv[0] - inner) // 2}
