# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's sparsity by component, counted from the weights themselves."""

from __future__ import annotations

import os
from typing import Any

from ..families import family_of
from ..families.matching import declared_targets
from ..hub.checkpoint import LOCATION, load_model, load_settings
from ..report import PruningReport
from ..report_rows import masks_from_weights, model_report, origin, set_removed


def inspect_checkpoint(source: str | os.PathLike, **kwargs: Any) -> PruningReport:
    """Count what a checkpoint holds, whoever pruned it.

    Zeros in weights of products count as removed; in `A_log` only what this library's settings file says it filled.

    Args:
        source (`str` or `os.PathLike`): Hub id or directory.
        **kwargs: passed to `from_pretrained`.

    Returns:
        `PruningReport`: without passes; with the perplexities that were measured when the checkpoint was made.

    Raises:
        CheckpointError, ConfigurationError: the checkpoint cannot be read, or its family is not supported.
    """
    model, _ = load_model(source, **kwargs)
    family = family_of(model)
    report = model_report(model, family)
    report.model = origin(os.fspath(source))
    settings = load_settings(source, **{name: kwargs[name] for name in LOCATION if name in kwargs})
    recipe, made = settings if settings is not None else ([], None)
    masks = masks_from_weights(model, family, made, recipe)
    rows = {row.name: row for row in report.rows}
    for target in declared_targets(family, model):
        row = rows[target.parameter]
        row.reason = "not removed"
        if target.parameter in masks:
            set_removed(row, masks[target.parameter], target)
    for name in masks.keys() - {target.parameter for target in declared_targets(family, model)}:
        rows[name].pruned = int(masks[name].count_nonzero())
    if made is not None:
        report.perplexity = made.perplexity
    return report
