# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The assignment problem: which column goes with which row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assignment(gain: Tensor) -> Tensor:
    """The permutation with the largest sum of gains, by shortest augmenting paths (Jonker and Volgenant 1987), O(n³).

    Args:
        gain (`Tensor`): (n, n), finite.

    Returns:
        `Tensor`: int64, (n): the column of every row.
    """
    cost = -gain.detach().double().cpu().numpy()
    n = len(cost)
    row_price, column_price = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # of every column; the last one is a column for the row that is being placed
    for row in range(n):
        row_of[n] = row
        column, least = n, np.full(n, np.inf)
        before, reached = np.full(n, n), np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:
            reached[column] = True
            current = row_of[column]
            open_columns = ~reached[:n]
            reduced = cost[current] - row_price[current] - column_price[:n]
            shorter = open_columns & (reduced < least)
            least[shorter], before[shorter] = reduced[shorter], column
            nearest = int(np.where(open_columns, least, np.inf).argmin())
            step = least[nearest]
            row_price[row_of[reached]] += step
            column_price[reached] -= step
            least[open_columns] -= step
            column = nearest
        while column != n:  # every column on the path takes the row of the one before it
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    result = np.empty(n, dtype=np.int64)
    result[row_of[:n]] = np.arange(n)
    return torch.from_numpy(result)
