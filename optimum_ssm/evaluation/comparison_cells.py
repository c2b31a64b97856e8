# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The cells of a comparison, method x budget x component, and the config of each."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml
from torch import nn

from ..configuration import A_LOG_FILLS, SSMPrunerConfig
from ..errors import ConfigurationError
from ..families.base import Family
from ..families.matching import declared_targets, select_targets
from ..methods import METHODS
from ..methods.structures import STRUCTURES
from ..passes.plan import Plan, make_plan
from ..registry import unknown
from ..sparsity.pattern import Pattern


ALL = "all"  # the component that means the method's default targets
MATCHING = "matching"  # the fill whose damage the method estimates
# What the comparison itself decides, so that a method's options may not.
TAKEN = ("method", "sparsity", "pattern", "axis", "targets", "a_log_fill", "dataset", "dataset_name", "dataset_split",
         "text_column", "num_samples", "seq_len")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One cell.

    Args:
        method (`str`): method with options, as in `method_settings`.
        budget (`str`): a sparsity such as `0.5`, or N:M.
        component (`str`): `all`, or comma-separated target names.
        fill (`str`): what a removed entry of A_log holds; `-` where the cell selects no A_log, or the method prunes none.
        plan (`Plan`, *optional*): the checked pass; `None` where the combination is impossible, and then
        reason (`str`): says why.
    """

    method: str
    budget: str
    component: str
    fill: str
    plan: Plan | None = None
    reason: str = ""


def method_settings(spec: str) -> dict[str, Any]:
    """Config fields from a method with options: `name`, `name:option` or `name:option,option`.

    An option is `key=value` with a parameter of the method or a field of the config (`allocation=owl`,
    `reconstruction_epochs=2`, `allocation_kwargs.alpha=0.1`), the name of a switch that is turned on
    (`magnitude:largest`), or a variant (`sparsessm:v1`).

    Raises:
        ConfigurationError: the method or an option does not exist, or the comparison itself decides it.
    """
    name, _, options = spec.partition(":")
    if name not in METHODS.names() and name in STRUCTURES.names():
        raise ConfigurationError(
            f"method {name!r} removes whole units, and a comparison is of masks. Allowed: {', '.join(METHODS.names())}"
        )
    if name not in METHODS.names():
        raise ConfigurationError(unknown("method", name, METHODS.names()))
    own = typing.get_type_hints(METHODS.get(name))
    own = {field.name: own[field.name] for field in dataclasses.fields(METHODS.get(name))}
    fields = [field.name for field in dataclasses.fields(SSMPrunerConfig) if field.name not in TAKEN]
    settings: dict[str, Any] = {"method": name, "method_kwargs": {}}
    for option in filter(None, options.split(",")):
        key, equals, text = option.partition("=")
        home, _, inner = key.partition(".")
        if not equals and own.get(key) is bool:
            settings["method_kwargs"][key] = True
        elif not equals and "variant" in own:
            settings["method_kwargs"]["variant"] = option
        elif equals and key in own:
            settings["method_kwargs"][key] = yaml.safe_load(text)
        elif equals and inner and home.endswith("_kwargs") and home in fields:
            settings.setdefault(home, {})[inner] = yaml.safe_load(text)
        elif equals and key in fields:
            settings[key] = yaml.safe_load(text)
        else:
            raise ConfigurationError(unknown(f"option of {spec!r}:", key, [*own, *fields]))
    METHODS.build(name, settings["method_kwargs"], "method_kwargs")
    return settings


def make_cells(
    model: nn.Module,
    family: Family,
    methods: list[str],
    budgets: list[str],
    components: list[str] | None,
    fills: list[str],
    common: dict[str, Any],
) -> list[Cell]:
    """Every combination, checked against the model before any work is done.

    Args:
        model (`nn.Module`), family (`Family`): what is to be pruned.
        methods, budgets, components, fills (`list[str]`): as in `compare`.
        common (`dict`): fields that all configs share.

    Raises:
        ConfigurationError: a list is empty, or a name or a number in it can never be used.
    """
    declared = declared_targets(family, model)
    if components is None:
        components = [*dict.fromkeys(target.name for target in declared), ALL]
    for name, values in (
        ("methods", methods),
        ("budgets", budgets),
        ("components", components),
        ("a_log_fill", fills),
    ):
        if not values:
            raise ConfigurationError(f"{name} is empty: a comparison needs at least one")
    allowed = [MATCHING, *A_LOG_FILLS]
    for fill in fills:
        if fill not in allowed:
            raise ConfigurationError(unknown("a_log_fill", fill, allowed))
    for component in components:
        if component != ALL:
            select_targets(declared, component.split(","), [], ())
    budget_fields = {str(budget): _budget(str(budget)) for budget in budgets}
    cells: dict[tuple, Cell] = {}
    with _quiet_planning():
        for method in methods:
            settings = method_settings(method)
            for component in components:
                targets = None if component == ALL else component.split(",")
                for budget, fields in budget_fields.items():
                    for fill in fills:
                        values = {**common, **settings, **fields, "targets": targets}
                        cell = _cell(model, family, Cell(method, budget, component, fill), values)
                        cells.setdefault((cell.method, cell.budget, cell.component, cell.fill), cell)
    return list(cells.values())


def _budget(text: str) -> dict[str, Any]:
    if ":" in text:
        Pattern.parse(text)
        return {"pattern": text}
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = -1.0
    if not 0 < sparsity < 1:
        raise ConfigurationError(f"budget {text!r} must be a sparsity in (0, 1) or an N:M pattern such as '2:4'")
    return {"sparsity": sparsity}


def _cell(model: nn.Module, family: Family, cell: Cell, values: dict[str, Any]) -> Cell:
    method = METHODS.build(values["method"], values["method_kwargs"], "method_kwargs")
    fill = (method.fill("a_log") or A_LOG_FILLS[0]) if cell.fill == MATCHING else cell.fill
    targets = [t.strip() for t in values["targets"]] if values["targets"] is not None else None
    chosen = select_targets(declared_targets(family, model), targets, [], method.default_targets)
    has_a_log = any(target.weight.kind == "a_log" for target in chosen)
    cell = replace(cell, fill=fill if has_a_log and "a_log" in method.kinds else "-")
    try:
        fills = {"a_log_fill": fill} if has_a_log else {}
        config = SSMPrunerConfig(**{**values, "targets": targets, **fills})
        return replace(cell, plan=make_plan(model, family, config))
    except ConfigurationError as error:
        return replace(cell, reason=str(error))


@contextmanager
def _quiet_planning() -> Iterator[None]:
    """No warnings of `make_plan` here: it runs again, and warns, when a cell is pruned."""
    logger = logging.getLogger(make_plan.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
