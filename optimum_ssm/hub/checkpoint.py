# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A pruned model on disk: stock safetensors, tokenizer, settings, report, card and picture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file, logging

from ..calibration.offload import is_offloaded
from ..configuration import SSMPrunerConfig
from ..errors import CheckpointError
from ..report import PruningReport
from ..version import __version__
from .directory import whole_directory
from .model_card import write_card
from .original_checkpoints import ORIGINAL_TOKENIZER, is_original_config, load_original
from .remote_code import save_remote_code


logger = logging.get_logger(__name__)

CONFIG_FILE = "ssm_pruner_config.json"
REPORT_FILE = "report.json"
PICTURE_FILE = "pruning.png"
FORMAT_VERSION = 1
# Arguments of from_pretrained that say where a file comes from.
LOCATION = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def load_model(
    source: str | os.PathLike, *, check: Callable[[str], Any] | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A causal language model from a Hub id or directory, in the transformers or the original state-spaces format.

    Args:
        source (`str` or `os.PathLike`): Hub id or directory.
        check (`Callable`, *optional*): gets the config's model type before any weight is read, and may raise.
        **kwargs: passed to `from_pretrained`: `device_map`, `dtype`, `revision`, `token`, `max_memory`, …

    Returns:
        `tuple`: the model in eval mode and the raw `config.json`.

    Raises:
        CheckpointError: the checkpoint is not found, cannot be read or lacks weights, or transformers does not know an
            argument or dtype; one line that says why.
        Whatever `check` raises.
    """
    dtype = kwargs.get("dtype")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        allowed = "float32, bfloat16, float16, float64, auto"
        raise CheckpointError(f"{source} cannot be loaded: dtype={dtype!r} does not exist. Allowed: {allowed}")
    location = {name: kwargs[name] for name in LOCATION if name in kwargs}
    if not Path(source).is_dir() and os.fspath(source).startswith((".", "/", "~")):
        raise CheckpointError(f"{source} is not a directory")
    raw = read_json(source, "config.json", location)
    if raw is None:
        raise CheckpointError(f"{source} has no config.json, as a directory or on the Hub")
    if check is not None and "model_type" in raw and not is_original_config(raw):
        check(raw["model_type"])
    try:
        if is_original_config(raw):
            return load_original(source, raw, **kwargs), raw
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, AssertionError, SafetensorError) as error:
        where = f"{source}{_broken_file(source)}" if isinstance(error, SafetensorError) else source
        raise CheckpointError(f"{where} cannot be loaded: {_one_line(error)}") from error
    if info["missing_keys"]:  # transformers draws them at random and only warns
        missing = _one_line(", ".join(sorted(info["missing_keys"])))
        raise CheckpointError(f"{source} lacks weights of {type(model).__name__}: {missing}")
    return model, raw


def load_tokenizer(source: str | os.PathLike, raw_config: dict[str, Any], **location: Any) -> Any:
    """The tokenizer beside a model (original checkpoints have none: EleutherAI/gpt-neox-20b), or `None` with a warning."""
    name = source
    if is_original_config(raw_config):
        name, location = ORIGINAL_TOKENIZER, {k: v for k, v in location.items() if k not in ("revision", "subfolder")}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **location)
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
        reason = "there are no tokenizer files"  # transformers makes one without a single word then
    except (OSError, ValueError, KeyError) as error:
        reason = _one_line(error)
    logger.warning(f"no tokenizer for {source}: {reason}. Pass tokenizer=… or calibrate on token ids")
    return None


def read_json(source: str | os.PathLike, name: str, location: dict[str, Any]) -> dict[str, Any] | None:
    """A JSON file of a Hub repository or directory; `None` if it has no such file.

    Raises:
        CheckpointError: the repository does not exist or cannot be reached, or the file is not a JSON object.
    """
    path = _find(source, name, location)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} of {source} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} of {source} is a JSON {type(values).__name__}, not an object")
    return values


def load_license(source: str | os.PathLike, **location: Any) -> str | None:
    """The licence identifier that a model's card names; `None` without a card or with one that cannot be read."""
    try:
        card = _find(source, "README.md", location)
        return ModelCard.load(card).data.license if card is not None else None
    except (CheckpointError, OSError, ValueError, yaml.YAMLError) as error:
        logger.info(f"no licence found for {source}: {_one_line(error)}")
        return None


def load_settings(source: str | os.PathLike, **location: Any) -> tuple[list[SSMPrunerConfig], PruningReport] | None:
    """Recipe and report of a pruned checkpoint, or `None` where the checkpoint is not one of ours.

    Raises:
        CheckpointError: the files are there but cannot be read.
    """
    settings = read_json(source, CONFIG_FILE, location)
    if settings is None:
        return None
    report = read_json(source, REPORT_FILE, location)
    if settings.get("format_version") != FORMAT_VERSION or report is None:
        raise CheckpointError(
            f"{source} was written in format {settings.get('format_version')!r} of {CONFIG_FILE}; "
            f"optimum_ssm {__version__} reads format {FORMAT_VERSION} with its {REPORT_FILE}"
        )
    try:
        recipe = [SSMPrunerConfig.from_record(entry) for entry in settings["passes"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} of {source} cannot be read: {error}") from error
    try:
        return recipe, PruningReport.from_json(json.dumps(report))
    except CheckpointError as error:
        raise CheckpointError(f"{REPORT_FILE} of {source}: {error}") from error


def save(
    directory: str | os.PathLike,
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: list[SSMPrunerConfig],
    report: PruningReport,
    *,
    license: str | None = None,
    overwrite: bool = False,
    remote_code: bool = False,
    **kwargs: Any,
) -> None:
    """Write everything that belongs to a pruned model, whole or not at all.

    Args:
        directory (`str` or `os.PathLike`): where to; must be empty or new unless `overwrite`.
        model, tokenizer, recipe, report: what to save; the tokenizer may be `None`.
        license (`str`, *optional*): the base model's, for the card.
        overwrite (`bool`): replace a directory that holds something.
        remote_code (`bool`): put the modelling code beside a model that no stock class can load.
        **kwargs: passed to the model's `save_pretrained`, such as `max_shard_size`.

    Raises:
        CheckpointError: the directory is not empty, cannot be written, or is where an offloaded model reads its weights.
    """
    source = Path(model.config.name_or_path or "")
    if is_offloaded(model) and source.is_dir() and source.resolve() == Path(directory).resolve():
        raise CheckpointError(
            f"{directory} holds weights that the offloaded model still reads; save it into another directory"
        )
    code = remote_code and report.loads_with != "transformers"
    settings = {
        "format_version": FORMAT_VERSION,
        "optimum_ssm_version": __version__,
        "passes": [config.to_dict() for config in recipe],
    }
    with whole_directory(directory, overwrite) as new:
        model.save_pretrained(new, **kwargs)
        if code:
            save_remote_code(model, new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        (new / CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        (new / REPORT_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
        report.plot(new / PICTURE_FILE)
        write_card(new / "README.md", model, recipe, report, license, PICTURE_FILE, code=code)


def is_weight_file(name: str) -> bool:
    """Whether transformers would look for weights in a file of this name at the top of a repository."""
    return re.fullmatch(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?", name) is not None


def _find(source: str | os.PathLike, name: str, location: dict[str, Any]) -> Path | None:
    """A file of a Hub repository or directory; raises CheckpointError when the repository cannot be reached."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **location)
    except (OSError, HfHubHTTPError) as error:
        raise CheckpointError(f"{source} cannot be reached: {_one_line(error)}") from error
    return Path(path) if path is not None else None


def _broken_file(directory: str | os.PathLike) -> str:
    """The first shard of a directory whose header cannot be read, as the end of a path; the error itself names none."""
    for path in sorted(Path(directory).glob("*.safetensors")):
        try:
            safe_open(path, framework="pt").__exit__(None, None, None)
        except (OSError, SafetensorError):
            return f"/{path.name}"
    return ""


def _one_line(error: BaseException | str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]}…"
