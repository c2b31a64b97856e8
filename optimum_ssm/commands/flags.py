# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Command-line flags from the fields of a dataclass, so that a new field is a new flag."""

from __future__ import annotations

import dataclasses
import types
import typing
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from typing import Any


def add_flags(parser: ArgumentParser, config: type, names: dict[str, list[str]]) -> None:
    """Add one flag per field of the dataclass `config`; what the user leaves out stays out of the namespace.

    Lists take several values, dicts `key=value` pairs whose values are read as YAML, booleans `--x` and `--no-x`.

    Args:
        parser (`ArgumentParser`): where to add the flags.
        config (`type`): the dataclass; every field's metadata has `help` and may have `choices`.
        names (`dict[str, list[str]]`): for fields that name registry entries, the names to show in the help.
    """
    group = parser.add_argument_group(f"pruning ({config.__name__})")
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = _plain(hints[field.name])
        origin = typing.get_origin(kind) or kind
        options: dict[str, Any] = {"dest": field.name, "default": SUPPRESS, "help": _help(field, names)}
        if origin is bool:
            options["action"] = BooleanOptionalAction
        elif origin is list:
            options |= {"nargs": "+", "metavar": "NAME"}
        elif origin is dict:
            options |= {"nargs": "+", "type": _pair, "metavar": "KEY=VALUE"}
        else:
            options["type"] = str if origin is Any else origin
            options |= {"choices": field.metadata["choices"]} if "choices" in field.metadata else {}
            options |= (
                {} if "choices" in options else {"metavar": getattr(options["type"], "__name__", "value").upper()}
            )
        group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def given(args: Namespace, config: type) -> dict[str, Any]:
    """The fields of `config` that the user gave, as keyword arguments."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(config) if hasattr(args, f.name)}
    return {
        name: dict(value) if isinstance(value, list) and value and isinstance(value[0], tuple) else value
        for name, value in values.items()
    }


def _plain(kind: Any) -> Any:
    """`X | None` to `X`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def _help(field: dataclasses.Field, names: dict[str, list[str]]) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if field.name in names:
        text += f"; one of: {', '.join(names[field.name])}"
    if field.default is dataclasses.MISSING or field.default is None or "default" in text:
        return text
    return f"{text} (default: {field.default})"


def _pair(text: str) -> tuple[str, Any]:
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ArgumentTypeError(f"{text!r} is not key=value")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ArgumentTypeError(f"{text!r}: {' '.join(str(error).split())}") from error
    glued = [k for k, v in found.items() if v is None and ":" in str(k)] if isinstance(found, dict) else []
    if glued:  # to YAML {a:1} is a key without a value
        raise ArgumentTypeError(f"{text!r}: {glued[0]!r} needs a space behind the colon")
    return key, found
