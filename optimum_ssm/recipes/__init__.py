# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Recipes that come with the library: one YAML file each, known by the file's name, with their text as its comment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..registry import unknown


if TYPE_CHECKING:
    from ..configuration import SSMPrunerConfig


HERE = Path(__file__).parent
# What may be said beside a recipe, for all of its passes: the budget, the text and places. The rest is what a recipe is.
OVERRIDES = ("sparsity", "pattern", "dataset", "dataset_name", "dataset_split", "text_column", "num_samples", "seq_len",
             "batch_size", "seed", "offload", "device", "max_memory", "resume_from")  # fmt: skip


def recipe_names() -> list[str]:
    """Names of the recipes that come with the library, sorted."""
    return sorted(path.stem for path in HERE.glob("*.yaml"))


def load_recipe(recipe: str | os.PathLike, **overrides: Any) -> list[SSMPrunerConfig]:
    """A recipe by name or from a file, with another budget or text.

    Args:
        recipe (`str` or `os.PathLike`): a name such as `sparsessm`, or the path of a YAML or JSON file.
        **overrides: `sparsity`, `pattern` and the fields of the calibration text, for every pass. A sparsity takes the place
            of an N:M pattern only together with `pattern="unstructured"`.

    Raises:
        ConfigurationError: there is no such recipe, a field cannot be given for all passes, or a pass is refused.

    Example:
        ```python
        pruner.prune(load_recipe("sparsessm", sparsity=0.6, dataset="my_text.txt"))
        ```
    """
    from ..configuration import SSMPrunerConfig

    return SSMPrunerConfig.from_file(recipe, **overrides)


def recipe_path(recipe: str | os.PathLike) -> Path:
    """The file of a recipe. A bare name without suffix means one of the library's; `./name` means a file.

    Raises:
        ConfigurationError: a bare name is no recipe of the library; the message suggests the nearest.
    """
    text = os.fspath(recipe)
    if not isinstance(recipe, str) or Path(text).suffix or Path(text).name != text:
        return Path(text)
    if text not in recipe_names():
        raise ConfigurationError(unknown("recipe", text, recipe_names()) + "; also the path of a YAML or JSON file")
    return HERE / f"{text}.yaml"


def overridden(entry: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A pass with another budget or text; a new budget replaces the old one whole.

    Raises:
        ConfigurationError: a field cannot be given for all passes of a recipe, or a sparsity meets an N:M pattern.
    """
    for name in overrides:
        if name not in OVERRIDES:
            raise ConfigurationError(unknown("field beside a recipe", name, list(OVERRIDES)))
    pattern = str(entry.get("pattern", ""))
    if ":" in pattern and overrides.get("sparsity") is not None and "pattern" not in overrides:
        raise ConfigurationError(
            f"sparsity={overrides['sparsity']} beside a recipe cannot replace pattern={pattern!r} of a pass; give the pattern "
            "as well, such as 'unstructured'"
        )
    budget = {"sparsity", "pattern"} if overrides.keys() & {"sparsity", "pattern"} else set()
    return {name: value for name, value in entry.items() if name not in budget} | overrides


def recipe_text(name: str) -> tuple[str, str]:
    """Summary and description of one of the library's recipes, from the comment at the top of its file."""
    lines = []
    for line in recipe_path(name).read_text(encoding="utf-8").splitlines()[2:]:  # after the licence
        if not line.startswith("#"):
            break
        lines.append(line[2:])
    summary, _, text = "\n".join(lines).strip().partition("\n")
    return summary.strip(), text.strip()
