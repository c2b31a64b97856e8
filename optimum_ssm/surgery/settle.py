# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The config of a model whose blocks were cut: what a stock class builds, or else a class of `optimum_ssm.models`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..families.base import Family
from .compensation import give_bias


def settle(model: PreTrainedModel, family: Family) -> None:
    """Bring `model.config` in step with the blocks as they are, in place.

    Where the stock class of the model can build the sizes, its config says them. Otherwise the model becomes one of
    `optimum_ssm.models`, in place, which loads after `import optimum_ssm`.
    """
    blocks = [block for _, block in family.blocks(model)]
    sizes = [family.sizes(block) for block in blocks if family.mixer(block) is not None]
    _agree_on_biases(model, family, blocks)
    number(model, blocks)
    fields = stock_fields(model, family, sizes)
    if fields is None:
        from ..models import with_sizes  # brings the modelling code of transformers

        with_sizes(model, sizes)
        return
    values = model.config.to_dict() | fields | {"num_hidden_layers": len(blocks)}
    replace_config(model, type(model.config).from_dict(values))


def stock_fields(model: PreTrainedModel, family: Family, sizes: list[dict[str, int]]) -> dict[str, Any] | None:
    """Config fields with which the model's own class, if it is a stock one, builds blocks of these sizes."""
    if not is_stock(model) or any(other != sizes[0] for other in sizes[1:]):
        return None
    if not sizes[0]:  # a family without axes: no size can have changed
        return {}
    return family.stock_fields(model.config, sizes[0])


def is_stock(model: PreTrainedModel) -> bool:
    """Whether transformers itself brings the model's class."""
    return type(model).__module__.startswith("transformers.")


def replace_config(model: PreTrainedModel, config: Any) -> None:
    """Let every module that holds the model's config hold `config`."""
    old = model.config
    config._name_or_path = old._name_or_path
    config.architectures = [type(model).__name__]
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


def number(model: PreTrainedModel, blocks: list[nn.Module]) -> None:
    """Give blocks and mixers the index of their cache layer."""
    for index, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def _agree_on_biases(model: PreTrainedModel, family: Family, blocks: list[nn.Module]) -> None:
    """One block whose output projection got a bias gives all of them one: `use_bias` covers in_proj and out_proj alike."""
    outputs = [block.get_submodule(family.output) for block in blocks if family.mixer(block) is not None]
    if all(output.bias is None for output in outputs):
        return
    for block in blocks:
        for path in (family.output, family.output.replace("out_proj", "in_proj")):
            give_bias(block.get_submodule(path))
        family.mixer(block).use_bias = True
    model.config.use_bias = True
