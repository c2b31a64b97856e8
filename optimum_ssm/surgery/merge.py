# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Groups of Mamba-2 that come to share one B and one C."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..families.axes import Axis, Owned
from ..families.base import Family
from .cut import Kept, kept_indices, shrink, sliced


GROUPS = "n_groups"


@dataclass(frozen=True)
class Merged:
    """Rows that were pooled, and what was left of every parameter.

    Args:
        pools (`dict[str, list[tuple[Tensor, Tensor]]]`): path inside the block to pairs of old row indices: where the
            pooled rows went, (G', N), and what they were made of, (G', b, N).
        used (`Tensor`): bool, (G', b): which groups of a run have a share in its rows.
        kept (`Kept`): old indices of the rows that are left.
    """

    pools: dict[str, list[tuple[Tensor, Tensor]]]
    used: Tensor
    kept: Kept

    def mask(self, path: str, mask: Tensor) -> Tensor:
        """An earlier mask of a parameter in its new shape: a pooled entry is gone where all of its parts were."""
        if path not in self.pools:
            return mask
        mask = mask.clone()
        for rows, sources in self.pools[path]:
            unused = ~self.used.reshape(*self.used.shape, *[1] * mask.dim())
            mask[rows] = (mask[sources] | unused).all(1)
        return sliced(mask, self.kept[path])


def merge(family: Family, block: nn.Module, axis: Axis, groups: int, shares: Tensor, order: Tensor) -> Merged:
    """Pool B and C of runs of b = G / G' consecutive groups, in place; all that belongs to heads stays, the norm too.

    Head h reads group floor(h · G' / H) afterwards, the one that its own went into. `in_proj` and `conv1d` are pooled
    alike, weight and bias. (4.4 of SSM-Pruner, arXiv 2502.18886.)

    Args:
        family (`Family`), block (`nn.Module`): the block.
        axis (`Axis`): its axis `group`.
        groups (`int`): G', a divisor of G.
        shares (`Tensor`): (G), what every group contributes to the one that its run becomes.
        order (`Tensor`): int64, (G, N), which state of a group goes with state n of the first group of its run.

    Raises:
        ConfigurationError: as in `check_groups`.
    """
    sizes = family.sizes(block)
    check_groups(axis.units, groups, sizes["num_heads"])
    run = axis.units // groups
    first = torch.arange(axis.units) % run == 0
    shares = shares.detach().cpu().double().reshape(groups, run)
    pools: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part in merged_parts(axis):
        sources = part.index.gather(1, order.cpu()).reshape(groups, run, -1)
        pools.setdefault(part.parameter, []).append((part.index[first], sources))
    with torch.no_grad():
        for path, pairs in pools.items():
            parameter = block.get_parameter(path)
            old = parameter.detach().double()
            weights = shares.to(parameter.device).reshape(groups, run, *[1] * parameter.dim())
            for rows, sources in pairs:
                pooled = (old[sources.to(parameter.device)] * weights).sum(1)
                parameter[rows.to(parameter.device)] = pooled.to(parameter.dtype)
    kept = kept_indices(block, replace(axis, owned=merged_parts(axis)), ~first)
    for path, dims in kept.items():
        shrink(block, path, dims)
    family.set_sizes(block, merged_sizes(sizes, groups))
    return Merged(pools, shares > 0, kept)


def merged_parts(axis: Axis) -> tuple[Owned, ...]:
    """What the groups of an axis own of B and C."""
    return tuple(part for part in axis.owned if part.name.rpartition(".")[2] in ("B", "C"))


def merged_sizes(sizes: dict[str, int], groups: int) -> dict[str, int]:
    """`sizes` of a block after merging to `groups`: the groups of the norm stay as large as they were."""
    return {**sizes, GROUPS: groups}


def check_groups(groups: int, kept: int, heads: int) -> None:
    """Refuse numbers of groups that cannot be merged.

    Raises:
        ConfigurationError: there is one group only, `kept` does not divide the groups, or not the heads.
    """
    allowed = [n for n in range(1, groups) if groups % n == 0 and heads % n == 0]
    if groups == 1:
        raise ConfigurationError("n_groups = 1: there is one B and one C for all heads, and nothing to merge")
    if kept < 1 or groups % kept:
        shares = ", ".join(f"{1 - n / groups:g}" for n in reversed(allowed))
        raise ConfigurationError(
            f"{groups} groups cannot be merged to {kept}, which does not divide them. Allowed: "
            f"{', '.join(map(str, allowed))} (sparsity {shares})"
        )
    if heads % kept:
        raise ConfigurationError(
            f"{heads} heads cannot share {kept} groups evenly. Allowed: {', '.join(map(str, allowed)) or 'none'}"
        )
