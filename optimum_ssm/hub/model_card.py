# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that the Hub understands, and a text that says what was done, measured and not gained."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel

from ..calibration.data import FILE_BUILDERS
from ..calibration.offload import read_parameter
from ..configuration import SSMPrunerConfig
from ..report import PruningReport
from ..version import __version__


def write_card(
    path: Path,
    model: PreTrainedModel,
    recipe: list[SSMPrunerConfig],
    report: PruningReport,
    license: str | None,
    picture: str | None,
    code: bool = False,
) -> None:
    """Write the card of a pruned model to `path`, replacing what is there.

    Args:
        path (`Path`): the README.md.
        model (`PreTrainedModel`): the pruned model.
        recipe (`list[SSMPrunerConfig]`): the passes.
        report (`PruningReport`): table and perplexities.
        license (`str`, *optional*): the base model's licence identifier.
        picture (`str`, *optional*): file name of the picture beside the card.
        code (`bool`): whether the modelling code lies beside the weights.
    """
    environment = Environment(
        loader=PackageLoader("optimum_ssm", "hub"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    text = environment.get_template("model_card.jinja").render(
        metadata=card_metadata(path.parent.name, model, recipe, report, license).to_yaml(),
        base=report.model,
        base_is_hub_id=is_hub_id(report.model),
        architecture=type(model).__name__,
        model_type=report.model_type,
        report=report,
        table=report.to_markdown(),
        passes=[config.to_dict() for config in recipe],
        fills=_fills(model, recipe, report),
        picture=picture,
        code=code,
        has_tokenizer=(path.parent / "tokenizer_config.json").is_file(),
        version=__version__,
    )
    path.write_text(text, encoding="utf-8")


def card_metadata(
    name: str, model: PreTrainedModel, recipe: list[SSMPrunerConfig], report: PruningReport, license: str | None
) -> ModelCardData:
    """The YAML block of the card: tags, base model, data sets, and the measured perplexities as a model index."""
    patterns = ["pruned"] if report.pruned else []
    patterns += (["structured"] if report.sizes else []) + (["sparse"] if report.masked else [])
    tags = ["optimum-ssm", *patterns, report.model_type, *dict.fromkeys(c.method for c in recipe)]
    used = [c.dataset for c, done in zip(recipe, report.passes) if done.tokens and isinstance(c.dataset, str)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=found["dataset"].split()[0],
            dataset_name=found["dataset"],
            metric_type="perplexity",
            metric_name=f"perplexity per token, {stage}, {found['windows']} windows of {found['window']} tokens",
            metric_value=round(found["perplexity"], 4),
        )
        for stage, found in report.perplexity.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=report.model if is_hub_id(report.model) else None,
        base_model_relation="finetune" if is_hub_id(report.model) else None,  # the Hub knows no "pruned"
        license=license,
        datasets=[HUB_NAMES.get(name, name) for name in dict.fromkeys(used) if is_hub_id(HUB_NAMES.get(name, name))]
        or None,
        tags=tags,
        model_name=os.path.basename(report.model.rstrip("/")) + " pruned" * bool(report.pruned) if results else None,
        eval_results=results or None,
    )


HUB_NAMES = {"wikitext2": "Salesforce/wikitext", "wikitext103": "Salesforce/wikitext", "c4": "allenai/c4"}


def is_hub_id(name: str) -> bool:
    """Whether a model or dataset name is a Hub id `owner/name`, not a path of this machine or another one."""
    is_path = name.startswith((".", "/", "~")) or Path(name).suffix.lower() in FILE_BUILDERS or os.path.exists(name)
    return name.count("/") == 1 and not is_path


def _fills(model: PreTrainedModel, recipe: list[SSMPrunerConfig], report: PruningReport) -> dict[str, list[float]]:
    """What removed entries of `A_log` hold, by name of the fill: passes may differ, and not every pass touches `A_log`."""
    rows = [row for row in report.rows if row.component == "A_log" and row.pruned and not row.dropped]
    weights = [read_parameter(model, row.name) for row in rows]
    found: dict[str, set[float]] = {}
    for config in recipe if weights else ():
        value = 0.0 if config.a_log_fill == "zero" else float(config.memoryless_value)
        if any((weight == torch.tensor(value).to(weight)).any() for weight in weights):
            found.setdefault(config.a_log_fill, set()).add(value)
    return {name: sorted(values) for name, values in sorted(found.items())}
