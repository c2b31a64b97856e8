# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a pass over whole blocks will drop, checked before anything is touched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers.utils import logging

from ..calibration.offload import check_values, read_parameter
from ..configuration import SSMPrunerConfig
from ..errors import ConfigurationError
from ..families.base import Family
from ..methods.structures.base import StructuredMethod
from ..sparsity.selection import round_half_up
from ..surgery.drop import is_muted


logger = logging.get_logger(__name__)

BLOCK = "block"
STATISTICS = ("perplexity", "influence")


@dataclass
class DropPlan:
    """A checked pass that drops whole blocks, or the SSMs in them.

    Args:
        config (`SSMPrunerConfig`): the pass.
        family (`Family`): the model's description.
        method (`StructuredMethod`): built from the config.
        unit (`str`): `"block"` or `"ssm"`.
        tasks (`list[int]`): blocks that may lose the unit, ascending.
        count (`int`): how many do.
    """

    axis: ClassVar[str] = BLOCK

    config: SSMPrunerConfig
    family: Family
    method: StructuredMethod
    unit: str
    tasks: list[int]
    count: int

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method needs to know of every unit: none, or some of `STATISTICS`."""
        return tuple(statistic for _, statistic in self.method.needs(BLOCK, {}))

    @property
    def stepwise(self) -> bool:
        """Whether scores are taken anew after every dropped unit: a perplexity depends on what is gone already."""
        return "perplexity" in self.statistics

    @property
    def needs_text(self) -> bool:
        """Whether any calibration text is needed at all."""
        return bool(self.count and self.statistics)


def make_drop_plan(model: nn.Module, family: Family, config: SSMPrunerConfig, method: StructuredMethod) -> DropPlan:
    """Check a config with `axis="block"` against a model.

    Of U units round(sparsity · U) are gone afterwards, at most U - 1 blocks. SSMs that gave their input already count as
    gone.

    Raises:
        ConfigurationError: a setting has no meaning for whole blocks, no unit would go, a statistic does not exist, the
            model has no output head to take a perplexity from, or values of a parameter cannot be had.
    """
    for name in ("allocation", "multiple_of", "compensation", "reconstruction_epochs"):
        value = getattr(config, name)
        if value and value != "uniform":
            raise ConfigurationError(
                f"{name}={value!r} is for passes that go block by block; axis='block' drops them whole. Leave {name} out"
            )
    if config.reconstruction_kwargs:
        raise ConfigurationError(
            f"reconstruction_kwargs={config.reconstruction_kwargs} tune pruned blocks, and axis='block' leaves none"
        )
    unit = getattr(method, "unit", BLOCK)
    blocks = family.blocks(model)
    check_values(model, (name for name, _ in model.named_parameters()))  # the search runs all of the model
    units = [i for i, (_, block) in enumerate(blocks) if unit == BLOCK or family.mixer(block) is not None]
    tasks = [i for i in units if unit == BLOCK or not _is_muted(model, family, *blocks[i])]
    wanted = round_half_up(config.sparsity * len(units))
    if config.sparsity and not wanted:
        raise ConfigurationError(
            f"sparsity={config.sparsity:g} of {len(units)} {unit}s rounds to none. Allowed: 0, or at least "
            f"{0.5 / len(units):g}"
        )
    count = max(0, wanted - (len(units) - len(tasks)))
    if unit == BLOCK and count == len(units):
        count -= 1
        logger.warning(f"sparsity={config.sparsity:g} would drop all {len(units)} blocks; one stays")
    plan = DropPlan(config, family, method, unit, tasks, count)
    for statistic in plan.statistics:
        if statistic not in STATISTICS:
            raise ConfigurationError(
                f"{type(method).__name__} needs {statistic!r} of whole blocks. Allowed: {', '.join(STATISTICS)}"
            )
    if plan.stepwise and model.get_output_embeddings() is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no output head; a perplexity needs a causal language model. method_kwargs "
            "score='influence' does without"
        )
    return plan


def _is_muted(model: nn.Module, family: Family, name: str, block: nn.Module) -> bool:
    """`is_muted` of a block that may be offloaded."""
    return is_muted(family, block, lambda path: read_parameter(model, f"{name}.{path}"))
