# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of structured pruning share: models with every kind of bias, random units to remove, scores of a method."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.families import family_of
from optimum_ssm.families.axes import Axis
from optimum_ssm.passes.pipeline import run_pass
from optimum_ssm.passes.plan import make_plan
from optimum_ssm.surgery import norm
from optimum_ssm.surgery.cut import cut, zero_masks

from . import reference
from .conftest import tiny_model


AXES = {
    "mamba": ("state", "channel", "dt_rank"),
    "mamba2": ("state", "head", "head_dim", "group"),
}
PAIRS = [(model_type, axis) for model_type, axes in AXES.items() for axis in axes]


def axes_of(model: PreTrainedModel, name: str) -> list[Axis]:
    """The axis in every block."""
    family = family_of(model)
    return [family.axes(block)[name] for _, block in family.blocks(model)]


def some_units(axis: Axis, seed: int, keep: int | None = None) -> Tensor:
    """Half of every group, at other places in every group."""
    draw = torch.Generator().manual_seed(seed)
    removed = torch.zeros(axis.groups, axis.group_size, dtype=torch.bool)
    for row in removed:
        row[torch.randperm(axis.group_size, generator=draw)[(keep or axis.group_size // 2) :]] = True
    return removed.flatten()


def cut_and_masked(
    model: PreTrainedModel, name: str, rescale: str = "mask", eps: bool = False, keep: int | None = None
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two copies of a model, other units in every block: in one they are gone, in the other what mutes them is zero."""
    sliced, masked = copy.deepcopy(model), copy.deepcopy(model)
    family = family_of(model)
    blocks = zip(family.blocks(sliced), family.blocks(masked))
    for seed, ((_, block), (_, other)) in enumerate(blocks):
        axis = family.axes(block)[name]
        removed = some_units(axis, seed, keep)
        zero_masks(other, axis, removed)
        before = block.get_parameter(axis.norm).numel() if axis.norm else 1
        cut(family, block, axis, removed)
        after = block.get_parameter(axis.norm).numel() if axis.norm else 1
        if axis.norm and rescale == "mask":
            norm.rescale(block, axis.norm, norm.mask_factor(before, after))
        if axis.norm and eps:
            block.mixer.norm.variance_epsilon *= before / after
    return sliced, masked


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def exact(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The logits in float64, by the reference."""
    return reference.trace(model, ids)[1]


def largest(one: Tensor, two: Tensor) -> float:
    """The largest difference."""
    return float((one.detach() - two.detach()).abs().max())


def scores_of(model: PreTrainedModel, method: str, axis: str, ids: Tensor, **values: Any) -> list[Tensor]:
    """What a method says of the units of every block on the dense model's activations; nothing is changed."""
    config = SSMPrunerConfig(method=method, axis=axis, pattern="structured", sparsity=0.0, dataset=ids, **values)
    family, found = family_of(model), []
    plan = make_plan(model, family, config)
    scores = plan.method.scores
    plan.method.scores = lambda units: found.append(scores(units)) or found[-1]
    run_pass(model, family, plan, ids if plan.needs_text else None, lambda block: None, {})
    return found


def prune(model: PreTrainedModel, ids: Tensor | None = None, *recipe: dict, **values: Any) -> SSMPruner:
    """Prune by one config over `ids`, or by several."""
    common = {"dataset": ids, "seq_len": 24, "batch_size": 2}
    pruner = SSMPruner(model)
    for entry in recipe or (values,):
        pruner.prune(
            SSMPrunerConfig(**{"sparsity": 0.5, "pattern": "structured", "multiple_of": 1, **common, **entry})
        )
    return pruner


def decoded(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of a short prefill and then one token at a time."""
    steps, cache = [], None
    with torch.no_grad():
        for piece in (ids[:, :3], *ids[:, 3:].split(1, dim=1)):
            out = model(piece, cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
    return torch.cat(steps, dim=1)


def biased(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model with a bias wherever there can be one."""
    return tiny_model(model_type, use_bias=True, use_conv_bias=True, **changes)
