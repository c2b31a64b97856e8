# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Rows of a report from a model, and what one pass changes in them."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .calibration.offload import read_parameter
from .configuration import SSMPrunerConfig
from .families.base import Family
from .families.matching import Target, declared_targets
from .passes.outcome import BlockOutcome
from .passes.plan import Plan
from .report import HIGHER_SCORES, Pass, PruningReport, Row


NOT_TARGETED = "prunable, not among the targets"


def model_report(model: PreTrainedModel, family: Family) -> PruningReport:
    """The report of a model that nothing was removed from: every parameter is a row, tied ones once."""
    declared = {target.parameter: target for target in declared_targets(family, model)}
    blocks = family.blocks(model)
    rows = []
    tied = _tied_names(model)
    for name, parameter in model.named_parameters():
        target = declared.get(name)
        reason = NOT_TARGETED if target else family.kept_reason(name) + tied.get(name, "")
        block = next((i for i, (prefix, _) in enumerate(blocks) if name.startswith(prefix + ".")), None)
        row = Row(name, component_of(name, target), block, list(parameter.shape), parameter.numel(), reason=reason)
        if target is not None:
            width = parameter[0].numel()
            row.segments = {part: [(b - a) * width, 0] for part, (a, b) in target.weight.segments.items()}
        rows.append(row)
    states = [family.state_elements(block) for _, block in blocks]
    itemsize = next(model.parameters()).element_size()
    return PruningReport(
        model=origin(model.config.name_or_path or type(model).__name__),
        model_type=model.config.model_type,
        dtype_bytes=itemsize,
        recurrent_state_bytes=4 * sum(recurrent for recurrent, _ in states),
        conv_state_bytes=itemsize * sum(conv for _, conv in states),
        rows=rows,
    )


def origin(source: str) -> str:
    """A Hub id as it is; a directory by its name alone, written so that it cannot be taken for a Hub id."""
    return os.path.join(".", os.path.basename(os.path.abspath(source))) if os.path.isdir(source) else source


def record_weights(
    report: PruningReport,
    masks: dict[str, Tensor],
    plan: Plan,
    blocks: list[BlockOutcome],
    tokens: int,
    seconds: float,
) -> None:
    """Add what a pass removed to the rows and to `masks`, and the pass itself to the list.

    Args:
        report (`PruningReport`): changed in place.
        masks (`dict[str, Tensor]`): parameter name to bool mask in main memory, `True` = removed; changed in place.
        plan, blocks: the pass and what it did.
        tokens (`int`): calibration tokens.
        seconds (`float`): wall time.
    """
    rows = {row.name: row for row in report.rows}
    before = report.pruned
    targeted = {(task.target.parameter, task.target.segment) for task in plan.tasks}
    for outcome in (outcome for block in blocks for outcome in block.outcomes):
        target = outcome.target
        row = rows[target.parameter]
        mask = masks.setdefault(target.parameter, torch.zeros(row.shape, dtype=torch.bool))
        mask[target.rows] |= outcome.mask
        set_removed(row, mask, target)
        row.reason = HIGHER_SCORES
        untouched = [n for n, (_, gone) in row.segments.items() if target.segment is not None and not gone]
        if untouched := [name for name in untouched if (target.parameter, name) not in targeted]:
            row.reason += f"; {', '.join(untouched)} not among the targets"
        row.error = outcome.error
        if row.methods[-1:] != [plan.config.method]:
            row.methods.append(plan.config.method)
    for label, reason in plan.unfit.items():
        for row in report.rows:
            stem = row.name.removesuffix(".weight")
            if (label == stem or label.startswith(f"{stem}.")) and not row.pruned:
                row.reason = reason
    report.passes.append(finished_pass(plan.config, blocks, report.blocks, tokens, seconds, report.pruned - before))


def finished_pass(
    config: SSMPrunerConfig, blocks: list[BlockOutcome], places: list[int], tokens: int, seconds: float, removed: int
) -> Pass:
    """The entry of a pass in the report. `places`: the block of the dense model that each block was."""
    found = {places[block.index]: block for block in blocks}
    outcomes = [found.get(index) for index in range(max(found, default=-1) + 1)]
    tuned = [None if block is None or block.reconstruction is None else block.reconstruction for block in outcomes]
    errors = [None if block is None else block.error for block in outcomes]
    done = Pass(config.to_dict(), seconds, tokens, errors, removed=removed, blocks=len(blocks))
    done.reconstruction_seconds = sum(values[2] for values in tuned if values is not None)
    if any(tuned):
        done.reconstruction = [None if values is None else list(values[:2]) for values in tuned]
    return done


def component_of(name: str, target: Target | None = None) -> str:
    """Short name of a parameter that blocks share."""
    if target is not None:
        return target.weight.name
    parts = [part for part in name.split(".") if not part.isdigit()]
    leaf = parts[-1] if parts[-1] != "weight" else parts[-2]
    if leaf == "bias":
        return f"{parts[-2]}.bias"
    return "mixer.norm" if leaf == "norm" and "mixer" in parts else leaf


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """For parameters that others are tied to: the note that they are counted once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: f", tied with {', '.join(group[1:])}" for group in names.values() if len(group) > 1}


def set_removed(row: Row, mask: Tensor, target: Target) -> None:
    """Count the removed entries of a whole weight into its row, by segment too: `True` in `mask`, or not there any more."""
    row.pruned = row.elements - kept_entries(mask)
    for name, (start, stop) in target.weight.segments.items():
        row.segments[name][1] = row.segments[name][0] - kept_entries(mask[start:stop])


def kept_entries(mask: Tensor) -> int:
    """How many entries of a mask are not `True`; ten times as fast in main memory as a sum of bools."""
    return mask.numel() - int(mask.count_nonzero())


def masks_from_weights(
    model: PreTrainedModel, family: Family, report: PruningReport | None, recipe: list[SSMPrunerConfig]
) -> dict[str, Tensor]:
    """Masks of a loaded model: the entries that hold what a removed one is filled with.

    In weights of products that is 0. In `A_log` a zero is no removal by itself: there the recipe says what the fill was,
    and only where the report says that something was removed. A kept entry that happens to hold the fill is taken for
    removed.

    Args:
        model (`PreTrainedModel`), family (`Family`): the loaded model and its description.
        report (`PruningReport`, *optional*), recipe (`list[SSMPrunerConfig]`): what the checkpoint says of itself.
    """
    fills = [0.0 if config.a_log_fill == "zero" else config.memoryless_value for config in recipe]
    removed = {row.name for row in report.rows if row.masked} if report is not None else set()
    masks = {}
    declared = {target.parameter: target for target in declared_targets(family, model)}
    for target in declared.values():
        weight = read_parameter(model, target.parameter)
        if target.weight.kind != "a_log":
            masks[target.parameter] = weight == 0
        elif target.parameter in removed:
            masks[target.parameter] = torch.isin(weight, torch.tensor(fills, dtype=weight.dtype))
    for row in report.rows if report is not None else ():  # such as the bias that belongs to a dropped SSM
        if row.masked and row.name not in declared:
            masks[row.name] = model.get_parameter(row.name).detach().cpu() == 0
    return {name: mask for name, mask in masks.items() if mask.any()}
