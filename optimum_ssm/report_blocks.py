# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a pass over whole blocks changes in the rows of a report, and in the masks of earlier passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .families.base import Family
from .passes.drop_plan import BLOCK, DropPlan
from .passes.outcome import BlockOutcome, DropOutcome, UnitOutcome
from .report import PruningReport
from .report_rows import NOT_TARGETED
from .surgery.drop import renumbered, split_name


DROPPED = "dropped"  # no parameter's name begins with it
BLOCK_GONE = "its block was dropped"
SSM_GONE = "of an SSM that was dropped (y = x); stock classes keep the shape"
SKIP_ONLY = "set to 1: the skip connection stands for the dropped SSM"


def record_drops(
    report: PruningReport,
    masks: dict[str, Tensor],
    plan: DropPlan,
    blocks: list[BlockOutcome],
    model: PreTrainedModel,
) -> dict[str, Any]:
    """Put dropped blocks or SSMs into the rows and masks; counts of what is still there are the caller's.

    Rows of a dropped block stay, under a name that no parameter has, such as `dropped.backbone.layers.3.mixer.D` for
    block 3 of the dense model. Rows and masks of the later blocks take the new names of their parameters.

    Args:
        report (`PruningReport`), masks (`dict[str, Tensor]`): changed in place.
        plan, blocks: the pass and what it did, one entry per block that there was.
        model (`PreTrainedModel`): after the pass.

    Returns:
        `dict[str, Any]`: what the pass says of its units: `axis`, `unit`, how many there were `before` and are `kept`,
        which blocks of the dense model lost theirs (`removed`, ascending; `order`, as they went) and the keep-score that
        each had then (`scores`; by perplexity: the calibration perplexity without it).
    """
    outcomes = sorted((outcome for block in blocks for outcome in block.outcomes), key=lambda outcome: outcome.rank)
    places = report.blocks
    if plan.unit == BLOCK:
        _remove(report, masks, plan, [outcome.block for outcome in outcomes], model)
    else:
        _mute(report, masks, plan, outcomes, model)
    order = [places[outcome.block] for outcome in outcomes]
    return {
        "axis": plan.axis,
        "unit": plan.unit,
        "before": [len(plan.tasks)],
        "kept": [len(plan.tasks) - len(outcomes)],
        "removed": [sorted(order)],
        "order": order,
        "scores": [outcome.score for outcome in outcomes],
    }


def _remove(
    report: PruningReport, masks: dict[str, Tensor], plan: DropPlan, gone: list[int], model: PreTrainedModel
) -> None:
    places, prefix = report.blocks, _prefix(plan.family, model)
    kept = [index for index in range(len(places)) if index not in gone]
    for row in report.rows:
        name = renumbered(row.name, prefix, kept)
        if name is not None:
            if row.reason == NOT_TARGETED and split_name(name, prefix)[0] is not None:
                row.reason = UnitOutcome.reason
            row.name = name
            continue
        index, local = split_name(row.name, prefix)
        row.name = f"{DROPPED}.{prefix}.{places[index]}{local}"
        row.shape, row.pruned, row.reason, row.error = [0], row.elements, BLOCK_GONE, None
        row.methods.append(plan.config.method)
        row.segments = {segment: [count, count] for segment, (count, _) in row.segments.items()}
    earlier = dict(masks)
    masks.clear()
    masks.update({name: mask for old, mask in earlier.items() if (name := renumbered(old, prefix, kept)) is not None})


def _mute(
    report: PruningReport,
    masks: dict[str, Tensor],
    plan: DropPlan,
    outcomes: list[DropOutcome],
    model: PreTrainedModel,
) -> None:
    rows, blocks = {row.name: row for row in report.rows}, plan.family.blocks(model)
    for outcome in outcomes:
        prefix = blocks[outcome.block][0]
        for path, mask in outcome.zeroed.items():
            row = rows[f"{prefix}.{path}"]
            earlier = masks.setdefault(row.name, torch.zeros_like(mask))
            masks[row.name] = earlier | mask
            row.methods.append(plan.config.method)
            row.reason, row.error = SSM_GONE, None
        rows[f"{prefix}.{plan.family.mixer_name}.D"].reason = SKIP_ONLY


def _prefix(family: Family, model: PreTrainedModel) -> str:
    return family.blocks(model)[0][0].rpartition(".")[0]
