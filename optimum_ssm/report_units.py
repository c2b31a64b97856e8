# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a structured pass changes in the rows of a report, and in the masks of earlier passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .families.base import Family
from .families.matching import declared_targets
from .passes.drop_plan import DropPlan
from .passes.outcome import BlockOutcome, UnitOutcome
from .passes.unit_plan import UnitPlan
from .report import PruningReport, Row
from .report_blocks import record_drops
from .report_rows import component_of, finished_pass, kept_entries, set_removed
from .surgery.settle import is_stock


def record_units(
    report: PruningReport,
    masks: dict[str, Tensor],
    plan: UnitPlan | DropPlan,
    blocks: list[BlockOutcome],
    tokens: int,
    seconds: float,
    model: PreTrainedModel,
) -> None:
    """Add what a structured pass removed, and the pass itself.

    Args:
        report (`PruningReport`), masks (`dict[str, Tensor]`): changed in place; masks of cut parameters are
            cut, those of dropped blocks disappear.
        plan, blocks: the pass and what it did.
        tokens (`int`): calibration tokens.
        seconds (`float`): wall time.
        model (`PreTrainedModel`): after the pass, settled.
    """
    before, places = report.pruned, report.blocks
    if isinstance(plan, DropPlan):
        units = record_drops(report, masks, plan, blocks, model)
    else:
        units = _record_cuts(report, masks, plan, blocks, model)
    recount(report, masks, plan.family, model)
    done = finished_pass(plan.config, blocks, places, tokens, seconds, report.pruned - before)
    done.units = units
    report.passes.append(done)


def _record_cuts(
    report: PruningReport, masks: dict[str, Tensor], plan: UnitPlan, blocks: list[BlockOutcome], model: PreTrainedModel
) -> dict:
    """Cut the masks and name the method; what the pass says of its units."""
    rows = {row.name: row for row in report.rows}
    outcomes = [outcome for block in blocks for outcome in block.outcomes]
    names = [name for name, _ in plan.family.blocks(model)]
    for outcome in outcomes:
        for path in outcome.kept:
            name = f"{names[outcome.block]}.{path}"
            if name in masks:
                masks[name] = outcome.sliced(path, masks[name])
            rows[name].reason = outcome.reason
            rows[name].methods.append(plan.config.method)
    return _units(plan, outcomes)


def recount(report: PruningReport, masks: dict[str, Tensor], family: Family, model: PreTrainedModel) -> None:
    """Bring shapes, counts and sizes of a report in step with a model that was cut; parameters that came are added."""
    rows = {row.name: row for row in report.rows}
    targets = {target.parameter: target for target in declared_targets(family, model)}
    places = dict(zip((prefix for prefix, _ in family.blocks(model)), report.blocks))
    for name, parameter in model.named_parameters():
        if name not in rows:
            block = next((place for prefix, place in places.items() if name.startswith(f"{prefix}.")), None)
            rows[name] = Row(
                name, component_of(name), block, list(parameter.shape), 0, reason="made by the compensation"
            )
            report.rows.append(rows[name])
        row = rows[name]
        row.shape = list(parameter.shape)
        mask = masks.get(name, torch.zeros(parameter.shape, dtype=torch.bool))
        if name in targets:
            set_removed(row, mask, targets[name])
        elif row.elements:
            row.pruned = row.elements - kept_entries(mask)
    blocks = [block for _, block in family.blocks(model)]
    if report.dense_state_bytes is None:
        report.dense_state_bytes = report.recurrent_state_bytes
    states = [family.state_elements(block) for block in blocks]
    report.recurrent_state_bytes = 4 * sum(recurrent for recurrent, _ in states)
    report.conv_state_bytes = report.dtype_bytes * sum(conv for _, conv in states)
    report.sizes = [family.sizes(block) for block in _mixing(family, blocks)]
    report.loads_with = "transformers" if is_stock(model) else "optimum_ssm"


def _mixing(family: Family, blocks: list[nn.Module]) -> list[nn.Module]:
    return [block for block in blocks if family.mixer(block) is not None]


def _units(plan: UnitPlan, outcomes: list[UnitOutcome]) -> dict:
    groups = {task.block: task.axis.groups for task in plan.tasks}
    return {
        "axis": plan.axis,
        "before": [outcome.units for outcome in outcomes],
        "kept": [outcome.units - len(outcome.removed) for outcome in outcomes],
        "removed": [outcome.removed for outcome in outcomes],
        "groups": [groups[outcome.block] for outcome in outcomes],
    }
