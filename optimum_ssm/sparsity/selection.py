# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Scores to masks, with an exact count: the one place where it is decided which entries go."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .pattern import Pattern


MANY_ROWS = 16  # from so many on, `lowest_of_each` selects in each row on a GPU, which is faster than sorting them


def round_half_up(value: float) -> int:
    """`floor(value + 0.5)`: the count that a budget of `value` entries means. Python's `round` would go to even."""
    return math.floor(value + 0.5)


def split_evenly(total: int, sizes: list[int]) -> list[int]:
    """`total` spread over parts in proportion to their `sizes`, whole numbers, summing exactly to `total`.

    Largest remainders are rounded up first, ties to the first part.
    """
    shares = [total * size / sum(sizes) for size in sizes]
    counts = [math.floor(share) for share in shares]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class Selection:
    """How many entries of one tensor go and which of them compete with each other.

    Args:
        count (`int`): entries to remove from the whole tensor; ignored by N:M, whose pattern fixes it.
        scope (`str`): `"tensor"`: all entries compete; `"row"`: only those of the same row (output).
        pattern (`Pattern`): unstructured or N:M.
    """

    count: int
    scope: str = "tensor"
    pattern: Pattern = Pattern()

    def narrow(self, count: int) -> Selection:
        """The same rule for a part of the tensor that loses `count` entries."""
        return replace(self, count=count)

    def mask(self, scores: Tensor) -> Tensor:
        """The entries to remove: `True` where `scores` are lowest, as many as the budget says.

        Equal scores go in the order of the flat index, so that the same scores give the same mask on any machine.

        Args:
            scores (`Tensor`): (out, in), or (n) for a vector; higher means keep; any float dtype.

        Returns:
            `Tensor`: bool, shape of `scores`, `True` = pruned; exactly `count` of them (N:M: exactly the pattern's).

        Raises:
            ValueError: scores hold NaN, `count` is out of range, or rows do not split into groups of the pattern.
        """
        if torch.isnan(scores).any():
            raise ValueError("scores hold NaN")
        return self.unchecked_mask(scores)

    def unchecked_mask(self, scores: Tensor) -> Tensor:
        """`mask` of scores that are not looked at first: on an accelerator nothing here waits for the device. Where they hold
        NaN, other entries may be removed, and fewer."""
        if self.pattern.is_n_m:
            return _n_m_mask(scores, self.pattern)
        if not 0 <= self.count <= scores.numel():
            raise ValueError(f"cannot remove {self.count} of {scores.numel()} entries")
        if self.scope == "row" and scores.dim() > 1:
            return _row_mask(scores, self.count)
        return lowest(scores, self.count)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores over all entries; ties by flat index."""
    return lowest_of_each(scores.reshape(1, -1), count).reshape(scores.shape)


def lowest_of_each(scores: Tensor, count: int) -> Tensor:
    """Mask of the `count` lowest scores of every row of a matrix; ties by index."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":
        return _lowest_by_threshold(scores, count)
    # torch refuses kthvalue on a GPU where it is told to be deterministic, because of the indices, which are not used here
    select = len(scores) >= MANY_ROWS and not torch.are_deterministic_algorithms_enabled()
    return (_lowest_by_selecting if select else _lowest_by_sorting)(scores, count)


def _lowest_by_sorting(scores: Tensor, count: int) -> Tensor:
    """For accelerators: nothing here waits for the device."""
    order = (scores + 0.0).sort(dim=-1, stable=True).indices  # + 0: no zero is below another one
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def _lowest_by_selecting(scores: Tensor, count: int) -> Tensor:
    """For many rows on accelerators, which select in each on a processor of its own: a few reads in place of a sort. Nothing
    here waits for the device either."""
    threshold = scores.kthvalue(count, dim=-1, keepdim=True).values
    mask, equal = scores < threshold, scores == threshold
    wanted = count - mask.sum(-1, keepdim=True)
    return mask | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))


def _lowest_by_threshold(scores: Tensor, count: int) -> Tensor:
    """For main memory, where numpy selects several times faster than torch sorts."""
    threshold = _partitioned(scores, count - 1)[..., count - 1 : count].to(scores.dtype)
    return _up_to(scores, threshold, count)


def _partitioned(scores: Tensor, place: int) -> Tensor:
    """Scores in main memory, each row in an order that has at `place` what a sort would put there, and none higher before."""
    values = scores.detach() if scores.dtype in (torch.float32, torch.float64) else scores.detach().float()
    return torch.from_numpy(np.partition(values.numpy(), place))


def _up_to(scores: Tensor, threshold: Tensor, count: int | Tensor) -> Tensor:
    """Mask of all scores below their row's threshold and of the first that equal it, up to `count` of a row."""
    mask, equal = scores < threshold, scores == threshold
    wanted = count - mask.sum(-1, keepdim=True)
    if len(scores) == 1:  # a whole tensor, or all of them: no counter for every entry
        equal[0, equal[0].nonzero().squeeze(1)[int(wanted) :]] = False
    elif (tied := equal.sum(-1) > wanted.squeeze(-1)).any():
        equal[tied] &= equal[tied].cumsum(-1) <= wanted[tied]
    return mask | equal


def _row_mask(scores: Tensor, count: int) -> Tensor:
    """Every row loses floor(count / rows); the rest goes to the rows whose next score is lowest."""
    base, extra = divmod(count, len(scores))
    if scores.device.type == "cpu":
        return _row_mask_by_threshold(scores, base, extra)
    order = scores.argsort(dim=1, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, order[:, :base], True)
    if extra:
        following = order[:, base]
        richer = scores.gather(1, following[:, None]).squeeze(1).argsort(stable=True)[:extra]
        mask[richer, following[richer]] = True
    return mask


def _row_mask_by_threshold(scores: Tensor, base: int, extra: int) -> Tensor:
    """`base` of every row and one more of `extra` rows, in main memory."""
    if not extra:
        return lowest_of_each(scores, base)
    values = _partitioned(scores, base)  # one place: numpy takes several times as long for two
    following = values[:, base]
    last = values[:, :base].amax(1) if base else torch.full_like(following, -math.inf)
    richer = torch.zeros(len(scores), dtype=torch.bool)
    richer[following.argsort(stable=True)[:extra]] = True
    threshold = torch.where(richer, following, last).to(scores.dtype)
    return _up_to(scores, threshold[:, None], (base + richer.long())[:, None])


def _n_m_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    if scores.dim() != 2 or not pattern.fits(scores.shape[1]):
        raise ValueError(f"shape {tuple(scores.shape)} has no rows that split into groups of {pattern.group}")
    columns = scores.reshape(scores.shape[0], -1, pattern.group).unbind(2)
    mask = torch.empty(*columns[0].shape, pattern.group, dtype=torch.bool, device=scores.device)
    for j, own in enumerate(columns):  # ranks by comparison: several times faster than sorting short groups
        rank = torch.zeros_like(own, dtype=torch.int16)
        for i, other in enumerate(columns):
            if i != j:
                rank += other <= own if i < j else other < own
        mask[..., j] = rank < pattern.group - pattern.keep
    return mask.reshape(scores.shape)
