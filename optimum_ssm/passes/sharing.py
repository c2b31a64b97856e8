# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The tasks of one block shared out over processes: each is solved once, and its result broadcast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..calibration.ranks import Ranks
from ..errors import CalibrationError
from .outcome import Outcome
from .work import Place, Values, Work


def apply_tasks(work: Work, place: Place, tasks: Sequence[Any], values: Mapping[Any, Values], ranks: Ranks) -> list:
    """Do the tasks of a block. At the end every process holds the same block and the same outcomes, bit for bit.

    Where the tasks are independent, each is done by one process, so that costs are balanced. Otherwise all processes do
    all of them on the same reduced statistics, and the main one's block is broadcast.

    Args:
        work (`Work`): what is done.
        place (`Place`): the block.
        tasks (`Sequence`): its tasks, in the order in which outcomes are wanted.
        values (`Mapping`): the finished statistics of each.
        ranks (`Ranks`): the processes.

    Raises:
        CalibrationError: in every process, whichever of them could not do its task.
    """
    if ranks.alone or not work.independent:
        outcomes = [work.apply(place, task, values[task]) for task in tasks]
        work.settle()
        outcomes = [outcome.at_home() for outcome in outcomes]
        if outcomes and not ranks.alone:
            ranks.align_(place.block)
        return outcomes
    owners = share_out([work.cost(task, values[task]) for task in tasks], ranks.count)
    done, failure = {}, None
    try:
        for number, (task, owner) in enumerate(zip(tasks, owners)):
            if owner == ranks.index:
                done[number] = work.apply(place, task, values[task])
        work.settle()
    except CalibrationError as error:
        failure = str(error)
    ranks.agree(failure)
    errors = {number: outcome.error for number, outcome in done.items()}
    found = ranks.gather({number: None if error is None else float(error) for number, error in errors.items()})
    outcomes = []
    for number, (task, owner) in enumerate(zip(tasks, owners)):
        entries = work.entries(task)
        mask = done[number].mask if owner == ranks.index else entries.new_empty(entries.shape, dtype=torch.bool)
        ranks.broadcast_(entries, owner)
        outcomes.append(Outcome(task.target, ranks.broadcast_(mask, owner), found[owner][number]).at_home())
    return outcomes


def share_out(costs: Sequence[float], count: int) -> list[int]:
    """An owner for every task: the dearest first, each to the process with the least to do so far."""
    load, owners = [0.0] * count, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        owners[number] = min(range(count), key=lambda rank: (load[rank], rank))
        load[owners[number]] += costs[number]
    return owners
