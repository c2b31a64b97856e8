# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""One small registry for everything that can be named: methods, families, allocations.

A registry is filled in two ways. Built-in entries are modules of one package: the file name is the entry's name, and the
module is imported when the entry is asked for, so that listing names costs no import of torch. Users add their own with
the decorator that `Registry.register` returns.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
import types
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from .errors import ConfigurationError


T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects, with lazy built-in modules and errors that suggest the name that was meant.

    Args:
        kind (`str`): what an entry is called in messages, such as `"method"`.
        package (`str`): dotted name of the package whose public modules are the built-in entries. Modules whose name
            starts with an underscore, and those in `helpers`, are not entries; an underscore at the end keeps a name
            apart from a Python keyword (`global_.py` holds the entry `global`).
        helpers (`tuple[str, ...]`): modules of the package that hold no entry.
    """

    def __init__(self, kind: str, package: str, helpers: tuple[str, ...] = ()):
        self.kind = kind
        self.package = package
        self.helpers = helpers
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an object under `name`.

        Raises:
            ConfigurationError: the name is not lower-case identifier-like, or belongs to another object.
        """
        if not name.isidentifier() or name != name.lower():
            raise ConfigurationError(
                f"{self.kind} name {name!r} must be a lower-case identifier such as 'my_{self.kind}'"
            )

        def add(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and _identity(known) != _identity(entry):
                raise ConfigurationError(f"{self.kind} {name!r} is already registered by {_identity(known)}")
            home = f"{self.package}.{self._modules().get(name)}"
            if name in self._modules() and getattr(entry, "__module__", None) != home:  # which may not be imported yet
                raise ConfigurationError(f"{self.kind} {name!r} is already registered by {home}")
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        """All names, sorted, without importing the built-in modules."""
        return sorted(self._modules().keys() | self._entries.keys())

    def get(self, name: str) -> T:
        """The object called `name`; its module is imported now if it was not yet.

        Raises:
            ConfigurationError: no entry has this name; the message suggests the nearest and lists all.
        """
        module = self._modules().get(name)
        if name not in self._entries and module is not None:
            importlib.import_module(f"{self.package}.{module}")  # an ImportError in there must reach the user
        if name in self._entries:
            return self._entries[name]
        raise ConfigurationError(unknown(self.kind, name, self.names()))

    def build(self, name: str, kwargs: dict[str, Any], origin: str, **defaults: Any) -> Any:
        """An object of the registered dataclass `name`, with `kwargs` checked against its fields.

        Args:
            name (`str`): a registered name.
            kwargs (`dict`): the object's parameters.
            origin (`str`): the config field they come from, named in messages.
            **defaults: parameters that `kwargs` leaves open, for an object that has them.

        Raises:
            ConfigurationError: the name or a parameter does not exist, a value has the wrong type, or the object
                refuses it.
        """
        entry = self.get(name)
        allowed = [f.name for f in dataclasses.fields(entry)]
        hints = typing.get_type_hints(entry)
        for key, value in kwargs.items():
            if key not in allowed:
                raise ConfigurationError(unknown(f"{origin} key of {self.kind} {name!r}:", key, allowed))
            if not _has_type(value, hints[key]):
                wanted = getattr(hints[key], "__name__", None) or str(hints[key])
                raise ConfigurationError(
                    f"{origin} {key}={value!r} of {self.kind} {name!r} must be of type {wanted}, "
                    f"got {type(value).__name__}"
                )
        return entry(**{key: value for key, value in defaults.items() if key in allowed} | kwargs)

    def items(self) -> list[tuple[str, T]]:
        """All `(name, object)` pairs, sorted by name; imports every built-in module."""
        return [(name, self.get(name)) for name in self.names()]

    def _modules(self) -> dict[str, str]:
        path = importlib.import_module(self.package).__path__
        found = (module.name for module in pkgutil.iter_modules(path))
        return {name.rstrip("_"): name for name in found if not name.startswith("_") and name not in self.helpers}


def unknown(kind: str, name: Any, allowed: list[str]) -> str:
    """The house's message for a name that does not exist: what was given, what was probably meant, what is allowed."""
    same = [entry for entry in allowed if entry.lower() == str(name).lower()]
    near = same or difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed) or 'none'}"


def _has_type(value: Any, hint: Any) -> bool:
    """Whether `value` is what a field's annotation says. An int may stand for a float, a bool for no number."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_has_type(value, kind) for kind in typing.get_args(hint))
    kind = typing.get_origin(hint) or hint
    if kind is Any or not isinstance(kind, type):  # nor a Literal and the like: the object itself judges
        return True
    if isinstance(value, bool):
        return issubclass(bool, kind) and kind is not int
    return isinstance(value, (int, float) if kind is float else kind)


def _identity(entry: Any) -> str:
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"
