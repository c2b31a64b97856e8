# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Names in a config to weights in a model: exact names, globs and regular expressions. Nothing matches in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import nn
from transformers.utils import logging

from ..errors import ConfigurationError
from ..registry import unknown
from .base import Family, PrunableWeight


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """A weight of one block, or one row segment of it, that a config selects.

    Args:
        block (`int`): index of the block.
        parameter (`str`): qualified name in the model, such as `backbone.layers.3.mixer.in_proj.weight`.
        weight (`PrunableWeight`): the family's declaration.
        segment (`str`, *optional*): name of the row segment, or `None` for the whole weight.
    """

    block: int
    parameter: str
    weight: PrunableWeight = field(compare=False)
    segment: str | None = None

    @property
    def name(self) -> str:
        """Short name, such as `in_proj` or `in_proj.B`."""
        return self.weight.name if self.segment is None else f"{self.weight.name}.{self.segment}"

    @property
    def label(self) -> str:
        """Name for messages and progress, such as `backbone.layers.3.mixer.in_proj.B`."""
        stem = self.parameter.removesuffix(".weight")
        return stem if self.segment is None else f"{stem}.{self.segment}"

    @property
    def spellings(self) -> tuple[str, str, str]:
        """What a config may call it: short, qualified, and the parameter's own name."""
        return self.name, self.label, self.parameter

    @property
    def rows(self) -> slice:
        """Rows of the weight that the target covers."""
        return slice(None) if self.segment is None else slice(*self.weight.segments[self.segment])


def declared_targets(family: Family, model: nn.Module) -> list[Target]:
    """Every prunable weight of the model, whole, in the order of the computation."""
    return [
        Target(index, f"{name}.{weight.parameter}", weight)
        for index, (name, block) in enumerate(family.blocks(model))
        if family.mixer(block) is not None
        for weight in family.weights(block)
    ]


def select_targets(
    declared: list[Target], targets: list[str] | None, exclude: list[str], default: Iterable[str]
) -> list[Target]:
    """The targets that a config selects, in model order.

    A name is compared with the short name (`in_proj`), the qualified one (`backbone.layers.3.mixer.in_proj`) and the
    parameter's (`….weight`). Whole weights come first; a name that fits none of them selects row segments (`in_proj.B`).

    Args:
        declared (`list[Target]`): whole weights, from `declared_targets`.
        targets (`list[str]`, *optional*): names, globs or `re:…` from the config; `None` takes `default`.
        exclude (`list[str]`): names to leave out.
        default (`Iterable[str]`): the method's own short names; those that the model lacks are passed over.

    Raises:
        ConfigurationError: a name matches nothing, a weight is selected both whole and by segment, or nothing is left.
    """
    segments = [part for target in declared for part in _parts(target)]
    wanted = set(default)
    chosen = [target for target in declared if target.name in wanted]
    if targets is not None:
        chosen = [hit for name in targets for hit in _find(name, declared, segments, "target")]
    dropped = {hit for name in exclude for hit in _find(name, declared, segments, "exclude")}
    whole = {target.parameter for target in chosen if target.segment is None}
    for target in chosen:
        if target.segment is not None and target.parameter in whole:
            raise ConfigurationError(f"targets select {target.parameter} both whole and by its segment {target.name}")
    cut = {target.parameter for target in dropped if target.segment is not None}
    split = []
    for target in dict.fromkeys(chosen):
        if target.segment is None and target.parameter in cut:  # excluding in_proj.B leaves the other segments
            split += _parts(target)
        else:
            split.append(target)
    whole_dropped = {target.parameter for target in dropped if target.segment is None}
    kept = {target for target in split if target not in dropped and target.parameter not in whole_dropped}
    reached = {target.parameter for target in chosen}
    for name in exclude:
        if not any(hit.parameter in reached for hit in _find(name, declared, segments, "exclude")):
            logger.warning(f"exclude {name!r} changes nothing: no weight that it names is among the targets")
    if not kept:
        raise ConfigurationError(f"targets={targets} without exclude={exclude} leave no weight to prune")
    return [part for target in declared for part in (target, *_parts(target)) if part in kept]


def _parts(target: Target) -> list[Target]:
    return [replace(target, segment=segment) for segment in target.weight.segments]


def _find(name: str, declared: list[Target], segments: list[Target], field: str) -> list[Target]:
    for pool in (declared, segments):
        hits = [target for target in pool if matches(name, target.spellings)]
        if hits:
            return hits
    allowed = list(dict.fromkeys(target.name for target in declared + segments))
    raise ConfigurationError(unknown(field, name, allowed) + "; also globs, qualified names and 're:…'")


def matches(name: str, spellings: Iterable[str]) -> bool:
    """Whether a name from a config, a glob or a `re:…` fits one of the spellings.

    Raises:
        ConfigurationError: what follows `re:` is no regular expression.
    """
    if name.startswith("re:"):
        try:
            return any(re.fullmatch(name[3:], spelling) for spelling in spellings)
        except re.error as error:
            raise ConfigurationError(f"target {name!r} is not a regular expression: {error}") from error
    return any(fnmatchcase(spelling, name) for spelling in spellings)
