# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The words in which a family describes its structural axes: units that can be removed whole, and what each one owns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .base import Site


@dataclass(frozen=True)
class Owned:
    """The indices of one dimension of one tensor that belong to the units of an axis.

    Args:
        name (`str`): what methods call it: `out_proj`, `in_proj.B`, `conv1d.bias.C`, …
        parameter (`str`): path inside the block.
        dim (`int`): dimension that is cut.
        index (`Tensor`): int64, (units, width): what each unit owns.
        kind (`str`): `"linear"`, `"conv"`, `"a_log"` or `"vector"`.
        site (`Site`, *optional*): where the activations of that dimension are seen: the inputs of columns, the outputs of
            rows.
        masks (`bool`): setting these entries to zero has the same effect as removing the unit, but for a norm over the
            removed channels.
    """

    name: str
    parameter: str
    dim: int
    index: Tensor = field(compare=False)
    kind: str = "linear"
    site: Site | None = None
    masks: bool = False


@dataclass(frozen=True)
class Axis:
    """One structural axis of one block.

    Args:
        name (`str`): as configs name it, such as `state`.
        units (`int`): units in the block.
        groups (`int`): equal runs of consecutive units; every one must keep the same number.
        owned (`tuple[Owned, ...]`): everything that goes with a unit.
        read (`tuple[Owned, ...]`): what scores may look at besides; `index` numbers the channels there.
        multiple (`int`): what the kept units of a group are a multiple of by default, for the kernels.
        norm (`str`, *optional*): weight of a norm that averages over channels which are cut.
    """

    name: str
    units: int
    groups: int
    owned: tuple[Owned, ...]
    read: tuple[Owned, ...] = ()
    multiple: int = 1
    norm: str | None = None

    @property
    def group_size(self) -> int:
        """Units in a group."""
        return self.units // self.groups


def runs(start: int, units: int, width: int = 1) -> Tensor:
    """Indices of `units` consecutive runs of `width` from `start`, (units, width)."""
    return start + torch.arange(units * width).reshape(units, width)


def join(*parts: Tensor) -> Tensor:
    """Indices that the same units own in several places, side by side."""
    return torch.cat(parts, dim=1)


def present(axis: Axis, block: nn.Module) -> Axis:
    """`axis` without what this block does not have, such as the bias of a projection."""
    names = {name for name, _ in block.named_parameters()}
    return replace(axis, owned=tuple(owned for owned in axis.owned if owned.parameter in names))
