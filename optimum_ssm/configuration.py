# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`SSMPrunerConfig`: what to prune, how much, where and on which text. Every contradiction is refused here."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import ConfigurationError
from .methods import METHODS
from .methods.structures import STRUCTURES
from .registry import unknown
from .sparsity.allocations import ALLOCATIONS
from .sparsity.pattern import Pattern


SCOPES = ("row", "tensor", "global")
A_LOG_FILLS = ("memoryless", "zero")
AXES = ("state", "head", "head_dim", "group", "channel", "dt_rank", "block")
COMPENSATIONS = ("bias", "least_squares")
NORM_RESCALES = ("mask", "energy", "none")
OFFLOADS = ("device", "cpu", "disk")
RECONSTRUCTION_KEYS = {"lr": (int, float), "batch_size": int}
LARGEST_MEMORYLESS = 88.0  # exp of more than this is infinite in float32


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
    batch_size: int = _option(8, "calibration blocks per forward pass, and per gradient where a method uses one")
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
        self._check_types()
        self._check_structure()
        self._check_ranges()
        self._check_names()
        self._check_sparsity()

    @property
    def structured(self) -> bool:
        """Whether units of an axis are removed, not single weights."""
        return self.pattern == "structured"

    def _check_types(self) -> None:
        expected = {
            "method": str, "pattern": str, "exclude": list, "a_log_fill": str, "memoryless_value": (int, float),
            "text_column": str, "num_samples": int, "seq_len": int, "batch_size": int, "seed": int,
            "sequential": bool, "uniform_sizes": bool, "norm_rescale": str, "reconstruction_kwargs": dict, "method_kwargs": dict, "allocation_kwargs": dict,
        }  # fmt: skip
        optional = {
            "sparsity": (int, float), "targets": list, "scope": str, "allocation": str, "dataset_name": str,
            "dataset_split": str, "reconstruction_epochs": int, "axis": str, "multiple_of": int, "compensation": str,
            "offload": str, "device": str, "max_memory": dict, "resume_from": str,
        }  # fmt: skip
        if isinstance(self.resume_from, os.PathLike):
            self.resume_from = os.fspath(self.resume_from)
        for name in ("targets", "exclude"):
            value = getattr(self, name)
            if isinstance(value, (str, tuple)):  # one name is as clear as a list of one
                setattr(self, name, [value] if isinstance(value, str) else list(value))
        for name, kinds in {**expected, **optional}.items():
            setattr(self, name, value := _plain(getattr(self, name)))
            missing = value is None and name in optional
            if not missing and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
                names = "number" if isinstance(kinds, tuple) else kinds.__name__
                raise ConfigurationError(f"{name}={value!r} must be a {names}, got {type(value).__name__}")
        for name in ("targets", "exclude"):
            for value in getattr(self, name) or []:
                if not isinstance(value, str):
                    raise ConfigurationError(f"{name} holds {value!r}; every entry must be a name, a glob or 're:…'")

    def _check_structure(self) -> None:
        """Decide between weights and units, and refuse what goes with the other one only."""
        only_structures = self.method in STRUCTURES.names() and self.method not in METHODS.names()
        if self.pattern == "unstructured" and (self.axis is not None or only_structures):
            self.pattern = "structured"
        if not self.structured:
            plain = {
                "axis": None,
                "multiple_of": None,
                "compensation": None,
                "norm_rescale": "mask",
                "uniform_sizes": True,
            }
            given = [name for name, value in plain.items() if getattr(self, name) != value]
            if given:
                raise ConfigurationError(f"{given[0]}={getattr(self, given[0])!r} goes with pattern='structured' only")
            return
        for name in ("targets", "scope"):
            if getattr(self, name) is not None:
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} contradicts pattern='structured', where axis says what goes"
                )
        if self.exclude:
            raise ConfigurationError(f"exclude={self.exclude!r} contradicts pattern='structured': units go whole")
        if self.uniform_sizes and self.allocation not in (None, "uniform"):
            raise ConfigurationError(
                f"allocation={self.allocation!r} gives blocks different sizes, which uniform_sizes=True forbids; set "
                "uniform_sizes=False (such a model loads after `import optimum_ssm`), or leave allocation out"
            )

    def _check_ranges(self) -> None:
        for name, least in {
            "multiple_of": 1,
            "num_samples": 1,
            "seq_len": 2,
            "batch_size": 1,
            "seed": 0,
            "reconstruction_epochs": 0,
        }.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be at least {least}")
        self._check_places()
        if not 0 < self.memoryless_value <= LARGEST_MEMORYLESS:
            raise ConfigurationError(
                f"memoryless_value={self.memoryless_value} must lie in (0, {LARGEST_MEMORYLESS:g}]: above it exp overflows"
            )
        if self.dataset_split is not None and re.search(r"(?<![a-z])test", self.dataset_split.lower()):
            raise ConfigurationError(
                f"dataset_split={self.dataset_split!r} is a test split; calibrate on 'train' or 'validation'"
            )

    def _check_places(self) -> None:
        """The device is one that torch knows; devices in `max_memory` are numbers, as accelerate wants them."""
        if self.device is not None:
            import torch

            try:
                known = torch.device(self.device).type
            except RuntimeError as error:
                raise ConfigurationError(
                    f"device={self.device!r} is no device: {str(error).splitlines()[0]}"
                ) from error
            if known == "meta":
                raise ConfigurationError("device='meta' computes nothing; give an accelerator such as 'cuda'")
        if self.max_memory is not None:
            self.max_memory = {
                int(name) if isinstance(name, str) and name.isdigit() else name: size
                for name, size in self.max_memory.items()
            }
            for name, size in self.max_memory.items():
                named = isinstance(name, int) or name in ("cpu", "disk", "mps")
                if not named or not isinstance(size, (int, str)):
                    raise ConfigurationError(
                        f"max_memory={self.max_memory!r} must give sizes such as '20GiB' or bytes by the number of an "
                        "accelerator, or by 'cpu'"
                    )

    def _check_names(self) -> None:
        methods = STRUCTURES if self.structured else METHODS
        known = sorted({*METHODS.names(), *STRUCTURES.names()})
        for value, allowed, name in (
            (self.method, methods.names() if self.structured else known, _kind(self.structured)),
            (self.allocation, ALLOCATIONS.names(), "allocation"),
            (self.scope, list(SCOPES), "scope"),
            (self.axis, list(AXES), "axis"),
            (self.compensation, list(COMPENSATIONS), "compensation"),
            (self.norm_rescale, list(NORM_RESCALES), "norm_rescale"),
            (self.a_log_fill, list(A_LOG_FILLS), "a_log_fill"),
            (self.offload, list(OFFLOADS), "offload"),
        ):
            if value is not None and value not in allowed:
                raise ConfigurationError(unknown(name, value, allowed))
        method = methods.build(self.method, self.method_kwargs, "method_kwargs")
        if self.structured and self.axis is not None and self.axis not in method.axes:
            raise ConfigurationError(
                f"method {self.method!r} does not score axis {self.axis!r}. Allowed: {', '.join(method.axes)}"
            )
        if self.allocation is not None:
            allocation = ALLOCATIONS.build(self.allocation, self.allocation_kwargs, "allocation_kwargs")
            wanted = "units" if self.structured else "weights"
            if wanted not in allocation.spreads:
                fit = [name for name, entry in ALLOCATIONS.items() if wanted in entry.spreads]
                raise ConfigurationError(
                    f"allocation={self.allocation!r} spreads {' and '.join(allocation.spreads)}, not {wanted}. "
                    f"Allowed: {', '.join(fit)}"
                )
        for key, value in self.reconstruction_kwargs.items():
            if key not in RECONSTRUCTION_KEYS:
                raise ConfigurationError(unknown("reconstruction_kwargs key", key, list(RECONSTRUCTION_KEYS)))
            if isinstance(value, bool) or not isinstance(value, RECONSTRUCTION_KEYS[key]):
                names = "number" if key == "lr" else "int"
                raise ConfigurationError(
                    f"reconstruction_kwargs {key}={value!r} must be a {names}, got {type(value).__name__}"
                )
        if self.scope == "global" and self.allocation not in (None, "global"):
            raise ConfigurationError(
                f"scope='global' compares all weights at once and so contradicts allocation={self.allocation!r}; "
                "leave one of them out"
            )

    def _check_sparsity(self) -> None:
        pattern = Pattern.parse(self.pattern)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ConfigurationError(f"sparsity={self.sparsity} must lie in [0, 1)")
        if not pattern.is_n_m:
            if self.sparsity is None:
                raise ConfigurationError("sparsity must be given, in [0, 1), unless pattern is N:M such as '2:4'")
            return
        if self.sparsity is not None and abs(self.sparsity - pattern.sparsity) > 1e-9:
            raise ConfigurationError(
                f"pattern={self.pattern!r} removes {pattern.sparsity:g} of the weights and contradicts "
                f"sparsity={self.sparsity}; leave sparsity out or give {pattern.sparsity:g}"
            )
        self.sparsity = pattern.sparsity
        for name in ("scope", "allocation"):
            if getattr(self, name) not in (None, "uniform", "row"):
                raise ConfigurationError(
                    f"{name}={getattr(self, name)!r} contradicts pattern={self.pattern!r}, which fixes the count in "
                    f"every group of {pattern.group}; leave {name} out"
                )

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


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python, by what is printed: float32 0.7 is meant as 0.7, not as 0.699999988."""
    if type(value).__module__ != "numpy" or getattr(value, "ndim", 1):
        return value
    return float(str(value)) if isinstance(value.item(), float) else value.item()


def _kind(structured: bool) -> str:
    return "structured method" if structured else "method"


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
