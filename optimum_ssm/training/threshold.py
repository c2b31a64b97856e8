# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""One threshold over the scores of all targets of a model that is being trained, and the gradients that it needs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..configuration import SSMPrunerConfig
from ..errors import CalibrationError, ConfigurationError
from ..families.base import Family
from ..methods import METHODS
from ..passes.plan import Plan, Task, make_plan
from ..sparsity.selection import lowest
from .masks import ModelMasks


logger = logging.get_logger(__name__)

GRADIENT = "grad_abs"


class GlobalThreshold:
    """Masks of a plan's targets that grow by the lowest scores of all of them together.

    Args:
        plan (`Plan`): method and targets.
        masks (`ModelMasks`): masks of the targets' parameters, perhaps of others besides; changed in place.

    Attributes:
        size (`int`): entries of all targets.
        sums (`dict[str, Tensor]`): parameter name to the sum of absolute gradients since the last `reset`, float32,
            shape and device of the parameter.
        batches (`int`): gradients in the sums.
    """

    def __init__(self, plan: Plan, masks: ModelMasks) -> None:
        self.plan, self.masks = plan, masks
        self.size = sum(task.size for task in plan.tasks)
        self.names = list(dict.fromkeys(task.target.parameter for task in plan.tasks))
        self.needs_gradients = any(task.statistics for task in plan.tasks)
        self._emptied: set[str] = set()
        self.reset()

    @property
    def removed(self) -> int:
        """Entries of the targets that are removed so far."""
        return sum(int(self.mask(task).count_nonzero()) for task in self.plan.tasks)

    def mask(self, task: Task) -> Tensor:
        """The target's part of its parameter's mask."""
        return self.masks.masks[task.target.parameter][task.target.rows]

    def reset(self) -> None:
        """Forget the gradients."""
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the parameters' present absolute gradients to the sums, unless one of them is not finite.

        Raises:
            CalibrationError: a parameter has no gradient.
        """
        gradients = {name: self.masks.parameters[name].grad for name in self.names}
        for name, gradient in gradients.items():
            if gradient is None:
                raise CalibrationError(
                    f"{name} gets no gradient from the loss, which {self.plan.config.method!r} needs"
                )
        largest = torch.stack([gradient.abs().amax().float() for gradient in gradients.values()])
        if not largest.isfinite().all():  # an overflow under a loss scaler, which skips this step too
            logger.warning_once("gradients that are not finite are left out of the scores")
            return
        for name, gradient in gradients.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(gradient, dtype=torch.float32)
            self.sums[name] += gradient.float().abs()
        self.batches += 1

    @torch.no_grad()
    def remove(self, count: int) -> None:
        """Let the lowest scores go until exactly `count` entries are removed; equal scores in model order.

        Raises:
            CalibrationError: the method needs gradients and none were added, or a score is not a number.
        """
        if self.needs_gradients and not self.batches:
            raise CalibrationError(
                "no finite gradient came since the last update of the masks; the training has diverged"
            )
        parts = [self._scores(task) for task in self.plan.tasks]
        chosen = lowest(torch.cat([part.reshape(-1) for part in parts]), count)
        for task, part, mask in zip(self.plan.tasks, parts, chosen.split([part.numel() for part in parts])):
            self.mask(task).copy_(mask.reshape(part.shape))
            label = task.target.label
            if mask.all() and label not in self._emptied:
                self._emptied.add(label)
                logger.warning(f"{label}: every entry is removed; exclude it or give a lower sparsity to keep it")

    def _scores(self, task: Task) -> Tensor:
        """Keep-scores of one target, as stored; removed entries are below all others."""
        target, kind = task.target, task.target.weight.kind

        def seen(tensor: Tensor) -> Tensor:
            part = tensor[target.rows].detach().float()
            return part.squeeze(1) if kind == "conv" else part  # (channels, 1, taps) as stored

        statistics = {}
        if task.statistics:
            statistics[GRADIENT] = seen(self.sums[target.parameter]) / self.batches
        weight = seen(self.masks.parameters[target.parameter])
        scores = self.plan.method.score(weight, statistics, kind, self.plan.selection(0))
        if torch.isnan(scores).any():
            raise CalibrationError(f"{target.label}: scores are not numbers; the training has diverged")
        removed = self.mask(task)
        return scores.reshape(removed.shape).masked_fill(removed, -torch.inf)


def global_plan(model: nn.Module, family: Family, config: SSMPrunerConfig) -> Plan:
    """The plan of a pass with one threshold over a model in training.

    Raises:
        ConfigurationError: the config does not fit the model, names another scope, allocation or pattern, or a method
            that needs more than the weights and their gradients.
    """
    fitting = {"scope": (None, "global"), "allocation": (None, "global"), "pattern": ("unstructured",)}
    for name, allowed in fitting.items():
        if getattr(config, name) not in allowed:
            raise ConfigurationError(
                f"gradual pruning has one threshold over all targets; that contradicts {name}={getattr(config, name)!r}. "
                f"Allowed: {', '.join(str(value) for value in allowed)}"
            )
    config = dataclasses.replace(config, scope="global", allocation=None)
    plan = make_plan(model, family, config)
    if plan.reconstruction.epochs:
        raise ConfigurationError("gradual pruning tunes by training: reconstruction_epochs must be 0")
    if plan.method.updates_weights or any(set(task.statistics) - {GRADIENT} for task in plan.tasks):
        raise ConfigurationError(
            f"method={config.method!r} cannot prune while a model trains. Allowed are methods that score by "
            f"the weight and its gradient: {', '.join(_fitting_methods())}"
        )
    return plan


def _fitting_methods() -> list[str]:
    fitting = []
    for name, method in METHODS.items():
        needs = {statistic for kind in method.kinds for statistic in method().statistics(kind)}
        if not method.updates_weights and not needs - {GRADIENT}:
            fitting.append(name)
    return fitting
