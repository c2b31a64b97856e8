# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which component can be pruned how far: one model pruned by every combination of method, budget and component."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from accelerate.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.data import calibration_blocks, load_text, tokenize
from ..configuration import SSMPrunerConfig
from ..errors import CalibrationError, ConfigurationError
from ..families import family_of
from ..pruner import SSMPruner
from ..report_rows import origin
from ..version import __version__
from .comparison_cells import ALL, MATCHING, Cell, make_cells
from .comparison_table import FAILED, IMPOSSIBLE, MEASURED, Comparison, ComparisonRow
from .perplexity import Perplexity, dataset_label, measure_perplexity


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: list[str],
    budgets: list[str],
    components: list[str] | None = None,
    *,
    a_log_fill: Iterable[str] = (MATCHING,),
    calibration: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    known: Callable[[dict[str, str]], list[ComparisonRow]] | None = None,
    on_row: Callable[[Comparison], None] | None = None,
) -> Comparison:
    """Prune a dense model by every method, budget and component, and measure the perplexity of each result.

    The dense weights are kept in main memory and put back after every cell; at the end the model is as it was. A
    combination that a method, a pattern or the model refuses becomes a row with the reason.

    Args:
        model (`PreTrainedModel`): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for texts.
        methods (`list[str]`): methods with options: `wanda`, `sparsessm:v1`, `magnitude:largest`,
            `sparsegpt:allocation=owl,scope=row`.
        budgets (`list[str]`): sparsities such as `0.5` and N:M patterns.
        components (`list[str]`, *optional*): target names or globs, each pruned alone; a comma joins several into one
            component; `all` is the method's own default targets. Default: every prunable weight of the model, and `all`.
        a_log_fill: what removed entries of A_log hold: `memoryless`, `zero`, or `matching`, the one whose damage the
            method estimates (memoryless where it estimates neither).
        calibration (`dict`, *optional*): config fields of the calibration: `dataset`, `dataset_name`, `dataset_split`,
            `text_column`, `num_samples`, `seq_len`, `batch_size`, `seed`.
        evaluation (`dict`, *optional*): arguments of `measure_perplexity`, with `dataset`.
        known (`Callable`, *optional*): gets the settings, returns the rows that need not be computed again.
        on_row (`Callable`, *optional*): gets the table after every new row.

    Returns:
        `Comparison`: settings and rows.

    Raises:
        ConfigurationError: a name, a number or a dataset can never be used, or the dense perplexity is not that of the
            known rows.
        CalibrationError: a text is too short, or belongs to another tokenizer.
    """
    family = family_of(model)
    calibration, evaluation = dict(calibration or {}), dict(evaluation or {})
    cells = make_cells(
        model, family, list(methods), list(map(str, budgets)), components, list(a_log_fill), calibration
    )
    text = SSMPrunerConfig(sparsity=0.5, **calibration)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    needed = any(cell.plan is not None and cell.plan.needs_text for cell in cells)
    blocks = calibration_blocks(text, tokenizer, vocabulary) if needed else None
    measure = _measure(model, tokenizer, evaluation)
    bar = tqdm(total=len(cells) + 1, desc="Comparing", unit="cell", disable=not sys.stderr.isatty())
    with _one_bar():
        bar.set_postfix_str("dense")
        dense = measure()
        bar.update()
        settings = _settings(model, text, dense)
        rows = {row.key: row for row in known(settings) if row.status != IMPOSSIBLE} if known is not None else {}
        _check_dense(rows.values(), dense)
        weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
        table: list[ComparisonRow] = []
        for cell in cells:
            bar.set_postfix_str(f"{cell.method} {cell.component} {cell.budget}")
            key = (cell.method, cell.budget, cell.component, cell.fill)
            if key in rows:
                table.append(rows[key])
            elif cell.plan is None:
                table.append(ComparisonRow(*key, IMPOSSIBLE, dense=dense.perplexity, reason=cell.reason))
            else:
                try:
                    table.append(_fill(model, tokenizer, cell, blocks, dense.perplexity, measure))
                finally:
                    _restore(model, weights)
            if on_row is not None and key not in rows:
                on_row(Comparison(settings, list(table)))
            bar.update()
    bar.close()
    return Comparison(settings, table)


def _measure(model: PreTrainedModel, tokenizer: Any, evaluation: dict[str, Any]) -> Callable[[], Perplexity]:
    """The perplexity of the model as it is, on a text that is read and tokenised once."""
    dataset = evaluation.pop("dataset", "wikitext2")
    where = {"name": evaluation.pop("dataset_name", None), "split": evaluation.pop("split", "test")}
    column = evaluation.pop("text_column", "text")
    if isinstance(dataset, (Tensor, list)):
        return lambda: measure_perplexity(model, dataset, **evaluation)
    ids = tokenize(load_text(dataset, column=column, **where), tokenizer)
    return lambda: measure_perplexity(model, ids, dataset_label(dataset, where["split"]), **evaluation)


def _settings(model: PreTrainedModel, text: SSMPrunerConfig, dense: Perplexity) -> dict[str, str]:
    """Everything that a row depends on and that its key does not name."""
    device = model.get_input_embeddings().weight.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = text.to_dict()
    is_file = isinstance(text.dataset, (str, os.PathLike)) and os.path.exists(text.dataset)
    split = None if is_file or not isinstance(text.dataset, str) else f"split {text.dataset_split or 'train'}"
    parts = (found["dataset"], found["dataset_name"], split)
    return {
        "model": origin(model.config.name_or_path or type(model).__name__),
        "evaluation": dense.protocol,
        "calibration": ", ".join(map(str, filter(None, parts)))
        + f", {text.num_samples} x {text.seq_len} tokens, seed {text.seed}, batch size {text.batch_size}",
        "device": kind,
        "version": f"optimum_ssm {__version__}",
    }


def _check_dense(rows: Iterable[ComparisonRow], dense: Perplexity) -> None:
    for row in rows:
        if row.dense is not None and abs(row.dense - dense.perplexity) > 1e-4 * dense.perplexity:
            raise ConfigurationError(
                f"the table holds rows of a model whose dense perplexity was {row.dense:.4f}, this one's is "
                f"{dense.perplexity:.4f}: the model changed; give another output"
            )


def _fill(
    model: PreTrainedModel,
    tokenizer: Any,
    cell: Cell,
    blocks: Tensor | None,
    dense: float,
    measure: Callable[[], Perplexity],
) -> ComparisonRow:
    plan = cell.plan
    assert plan is not None
    shared = {} if blocks is None else {"dataset": blocks, "num_samples": len(blocks)}  # read and cut only once
    config = SSMPrunerConfig.from_record({**vars(plan.config), **shared})
    entries = sum(task.size for task in plan.tasks)
    key = (cell.method, cell.budget, cell.component, cell.fill)
    unfit: dict[tuple[str, str], int] = {}
    for label, reason in plan.unfit.items():
        short = label.rpartition(".mixer.")[2]
        unfit[short, reason] = unfit.get((short, reason), 0) + 1
    kept = "; ".join(f"{count} {name} kept: {reason}" for (name, reason), count in unfit.items())
    row = {"entries": entries, "dense": dense}
    try:
        report = SSMPruner(model, tokenizer, config).prune()
        done = report.passes[-1]
        row |= {"removed": done.removed, "of_model": report.sparsity, "seconds": done.seconds}
        return ComparisonRow(*key, MEASURED, **row, perplexity=measure().perplexity, reason=kept)
    except CalibrationError as error:
        return ComparisonRow(*key, FAILED, **row, reason=str(error))


@torch.no_grad()
def _restore(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        value.copy_(weights[name])


@contextmanager
def _one_bar() -> Iterator[None]:
    """Inner progress bars ask stderr whether it is a terminal; here it says no, and the outer bar is the only one."""

    class Quiet(io.TextIOBase):
        def __init__(self, stream: Any):
            self.stream = stream

        def write(self, text: str) -> int:
            return self.stream.write(text)

        def flush(self) -> None:
            self.stream.flush()

        def isatty(self) -> bool:
            return False

    with redirect_stderr(Quiet(sys.stderr)):
        yield


__all__ = ["ALL", "MATCHING", "Comparison", "ComparisonRow", "compare"]
