# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Units of a structural axis: which ones go, and how many every block keeps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ..selection import lowest, round_half_up


def removed_units(scores: Tensor, groups: int, keep: int) -> Tensor:
    """The lowest scores of every group, ties by index.

    Args:
        scores (`Tensor`): (units); higher means keep.
        groups (`int`): equal runs of consecutive units.
        keep (`int`): units that each group keeps.

    Returns:
        `Tensor`: bool, (units), on the CPU.
    """
    rows = scores.detach().cpu().reshape(groups, -1)
    return torch.cat([lowest(row, len(row) - keep) for row in rows])


def rank_energies(scores: Tensor, groups: int) -> Tensor:
    """Sums over groups of the best, second best, … score of each, (units per group).

    All groups of a block keep the same number K: the sum at rank r is what keeping one more unit in each of them is
    worth.
    """
    rows = scores.detach().cpu().double().reshape(groups, -1)
    return rows.sort(dim=1, descending=True).values.sum(0)


def highest(scores: list[Tensor], keep: int) -> list[int]:
    """How many of the `keep` highest scores over all blocks each block holds; the best unit of every block is among them.

    Args:
        scores (`list[Tensor]`): per block in descending order.
        keep (`int`): at least the number of blocks. Equal scores go to the earlier block.
    """
    guarded = torch.cat([torch.cat([s.new_full((1,), torch.inf), s[1:]]) for s in scores])
    gone = lowest(-guarded, keep)  # of the negated scores the lowest are the highest, ties by index
    return [int(part.sum()) for part in gone.split([len(s) for s in scores])]


def uniform_size(size: int, sparsity: float, multiple: int) -> int:
    """Units that a group of `size` keeps: size - round(sparsity · size), raised to a multiple.

    Raises:
        ConfigurationError: nothing would be left without, or nothing would go because of, the multiple.
    """
    keep = size - round_half_up(sparsity * size)
    if keep < 1:
        raise ConfigurationError(f"sparsity={sparsity:g} leaves none of {size} units; keep at least one")
    rounded = min(size, math.ceil(keep / multiple) * multiple)
    if rounded == size and keep < size:
        raise ConfigurationError(
            f"multiple_of={multiple} leaves nothing to remove: {keep} of {size} units are to stay. Allowed are multiples "
            f"that fit, such as multiple_of={math.gcd(keep, size)}"
        )
    return rounded


def total_size(sizes: list[int], sparsity: float, multiple: int) -> int:
    """Units that blocks of these sizes keep together: Σ size - round(sparsity · Σ size).

    Raises:
        ConfigurationError: there would not be one for every block, or the multiple leaves nothing to remove.
    """
    keep = sum(sizes) - round_half_up(sparsity * sum(sizes))
    if keep < len(sizes):
        raise ConfigurationError(
            f"sparsity={sparsity:g} leaves {keep} of {sum(sizes)} units for {len(sizes)} blocks; keep at least one in each"
        )
    steps = [(size - 1) % multiple + 1 for size in sizes if size > multiple]  # down to the next multiple
    if keep < sum(sizes) and (not steps or sum(sizes) - min(steps) < keep):
        raise ConfigurationError(
            f"multiple_of={multiple} leaves nothing to remove: {keep} of {sum(sizes)} units in {len(sizes)} blocks are to "
            "stay. Allowed are smaller multiples, such as multiple_of=1"
        )
    return keep


def round_sizes(kept: list[int], sizes: list[int], multiple: int) -> list[int]:
    """`kept` in multiples: floored, then the missing multiples by largest remainder, never less in all than before.

    A block may also stay whole, and keeps at least one multiple (or itself, where it is smaller). What blocks gain by that is
    taken from those with the smallest remainders, as long as so much can be taken.
    """
    floors = [min(size, max(multiple, keep // multiple * multiple)) for keep, size in zip(kept, sizes)]
    order = sorted(range(len(kept)), key=lambda i: (floors[i] - kept[i], i))
    missing = sum(kept) - sum(floors)
    while missing > 0:
        for i in order:
            if missing > 0 and floors[i] < sizes[i]:
                step = min(multiple, sizes[i] - floors[i])
                floors[i] += step
                missing -= step
    for i in reversed(order):
        while floors[i] > multiple and missing + (step := (floors[i] - 1) % multiple + 1) <= 0:
            floors[i] -= step
            missing += step
    return floors
