# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Ratios to whole numbers of weights that meet a budget to the weight."""

from __future__ import annotations

import math


def exact_counts(ratios: list[float], sizes: list[int], total: int) -> list[int]:
    """Entries to remove from each part so that exactly `total` go.

    Ratios are clipped to [0, 1]; one common offset, found by bisection, brings them to the budget; the counts are
    rounded by largest remainder, ties to the first part.

    Args:
        ratios (`list[float]`): wished share of each part to remove.
        sizes (`list[int]`): entries in each part.
        total (`int`): entries to remove from all parts together, at most their sum.
    """
    if not 0 <= total <= sum(sizes):
        raise ValueError(f"cannot remove {total} of {sum(sizes)} entries")

    def shares(offset: float) -> list[float]:
        return [min(1.0, max(0.0, ratio + offset)) * size for ratio, size in zip(ratios, sizes)]

    low, high = -1.0 - max(ratios), 1.0 - min(ratios)
    if abs(sum(shares(0.0)) - total) <= 0.5:
        low = high = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) < total else (low, middle)
    wished = shares((low + high) / 2)
    counts = [math.floor(share) for share in wished]
    order = sorted(range(len(sizes)), key=lambda i: (counts[i] - wished[i], i))
    missing = total - sum(counts)
    while missing:
        step = 1 if missing > 0 else -1
        for i in order if step > 0 else reversed(order):
            if missing and 0 <= counts[i] + step <= sizes[i]:
                counts[i] += step
                missing -= step
    return counts
