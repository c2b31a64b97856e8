# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The one primitive of structural pruning: the kept units of an axis to smaller tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..families.axes import Axis
from ..families.base import Family


# Parameter path inside a block to the kept indices of each dimension that was cut.
Kept = dict[str, dict[int, Tensor]]


def cut(family: Family, block: nn.Module, axis: Axis, removed: Tensor) -> Kept:
    """Slice everything that the removed units own out of a block, in place; survivors keep their order.

    Sizes that modules hold as attributes follow. A norm over the cut channels is not rescaled here.

    Args:
        family (`Family`): knows the block's sizes.
        block (`nn.Module`): the block.
        axis (`Axis`): from `family.axes(block)`.
        removed (`Tensor`): bool, (units); every group of units must lose the same number and keep at least one.

    Returns:
        `Kept`: which indices of which dimension of which parameter are left, ascending.

    Raises:
        ConfigurationError: groups would differ, or nothing would be left of one.
    """
    kept_per_group = check_removed(axis, removed)
    sizes = family.sizes_after(family.sizes(block), axis, kept_per_group * axis.groups)
    kept = kept_indices(block, axis, removed)
    for path, dims in kept.items():
        shrink(block, path, dims)
    family.set_sizes(block, sizes)
    return kept


def check_removed(axis: Axis, removed: Tensor) -> int:
    """Units that every group keeps.

    Raises:
        ConfigurationError: as in `cut`.
    """
    if removed.shape != (axis.units,) or removed.dtype != torch.bool:
        raise ConfigurationError(f"removed units of axis {axis.name!r} must be bool of shape ({axis.units},)")
    kept = (~removed).reshape(axis.groups, axis.group_size).sum(1)
    if int(kept.min()) != int(kept.max()):
        raise ConfigurationError(
            f"axis {axis.name!r}: every group must keep the same number of units, not {sorted(set(kept.tolist()))}"
        )
    if int(kept.min()) == 0:
        raise ConfigurationError(f"axis {axis.name!r}: nothing would be left of it")
    return int(kept[0])


def kept_indices(block: nn.Module, axis: Axis, removed: Tensor) -> Kept:
    """Indices that are left of every dimension that the removed units own a part of."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for owned in axis.owned:
        gone.setdefault((owned.parameter, owned.dim), []).append(owned.index[removed].flatten())
    kept: Kept = {}
    for (path, dim), parts in gone.items():
        mask = torch.ones(block.get_parameter(path).shape[dim], dtype=torch.bool)
        mask[torch.cat(parts)] = False
        kept.setdefault(path, {})[dim] = mask.nonzero().flatten()
    return kept


def sliced(tensor: Tensor, dims: dict[int, Tensor]) -> Tensor:
    """`tensor` with only the given indices of the given dimensions, contiguous."""
    for dim, index in dims.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def shrink(block: nn.Module, path: str, dims: dict[int, Tensor]) -> None:
    """Replace a parameter by its slice; a linear module that holds it follows."""
    module, _, name = path.rpartition(".")
    owner = block.get_submodule(module)
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(sliced(old.detach(), dims), requires_grad=old.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape


def zero_masks(block: nn.Module, axis: Axis, removed: Tensor) -> None:
    """Set to zero what makes the removed units mute in the dense block: the reference that slicing is held against.

    Slicing and this differ only in a norm over the removed channels, see `surgery.norm`.
    """
    with torch.no_grad():
        for owned in axis.owned:
            if owned.masks:
                parameter = block.get_parameter(owned.parameter)
                parameter.index_fill_(owned.dim, owned.index[removed].flatten().to(parameter.device), 0)
