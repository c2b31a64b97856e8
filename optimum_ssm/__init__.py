# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Prune state-space language models: Mamba, Mamba-2 and what is built on them.

Public names are imported on first use, so that `import optimum_ssm` and the command line stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .models.registration import register as _register_models
from .version import __version__


_EXPORTS = {
    "SSMPruner": "pruner",
    "SSMPrunerConfig": "configuration",
    "load_recipe": "recipes",
    "PruningReport": "report",
    "evaluate_perplexity": "evaluation.perplexity",
    "register_method": "methods",
    "register_structured_method": "methods.structures",
    "register_family": "families",
    "register_allocation": "sparsity.allocations",
    "OptimumSSMError": "errors",
    "ConfigurationError": "errors",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
}

# Subpackages that are reached as attributes, also on first use.
_ROOMS = ("evaluation", "hub", "training")

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .configuration import SSMPrunerConfig
    from .errors import CalibrationError, CheckpointError, ConfigurationError, OptimumSSMError
    from .evaluation.perplexity import evaluate_perplexity
    from .families import register_family
    from .methods import register_method
    from .methods.structures import register_structured_method
    from .pruner import SSMPruner
    from .recipes import load_recipe
    from .report import PruningReport
    from .sparsity.allocations import register_allocation


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_register_models()  # so that AutoModelForCausalLM loads what is saved here
