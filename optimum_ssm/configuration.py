# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`SSMPrunerConfig`: what to prune, how much, where and on which text. What contradicts itself is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .configuration_rules import A_LOG_FILLS, AXES, COMPENSATIONS, NORM_RESCALES, OFFLOADS, SCOPES, check
from .errors import ConfigurationError
from .registry import unknown


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help, **kwargs})
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class SSMPrunerConfig:
    """Everything that one pruning pass needs to know. Its fields are also the CLI's flags and the keys of a YAML recipe.

    Raises:
        ConfigurationError: a field is unknown, has the wrong type, lies out of range or contradicts another one. The
            message names the field, the value and what is allowed.

    Example:
        ```python
        SSMPrunerConfig(method="sparsessm", sparsity=0.5, targets=["A_log"], dataset="wikitext2")
        SSMPrunerConfig(method="sparsegpt", pattern="2:4", dataset="my_text.txt", num_samples=64)
        ```
    """

    method: str = _option("sparsessm", "what scores the weights")
    sparsity: float | None = _option(
        None, "share of the selected weights that is gone afterwards, in [0, 1); left out with N:M"
    )
    pattern: str = _option(
        "unstructured", "'unstructured', 'N:M' such as '2:4' (N kept of M consecutive inputs), or 'structured'"
    )
    axis: str | None = _option(
        None, "structured: which units are removed whole; default: the method's own", choices=AXES
    )
    targets: list[str] | None = _option(None, "weights to prune: names, globs or 're:…'; default: the method's own")
    exclude: list[str] = _option([], "weights to leave alone, named like targets")
    scope: str | None = _option(None, "comparison group of the scores; default: the method's own", choices=SCOPES)
    allocation: str | None = _option(
        None, "how the budget is spread over weights and blocks; default: the method's own"
    )
    a_log_fill: str = _option(
        "memoryless",
        "what a pruned A_log entry means: 'memoryless' (its decay becomes 0) or 'zero' (A_log = 0: decay exp(-dt))",
        choices=A_LOG_FILLS,
    )
    memoryless_value: float = _option(38.0, "A_log value that stands for memoryless, in (0, 88]")
    uniform_sizes: bool = _option(
        True, "structured: the same size in every block, as servers and most stock classes need it"
    )
    multiple_of: int | None = _option(
        None, "structured: kept units, in each group, are a multiple of this; default: the family's, for its kernels"
    )
    compensation: str | None = _option(
        None,
        "structured: what makes up for the removed units on the calibration text: 'bias' (the mean of the output) or "
        "'least_squares' (the output projection is fitted anew)",
        choices=COMPENSATIONS,
    )
    norm_rescale: str = _option(
        "mask",
        "structured, Mamba-2 heads: what the gated norm's weight is multiplied with: 'mask' (as if the removed channels "
        "were zero), 'energy' (the mean root mean square stays) or 'none'",
        choices=NORM_RESCALES,
    )
    dataset: Any = _option(
        "wikitext2", "calibration text: 'wikitext2', 'c4', a Hub id, or a .txt/.jsonl/.json/.csv/.parquet file"
    )
    dataset_name: str | None = _option(None, "configuration name of a Hub dataset")
    dataset_split: str | None = _option(None, "split of the dataset; default 'train'. A test split is refused")
    text_column: str = _option("text", "column that holds the text")
    num_samples: int = _option(128, "number of calibration blocks")
    seq_len: int = _option(2048, "tokens in a calibration block")
    batch_size: int = _option(
        8, "calibration blocks per forward pass (on a CPU at most so many), and per gradient where a method uses one"
    )
    seed: int = _option(0, "seed of the calibration blocks and of methods that draw")
    sequential: bool = _option(True, "let the outputs of a pruned block feed the next one")
    reconstruction_epochs: int | None = _option(
        None,
        "passes over the text that tune a block's kept weights after pruning it; default: the method's own, mostly 0",
    )
    reconstruction_kwargs: dict = _option(
        {}, "parameters of the block reconstruction, lr and batch_size, as key=value"
    )
    offload: str | None = _option(
        None,
        "where the calibration activations of all samples are kept: 'device' (where blocks are computed), 'cpu' (main "
        "memory) or 'disk' (a temporary directory); default: the first of them where they take at most half of what is free",
        choices=OFFLOADS,
    )
    device: str | None = _option(
        None,
        "accelerator to which the blocks of a model in main memory are brought one by one, such as 'cuda'; default: they "
        "are pruned where they are",
    )
    max_memory: dict | None = _option(
        None, "memory that from_pretrained may fill, as device=size: 0=20GiB cpu=60GiB; implies device_map='auto'"
    )
    resume_from: str | None = _option(
        None,
        "directory for the finished blocks of an interrupted run; where it holds some of this run, it goes on from there",
    )
    method_kwargs: dict = _option({}, "the method's own parameters, as key=value")
    allocation_kwargs: dict = _option({}, "the allocation's own parameters, as key=value")

    def __post_init__(self) -> None:
        check(self)

    @property
    def structured(self) -> bool:
        """Whether units of an axis are removed, not single weights."""
        return self.pattern == "structured"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values, fit to be published.

        A dataset that is an object is replaced by a description of it, the path of a local file by the file's name, and
        `resume_from`, a place on one machine, is left empty.
        """
        fields = (field.name for field in dataclasses.fields(self) if field.name != "dataset")
        values = {name: copy.deepcopy(getattr(self, name)) for name in fields}
        known = isinstance(self.dataset, (str, os.PathLike))
        values["resume_from"] = None
        values["dataset"] = str(self.dataset) if known else f"<{type(self.dataset).__name__} in memory>"
        if known and os.path.exists(self.dataset):
            values["dataset"] = os.path.basename(self.dataset)
        return values

    @classmethod
    def from_record(cls, values: dict[str, Any]) -> SSMPrunerConfig:
        """A config of a pass that is history, taken as it was written.

        Nothing is checked: its method may have been registered by code that is not here, or refuse a value by now.
        """
        record = cls.__new__(cls)
        for entry in dataclasses.fields(cls):
            default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
            setattr(record, entry.name, values.get(entry.name, default))
        return record

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SSMPrunerConfig:
        """A config from a mapping, such as one entry of a YAML recipe.

        Raises:
            ConfigurationError: a key is unknown, or a value is refused.
        """
        allowed = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in allowed:
                raise ConfigurationError(unknown("config key", key, allowed))
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | os.PathLike, **overrides: Any) -> list[SSMPrunerConfig]:
        """A recipe from a YAML or JSON file: one mapping, a list of mappings, or a mapping with the key `passes`.

        Args:
            path (`str` or `os.PathLike`): the file, or the name of a recipe that comes with the library.
            **overrides: budget and text for every pass, as in `load_recipe`.

        Raises:
            ConfigurationError: the file cannot be read or parsed, is empty, or a pass in it is refused (its number is
                named).
        """
        import yaml

        from .recipes import overridden, recipe_path

        path = recipe_path(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
            loaded = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigurationError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
        if isinstance(loaded, dict) and "passes" in loaded:
            for key in loaded.keys() - {"passes"}:
                raise ConfigurationError(f"recipe {path} holds {key!r} beside 'passes'; move it into each pass")
        passes = loaded.get("passes", [loaded]) if isinstance(loaded, dict) else loaded
        if not isinstance(passes, list) or not passes or not all(isinstance(entry, dict) for entry in passes):
            raise ConfigurationError(f"recipe {path} must hold one mapping or a non-empty list of mappings")
        configs = []
        for number, entry in enumerate(passes, start=1):
            try:
                configs.append(cls.from_dict(overridden(entry, overrides)))
            except ConfigurationError as error:
                raise ConfigurationError(f"recipe {path}, pass {number}: {error}") from error
        return configs


def parse_recipe(value: Any) -> list[SSMPrunerConfig]:
    """A list of configs from a config, a mapping, the name or path of a recipe, or a list of the first two.

    Raises:
        ConfigurationError: `value` is none of these, or an entry is refused.
    """
    if isinstance(value, (str, os.PathLike)):
        return SSMPrunerConfig.from_file(value)
    entries = value if isinstance(value, (list, tuple)) else [value]
    configs = []
    for entry in entries:
        if isinstance(entry, dict):
            entry = SSMPrunerConfig.from_dict(entry)
        if not isinstance(entry, SSMPrunerConfig):
            raise ConfigurationError(
                f"a recipe is made of SSMPrunerConfig objects or mappings, got {type(entry).__name__}"
            )
        configs.append(entry)
    if not configs:
        raise ConfigurationError("a recipe needs at least one pass, got an empty list")
    return configs
