# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Modelling code for what no stock class can build: blocks with sizes of their own.

A family is one file, `pruned_<model type of the stock class>.py`, which stands alone so that it can travel with the weights.
It defines the classes of the model type `optimum_ssm_<model type of the stock class>` and

- `CLASSES`: transformers' auto class to the class here, for `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`,
- `STOCK_CLASS`: the stock class for causal language models,
- `fit_block(block, sizes)`: what a stock block of these sizes lacks to be one of the model.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..registry import unknown


if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "optimum_ssm_"
_FILE = "pruned_"


def stock_types() -> list[str]:
    """Model types of stock classes that have a pruned counterpart, sorted, without importing any of it."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.removeprefix(_FILE) for name in names if name.startswith(_FILE))


def modelling(model_type: str) -> ModuleType:
    """The module with the pruned classes for a model type, stock or pruned. Its classes are registered with transformers.

    Raises:
        ConfigurationError: no file describes this model type; the message lists those that are described.
    """
    stock = str(model_type).removeprefix(PREFIX)
    if stock not in stock_types():
        raise ConfigurationError(unknown("model type with sizes per block", stock, stock_types()))
    return importlib.import_module(f".{_FILE}{stock}", __name__)


def with_sizes(model: PreTrainedModel, sizes: list[dict[str, int]]) -> None:
    """Make a model with blocks of different sizes one that can be saved and loaded again, in place.

    The tensors and the attributes of the blocks must already have these sizes. Classes and config change, every module that
    holds the config gets the new one, weights and `generation_config` stay as they are. Afterwards `save_pretrained` writes
    a checkpoint that `AutoModelForCausalLM.from_pretrained` loads bit for bit after `import optimum_ssm`.

    Args:
        model (`PreTrainedModel`): a stock model such as `MambaForCausalLM`, or one of the pruned classes.
        sizes (`list[dict[str, int]]`): one entry per remaining block, keys as in `layer_sizes` of the pruned config.

    Raises:
        ConfigurationError: the model is of another class, an entry is refused by the config, or a tensor or an attribute
            of a block contradicts the sizes. The model is unchanged then.
    """
    module = modelling(model.config.model_type)
    pruned = module.CLASSES["AutoModelForCausalLM"]
    # by name: a class that was loaded from a copy beside the weights is another object
    if type(model) is not module.STOCK_CLASS and type(model).__name__ != pruned.__name__:
        allowed = f"{module.STOCK_CLASS.__name__} or {pruned.__name__}"
        raise ConfigurationError(
            f"cannot give blocks of {type(model).__name__} sizes of their own; allowed: {allowed}"
        )
    base = model.base_model
    if len(sizes) != len(base.layers):
        raise ConfigurationError(f"sizes has {len(sizes)} entries, but the model has {len(base.layers)} blocks")
    config = _pruned_config(model, module, sizes)
    _check_fit(model, _skeleton(pruned, config))
    for block, own in zip(base.layers, config.layer_sizes):
        module.fit_block(block, own)
    base.__class__, model.__class__ = module.CLASSES["AutoModel"], pruned
    for part in model.modules():
        if "config" in vars(part):
            part.config = config


def _pruned_config(model: PreTrainedModel, module: ModuleType, sizes: list[dict[str, int]]) -> PretrainedConfig:
    values = model.config.to_dict()
    for name in ("model_type", "auto_map"):
        values.pop(name, None)
    values |= {"layer_sizes": sizes, "num_hidden_layers": len(sizes)}
    values |= {"architectures": [module.CLASSES["AutoModelForCausalLM"].__name__]}
    try:
        config = module.CLASSES["AutoConfig"](**values)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    for name, value in vars(model.config).items():
        if name.startswith("_"):  # what to_dict leaves out: where the model came from, its attention implementation
            setattr(config, name, value)
    return config


def _skeleton(pruned: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The model that a reload would build, without memory for its weights."""
    import torch

    with torch.device("meta"):
        return pruned(config)


def _check_fit(model: PreTrainedModel, wanted: PreTrainedModel) -> None:
    """Refuse a model that differs in a shape or in a size attribute from the one that a reload would build."""
    found, needed = _shapes(model), _shapes(wanted)
    for name in sorted(found.keys() | needed.keys()):
        if found.get(name) != needed.get(name):
            raise ConfigurationError(
                f"{name} is {found.get(name, 'absent')}, but with these sizes it is {needed.get(name, 'absent')}"
            )
    for path, part in wanted.named_modules():
        there = vars(model.get_submodule(path))
        for name, value in vars(part).items():
            # chunk_size is how the scan is computed, not what; a norm without groups gets them from fit_block
            if type(value) is int and name != "chunk_size" and there.get(name, value) != value:
                raise ConfigurationError(f"{path}.{name} is {there[name]}, but with these sizes it is {value}")


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors}
