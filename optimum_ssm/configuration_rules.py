# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What makes sense in a config: types, ranges, names, and fields that contradict each other. Every message names the field."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError
from .methods import METHODS
from .methods.structures import STRUCTURES
from .registry import unknown
from .sparsity.allocations import ALLOCATIONS
from .sparsity.pattern import Pattern


if TYPE_CHECKING:
    from .configuration import SSMPrunerConfig

SCOPES = ("row", "tensor", "global")
A_LOG_FILLS = ("memoryless", "zero")
AXES = ("state", "head", "head_dim", "group", "channel", "dt_rank", "block")
COMPENSATIONS = ("bias", "least_squares")
NORM_RESCALES = ("mask", "energy", "none")
OFFLOADS = ("device", "cpu", "disk")
RECONSTRUCTION_KEYS = {"lr": (int, float), "batch_size": int}
LARGEST_MEMORYLESS = 88.0  # exp of more than this is infinite in float32


def check(config: SSMPrunerConfig) -> None:
    """Refuse what contradicts itself, and fill in what follows from other fields: the pattern of an axis, the share of N:M.

    Raises:
        ConfigurationError: naming the field, the value and what is allowed.
    """
    check_types(config)
    check_structure(config)
    check_ranges(config)
    check_names(config)
    check_sparsity(config)


def check_types(config: SSMPrunerConfig) -> None:
    """Types of all fields; one name stands for a list of one."""
    expected = {
        "method": str, "pattern": str, "exclude": list, "a_log_fill": str, "memoryless_value": (int, float),
        "text_column": str, "num_samples": int, "seq_len": int, "batch_size": int, "seed": int,
        "sequential": bool, "uniform_sizes": bool, "norm_rescale": str, "reconstruction_kwargs": dict,
        "method_kwargs": dict, "allocation_kwargs": dict,
    }  # fmt: skip
    optional = {
        "sparsity": (int, float), "targets": list, "scope": str, "allocation": str, "dataset_name": str,
        "dataset_split": str, "reconstruction_epochs": int, "axis": str, "multiple_of": int, "compensation": str,
        "offload": str, "device": str, "max_memory": dict, "resume_from": str,
    }  # fmt: skip
    if isinstance(config.resume_from, os.PathLike):
        config.resume_from = os.fspath(config.resume_from)
    for name in ("targets", "exclude"):
        value = getattr(config, name)
        if isinstance(value, (str, tuple)):  # one name is as clear as a list of one
            setattr(config, name, [value] if isinstance(value, str) else list(value))
    for name, kinds in {**expected, **optional}.items():
        setattr(config, name, value := _plain(getattr(config, name)))
        missing = value is None and name in optional
        if not missing and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)):
            names = "number" if isinstance(kinds, tuple) else kinds.__name__
            raise ConfigurationError(f"{name}={value!r} must be a {names}, got {type(value).__name__}")
    for name in ("targets", "exclude"):
        for value in getattr(config, name) or []:
            if not isinstance(value, str):
                raise ConfigurationError(f"{name} holds {value!r}; every entry must be a name, a glob or 're:…'")


def check_structure(config: SSMPrunerConfig) -> None:
    """Decide between weights and units, and refuse what goes with the other one only."""
    only_structures = config.method in STRUCTURES.names() and config.method not in METHODS.names()
    if config.pattern == "unstructured" and (config.axis is not None or only_structures):
        config.pattern = "structured"
    if not config.structured:
        plain = {
            "axis": None,
            "multiple_of": None,
            "compensation": None,
            "norm_rescale": "mask",
            "uniform_sizes": True,
        }
        given = [name for name, value in plain.items() if getattr(config, name) != value]
        if given:
            raise ConfigurationError(f"{given[0]}={getattr(config, given[0])!r} goes with pattern='structured' only")
        return
    for name in ("targets", "scope"):
        if getattr(config, name) is not None:
            raise ConfigurationError(
                f"{name}={getattr(config, name)!r} contradicts pattern='structured', where axis says what goes"
            )
    if config.exclude:
        raise ConfigurationError(f"exclude={config.exclude!r} contradicts pattern='structured': units go whole")
    if config.uniform_sizes and config.allocation not in (None, "uniform"):
        raise ConfigurationError(
            f"allocation={config.allocation!r} gives blocks different sizes, which uniform_sizes=True forbids; set "
            "uniform_sizes=False (such a model loads after `import optimum_ssm`), or leave allocation out"
        )


def check_ranges(config: SSMPrunerConfig) -> None:
    """Numbers in range, and no test split."""
    for name, least in {
        "multiple_of": 1,
        "num_samples": 1,
        "seq_len": 2,
        "batch_size": 1,
        "seed": 0,
        "reconstruction_epochs": 0,
    }.items():
        if getattr(config, name) is not None and getattr(config, name) < least:
            raise ConfigurationError(f"{name}={getattr(config, name)} must be at least {least}")
    check_places(config)
    if not 0 < config.memoryless_value <= LARGEST_MEMORYLESS:
        raise ConfigurationError(
            f"memoryless_value={config.memoryless_value} must lie in (0, {LARGEST_MEMORYLESS:g}]: above it exp overflows"
        )
    if config.dataset_split is not None and re.search(r"(?<![a-z])test", config.dataset_split.lower()):
        raise ConfigurationError(
            f"dataset_split={config.dataset_split!r} is a test split; calibrate on 'train' or 'validation'"
        )


def check_places(config: SSMPrunerConfig) -> None:
    """The device is one that torch knows; devices in `max_memory` are numbers, as accelerate wants them; directories have
    names."""
    if config.resume_from == "":  # the present directory, as a variable that is not set would say unasked
        raise ConfigurationError(
            "resume_from='' names no directory; give one, '.' for the present one, or leave it out"
        )
    if config.device is not None:
        import torch

        try:
            known = torch.device(config.device).type
        except RuntimeError as error:
            raise ConfigurationError(f"device={config.device!r} is no device: {str(error).splitlines()[0]}") from error
        if known == "meta":
            raise ConfigurationError("device='meta' computes nothing; give an accelerator such as 'cuda'")
    if config.max_memory is not None:
        config.max_memory = {
            int(name) if isinstance(name, str) and name.isdigit() else name: size
            for name, size in config.max_memory.items()
        }
        for name, size in config.max_memory.items():
            named = isinstance(name, int) or name in ("cpu", "disk", "mps")
            if not named or not isinstance(size, (int, str)):
                raise ConfigurationError(
                    f"max_memory={config.max_memory!r} must give sizes such as '20GiB' or bytes by the number of an "
                    "accelerator, or by 'cpu'"
                )


def check_names(config: SSMPrunerConfig) -> None:
    """Names that registries and lists know, with parameters that their owners take."""
    methods = STRUCTURES if config.structured else METHODS
    known = sorted({*METHODS.names(), *STRUCTURES.names()})
    for value, allowed, name in (
        (config.method, methods.names() if config.structured else known, _kind(config.structured)),
        (config.allocation, ALLOCATIONS.names(), "allocation"),
        (config.scope, list(SCOPES), "scope"),
        (config.axis, list(AXES), "axis"),
        (config.compensation, list(COMPENSATIONS), "compensation"),
        (config.norm_rescale, list(NORM_RESCALES), "norm_rescale"),
        (config.a_log_fill, list(A_LOG_FILLS), "a_log_fill"),
        (config.offload, list(OFFLOADS), "offload"),
    ):
        if value is not None and value not in allowed:
            raise ConfigurationError(unknown(name, value, allowed))
    method = methods.build(config.method, config.method_kwargs, "method_kwargs")
    if config.structured and config.axis is not None and config.axis not in method.axes:
        raise ConfigurationError(
            f"method {config.method!r} does not score axis {config.axis!r}. Allowed: {', '.join(method.axes)}"
        )
    if config.allocation is not None:
        allocation = ALLOCATIONS.build(config.allocation, config.allocation_kwargs, "allocation_kwargs")
        wanted = "units" if config.structured else "weights"
        if wanted not in allocation.spreads:
            fit = [name for name, entry in ALLOCATIONS.items() if wanted in entry.spreads]
            raise ConfigurationError(
                f"allocation={config.allocation!r} spreads {' and '.join(allocation.spreads)}, not {wanted}. "
                f"Allowed: {', '.join(fit)}"
            )
    for key, value in config.reconstruction_kwargs.items():
        if key not in RECONSTRUCTION_KEYS:
            raise ConfigurationError(unknown("reconstruction_kwargs key", key, list(RECONSTRUCTION_KEYS)))
        if isinstance(value, bool) or not isinstance(value, RECONSTRUCTION_KEYS[key]):
            names = "number" if key == "lr" else "int"
            raise ConfigurationError(
                f"reconstruction_kwargs {key}={value!r} must be a {names}, got {type(value).__name__}"
            )
    if config.scope == "global" and config.allocation not in (None, "global"):
        raise ConfigurationError(
            f"scope='global' compares all weights at once and so contradicts allocation={config.allocation!r}; "
            "leave one of them out"
        )


def check_sparsity(config: SSMPrunerConfig) -> None:
    """A budget, once: N:M brings its own."""
    pattern = Pattern.parse(config.pattern)
    if config.sparsity is not None and not 0 <= config.sparsity < 1:
        raise ConfigurationError(f"sparsity={config.sparsity} must lie in [0, 1)")
    if not pattern.is_n_m:
        if config.sparsity is None:
            raise ConfigurationError("sparsity must be given, in [0, 1), unless pattern is N:M such as '2:4'")
        return
    if config.sparsity is not None and abs(config.sparsity - pattern.sparsity) > 1e-9:
        raise ConfigurationError(
            f"pattern={config.pattern!r} removes {pattern.sparsity:g} of the weights and contradicts "
            f"sparsity={config.sparsity}; leave sparsity out or give {pattern.sparsity:g}"
        )
    config.sparsity = pattern.sparsity
    for name in ("scope", "allocation"):
        if getattr(config, name) not in (None, "uniform", "row"):
            raise ConfigurationError(
                f"{name}={getattr(config, name)!r} contradicts pattern={config.pattern!r}, which fixes the count in "
                f"every group of {pattern.group}; leave {name} out"
            )


def _plain(value: Any) -> Any:
    """A number of numpy as one of Python, by what is printed: float32 0.7 is meant as 0.7, not as 0.699999988."""
    if type(value).__module__ != "numpy" or getattr(value, "ndim", 1):
        return value
    return float(str(value)) if isinstance(value.item(), float) else value.item()


def _kind(structured: bool) -> str:
    return "structured method" if structured else "method"
