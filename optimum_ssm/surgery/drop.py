# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Blocks that go whole, and SSMs that go in the form that stock classes load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError
from ..families.axes import Axis
from ..families.base import Family
from .cut import zero_masks


def remove_blocks(model: PreTrainedModel, family: Family, removed: Sequence[int]) -> None:
    """Delete blocks in place: what enters a removed block leaves it as it is.

    Lists in the config that have one entry per block lose the same entries, and a device map follows. `num_hidden_layers`
    and the numbers of blocks and mixers are `surgery.settle`'s.

    Args:
        model (`PreTrainedModel`), family (`Family`): the model and its description.
        removed (`Sequence[int]`): indices of blocks.

    Raises:
        ConfigurationError: an index does not exist, or no block would be left.
    """
    names = [name for name, _ in family.blocks(model)]
    gone, count = set(removed), len(names)
    if not gone <= set(range(count)) or len(gone) >= count:
        raise ConfigurationError(
            f"cannot remove blocks {sorted(gone)} of {count}: allowed are 0 to {count - 1}, not all"
        )
    kept = [i for i in range(count) if i not in gone]
    layers = getattr(model.base_model, family.layers)
    for index in sorted(gone, reverse=True):
        del layers[index]
    for name, value in model.config.to_dict().items():
        if name.startswith("layer") and isinstance(value, list) and len(value) == count:
            setattr(model.config, name, [value[i] for i in kept])
    places = getattr(model, "hf_device_map", None)
    if places is not None:
        prefix = names[0].rpartition(".")[0]
        moved = {renumbered(name, prefix, kept): device for name, device in places.items()}
        model.hf_device_map = {name: device for name, device in moved.items() if name is not None}


def renumbered(name: str, prefix: str, kept: Sequence[int]) -> str | None:
    """What a qualified name is called after `remove_blocks`; `None` for what lay in a removed block.

    Args:
        name (`str`): such as `backbone.layers.3.mixer.D`.
        prefix (`str`): the list of blocks, such as `backbone.layers`.
        kept (`Sequence[int]`): old indices of the remaining blocks, ascending.
    """
    index, local = split_name(name, prefix)
    if index is None:
        return name
    return f"{prefix}.{kept.index(index)}{local}" if index in kept else None


def split_name(name: str, prefix: str) -> tuple[int | None, str]:
    """Index of the block that a qualified name lies in, `None` if in none, and what follows the index."""
    if not name.startswith(f"{prefix}."):
        return None, name
    index, dot, local = name[len(prefix) + 1 :].partition(".")
    return int(index), dot + local


def mute_ssm(family: Family, block: nn.Module) -> dict[str, Tensor]:
    """Make the scan of a block give its input, in place: C = 0 and D = 1, so that y = x.

    For Mamba-1 the rows of `x_proj` that make C become zero. Mamba-2 takes C through silu after the convolution, so weight
    and bias of those channels become zero.

    Args:
        family (`Family`), block (`nn.Module`): the block, with a mixer.

    Returns:
        `dict[str, Tensor]`: path inside the block to a bool mask, in main memory, of the entries that are zero now.
    """
    axis = _state_axis(family, block)
    zero_masks(block, axis, torch.ones(axis.units, dtype=torch.bool))
    with torch.no_grad():
        family.mixer(block).D.fill_(1)
    masks: dict[str, Tensor] = {}
    for owned in axis.owned:
        if owned.masks:
            shape = block.get_parameter(owned.parameter).shape
            mask = masks.setdefault(owned.parameter, torch.zeros(shape, dtype=torch.bool))
            mask.index_fill_(owned.dim, owned.index.flatten(), True)
    return masks


def is_muted(family: Family, block: nn.Module, read: Callable[[str], Tensor] | None = None) -> bool:
    """Whether the scan of a block gives its input already, by C = 0 and D = 1.

    Args:
        family (`Family`), block (`nn.Module`): the block.
        read (`Callable`, *optional*): gives the values of a parameter by its path inside the block, where the block does not
            hold them itself.
    """
    read = read or block.get_parameter
    if family.mixer(block) is None or bool((read(f"{family.mixer_name}.D") != 1).any()):
        return False
    owned = [part for part in _state_axis(family, block).owned if part.masks]
    weights = ((read(part.parameter), part) for part in owned)
    return not any(
        bool(weight.index_select(part.dim, part.index.flatten().to(weight.device)).any()) for weight, part in weights
    )


@contextmanager
def muted(family: Family, block: nn.Module) -> Iterator[None]:
    """Mute the SSM of a block for a while; the weights come back bit for bit, also after an exception."""
    paths = {owned.parameter for owned in _state_axis(family, block).owned if owned.masks}
    parameters = [*(block.get_parameter(path) for path in sorted(paths)), family.mixer(block).D]
    values = [parameter.detach().clone() for parameter in parameters]
    mute_ssm(family, block)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values):
                parameter.copy_(value)


def _state_axis(family: Family, block: nn.Module) -> Axis:
    axes = family.axes(block)
    if "state" not in axes:
        raise ConfigurationError(
            f"{type(family).__name__} declares no axis 'state', which says where C is: unit='block' only"
        )
    return axes["state"]
