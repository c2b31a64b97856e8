# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The pruned classes in transformers' auto classes, while `import optimum_ssm` imports neither transformers nor torch.

transformers takes classes, not names, and its auto module is itself imported in the middle of others, from where modelling
code cannot be imported yet. So a stand-in is registered as soon as that module is there, and makes way for the real classes
when a checkpoint of that model type is loaded.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import PREFIX, modelling, stock_types


WATCHED = "transformers.models.auto.configuration_auto"


class _Deferred(type):
    """Metaclass of a stand-in for a config class: whatever is asked of it is asked of the real one, imported now."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real(cls)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # probes of the interpreter and of inspect
            raise AttributeError(f"{cls.__name__} has no attribute {name!r}")
        return getattr(_real(cls), name)


class _Watcher(MetaPathFinder):
    """Finds the auto module as the other finders do, and registers the stand-ins when it has been executed."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Let transformers' auto classes know the pruned classes: now if they are imported already, else when they will be."""
    if hasattr(sys.modules.get(WATCHED), "AutoConfig"):
        _register(sys.modules[WATCHED])
    elif not any(type(finder).__qualname__ == _Watcher.__qualname__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def _register(auto: ModuleType) -> None:
    for stock in stock_types():
        if f"{__package__}.pruned_{stock}" in sys.modules:  # has registered its classes itself
            continue
        name = "".join(word.capitalize() for word in f"pruned_{stock}_config".split("_"))
        stand_in = _Deferred(name, (), {"model_type": PREFIX + stock, "__module__": __name__})
        globals()[name] = stand_in  # found again by its name when the mapping that holds it is pickled
        auto.AutoConfig.register(stand_in.model_type, stand_in, exist_ok=True)


def _real(stand_in: type) -> type:
    return modelling(stand_in.model_type).CLASSES["AutoConfig"]
