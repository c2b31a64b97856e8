# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Calibration text: a dataset id, a file, a `Dataset` or token ids become blocks of equal length, never padded."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..configuration import SSMPrunerConfig
from ..errors import CalibrationError, ConfigurationError


logger = logging.get_logger(__name__)

# Short names of the corpora that pruning papers calibrate on; revisions are the Hub's default branch.
ALIASES: dict[str, dict[str, Any]] = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "wikitext103": {"path": "Salesforce/wikitext", "name": "wikitext-103-raw-v1"},
    "c4": {
        "path": "allenai/c4",
        "data_files": {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        "streaming": True,
    },
}  # fmt: skip
FILE_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
MOST_CHARACTERS = 50_000_000  # enough for 128 x 2,048 tokens forty times over; keeps a huge corpus out of memory


def calibration_blocks(config: SSMPrunerConfig, tokenizer: Any, vocab_size: int) -> Tensor:
    """The calibration set that a config describes.

    Text is tokenised as one string without special tokens; `num_samples` windows of `seq_len` tokens start at positions
    drawn by `random.Random(seed)`. Token ids that already come as equal blocks of `seq_len` are taken as they are.

    Args:
        config (`SSMPrunerConfig`): `dataset` and its companions, `num_samples`, `seq_len`, `seed`.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed unless `dataset` holds token ids.
        vocab_size (`int`): ids must be below it.

    Returns:
        `Tensor`: int64, (samples, seq_len), in main memory.

    Raises:
        CalibrationError: the text is empty or shorter than one block, or an id lies beyond the vocabulary.
        ConfigurationError: the dataset cannot be found or read, or a tokenizer is missing.
    """
    dataset = list(config.dataset) if hasattr(config.dataset, "__next__") else config.dataset
    _check_names(dataset, {"dataset_name": config.dataset_name, "dataset_split": config.dataset_split})
    if _holds_ids(dataset):
        rows = [_ids(row) for row in dataset]
        if rows and all(len(row) == config.seq_len for row in rows):
            if len(rows) < config.num_samples:
                logger.warning(f"the dataset holds {len(rows)} blocks, fewer than num_samples={config.num_samples}")
            return _checked(torch.stack(rows[: config.num_samples]), vocab_size)
        stream = torch.cat(rows) if rows else torch.empty(0, dtype=torch.long)
    else:
        text = load_text(dataset, config.dataset_name, config.dataset_split or "train", config.text_column)
        stream = tokenize(text, tokenizer)
    return _checked(_windows(stream, config.num_samples, config.seq_len, config.seed), vocab_size)


def load_text(dataset: Any, name: str | None = None, split: str = "train", column: str = "text") -> str:
    """All text of a dataset as one string; rows of a Hub dataset are joined by blank lines, a `.txt` file is whole.

    Args:
        dataset: short name (`wikitext2`, `wikitext103`, `c4`), Hub id, path of a file, `Dataset`, or strings.
        name, split, column (`str`): configuration, split and text column, where they apply.

    Raises:
        ConfigurationError: the dataset, its split or its column does not exist, or cannot be read.
        CalibrationError: there is no text in it.
    """
    _check_names(dataset, {"dataset_name": name})
    if isinstance(dataset, (str, os.PathLike)) and Path(dataset).suffix.lower() == ".txt":
        try:
            text = Path(dataset).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"dataset {str(dataset)!r} cannot be read: {error}") from error
    else:
        rows = _load_rows(dataset, name, split) if isinstance(dataset, (str, os.PathLike)) else dataset
        text = "\n\n".join(_take(_column(rows, column, dataset)))
    if not text.strip():
        raise CalibrationError(f"dataset {_describe(dataset)} holds no text")
    return text


# The last text that was tokenised: the passes of a recipe mostly read the same one, and ten megabytes take seconds.
_last: list[Any] = []


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids of one string, without special tokens: int64, (tokens).

    Raises:
        ConfigurationError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigurationError("text needs a tokenizer: pass tokenizer=…, or give token ids instead of text")
    if _last and _last[0]() is tokenizer and _last[1] == text:
        return _last[2]
    # verbose=False: the warning about sequences longer than the model's limit means nothing here, windows follow
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    with suppress(TypeError):  # a tokenizer that cannot be referenced weakly
        _last[:] = weakref.ref(tokenizer), text, ids
    return ids


def _windows(stream: Tensor, count: int, length: int, seed: int) -> Tensor:
    if len(stream) < length + 1:
        raise CalibrationError(
            f"the calibration text has {len(stream)} tokens, but one block needs seq_len + 1 = {length + 1}; "
            "give more text or a smaller seq_len"
        )
    if len(stream) < count * length:
        logger.warning(
            f"the calibration text has {len(stream)} tokens, fewer than {count} x {length}: blocks will overlap"
        )
    draw = random.Random(seed)
    starts = [draw.randint(0, len(stream) - length - 1) for _ in range(count)]
    return torch.stack([stream[start : start + length] for start in starts])


def _checked(blocks: Tensor, vocab_size: int) -> Tensor:
    low, high = int(blocks.min()), int(blocks.max())
    if low < 0 or high >= vocab_size:
        raise CalibrationError(
            f"token id {low if low < 0 else high} lies outside the model's vocabulary of {vocab_size}; "
            "the tokenizer belongs to another model"
        )
    return blocks


def _check_names(dataset: Any, given: dict[str, str | None]) -> None:
    """Refuse names of parts of a Hub dataset beside anything else, where they would mean nothing."""
    is_name = isinstance(dataset, (str, os.PathLike))
    if is_name and Path(dataset).suffix.lower() not in FILE_BUILDERS:
        return
    for field, value in given.items():
        if value is not None:
            what = f"{os.fspath(dataset)!r} is a file" if is_name else f"this one is a {type(dataset).__name__}"
            raise ConfigurationError(
                f"{field}={value!r} names a part of a dataset on the Hub, but {what}; leave it out"
            )


def _holds_ids(dataset: Any) -> bool:
    if isinstance(dataset, (list, tuple)):
        first = dataset[0] if dataset else ""
        return isinstance(first, (int, float, list, tuple)) or hasattr(first, "__array__")
    return isinstance(dataset, Tensor) or type(dataset).__module__ == "numpy"


def _ids(row: Any) -> Tensor:
    ids = torch.as_tensor(row).reshape(-1)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigurationError(f"token ids must be integers, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.long()


def _load_rows(dataset: str | os.PathLike, name: str | None, split: str) -> Any:
    import datasets  # heavy, and absent on machines that calibrate on token ids

    path = Path(dataset)
    suffix = path.suffix.lower()
    options: dict[str, Any] = {"path": str(dataset), "name": name}
    if str(dataset) in ALIASES:
        options = {**ALIASES[str(dataset)], **({"name": name} if name else {})}
    elif suffix in FILE_BUILDERS:
        if not path.is_file():
            raise ConfigurationError(f"dataset {str(dataset)!r} is not a file")
        options, split = {"path": FILE_BUILDERS[suffix], "data_files": str(path)}, "train"
    try:
        return datasets.load_dataset(**options, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(
            f"dataset {str(dataset)!r} (split {split!r}) cannot be loaded: {reason}. Allowed: {', '.join(ALIASES)}, "
            f"a Hub id, a {'/'.join(FILE_BUILDERS)} file, a Dataset, or token ids"
        ) from error


def _column(rows: Any, column: str, dataset: Any) -> Iterable[str]:
    names = getattr(rows, "column_names", None)
    if names is not None:
        if column not in names:
            raise ConfigurationError(
                f"dataset {_describe(dataset)} has no column {column!r}; it has: {', '.join(names)}"
            )
        return (_text_of(row, column) for row in rows)
    if isinstance(rows, Iterable):
        return (_text_of(row, column) for row in rows)
    raise ConfigurationError(f"dataset of type {type(dataset).__name__} is neither text, a Dataset nor token ids")


def _text_of(row: Any, column: str) -> str:
    value = row[column] if isinstance(row, dict) and column in row else row
    if not isinstance(value, str):
        raise ConfigurationError(f"dataset row of type {type(value).__name__} is not text; expected str in {column!r}")
    return value


def _take(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        yield text
        characters += len(text)
        if characters > MOST_CHARACTERS:
            return


def _describe(dataset: Any) -> str:
    return repr(str(dataset)) if isinstance(dataset, (str, os.PathLike)) else f"<{type(dataset).__name__}>"
