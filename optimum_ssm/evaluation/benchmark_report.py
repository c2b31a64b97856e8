# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found: facts of every model, measurements, and both as Markdown, CSV, JSON and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import CheckpointError
from ..report import drawing, table


BENCHMARK_VERSION = 1
OUT_OF_MEMORY = "out of memory"


@dataclass
class ModelFacts:
    """What a model costs before it runs.

    Args:
        name (`str`): the model's name in the report.
        dtype (`str`): dtype of its parameters.
        parameters (`int`): entries of all parameters, tied ones once.
        weight_bytes (`int`): bytes of the weights, and
        weight_source (`str`): what was counted: `"files"` on disk or `"parameters in memory"` (tied ones once).
        recurrent_state_bytes, conv_state_bytes (`int`): bytes of one sequence's cache, as the model allocates it.
        scan, conv, state_update (`str`): implementation of the scan (prefill), of the convolution and of the decode step.
    """

    name: str
    dtype: str
    parameters: int
    weight_bytes: int
    weight_source: str
    recurrent_state_bytes: int
    conv_state_bytes: int
    scan: str
    conv: str
    state_update: str


@dataclass
class Measurement:
    """One model in one phase at one batch size.

    Args:
        model (`str`): name of the model.
        phase (`str`): `"prefill"` or `"decode"`.
        batch_size (`int`): sequences.
        tokens (`int`): tokens of one run over all sequences.
        seconds (`list[float]`): wall time of every counted run; empty where there was not enough memory.
        peak_memory_bytes (`int`, *optional*): largest allocation of a process that holds this model alone: its weights and
            what the phase adds. `None`: not measured.
        decode (`str`): `"CUDA graph"` or `"eager"`; empty for a prefill.
        agreement (`float`, *optional*): share of tokens of a graph that equal those of eager steps.
        status (`str`): `"ok"` or `"out of memory"`.
        ratios (`list[float]`): speed over the first model's in the same round.
    """

    model: str
    phase: str
    batch_size: int
    tokens: int
    seconds: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    decode: str = ""
    agreement: float | None = None
    status: str = "ok"
    ratios: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> list[float]:
        """Speed of every counted run."""
        return [self.tokens / seconds for seconds in self.seconds]

    def to_dict(self) -> dict[str, Any]:
        """All fields but the single runs, with median, smallest and largest; `None` where nothing was measured."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("seconds", "ratios")}
        return values | spread("tokens_per_second", self.tokens_per_second) | spread("ratio", self.ratios)


@dataclass
class BenchmarkReport:
    """Facts and measurements of two or more models that took turns in one process.

    Args:
        models (`list[ModelFacts]`): the first is what the others are compared with.
        rows (`list[Measurement]`): by phase, batch size and model.
        settings (`dict`): prompt length, decode prompt length, new tokens, repeats, device and versions.
    """

    models: list[ModelFacts]
    rows: list[Measurement]
    settings: dict[str, Any]

    def to_markdown(self) -> str:
        """Two tables, of sizes and of speeds, and how it was measured."""
        lines = [*self._sizes(), "", *self._speeds(), "", *(f"- {fact}" for fact in self._facts())]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()

    def to_json(self) -> str:
        """Everything, versioned, single runs included."""
        rows = [row.to_dict() | {"seconds": row.seconds, "ratios": row.ratios} for row in self.rows]
        models = [dataclasses.asdict(facts) for facts in self.models]
        found = {"version": BENCHMARK_VERSION, "settings": self.settings, "models": models, "rows": rows}
        return json.dumps(found, indent=1)

    def to_csv(self) -> str:
        """One line per measurement, with the facts of its model beside it."""
        facts = {known.name: dataclasses.asdict(known) for known in self.models}
        text = io.StringIO()
        rows = [row.to_dict() | {k: v for k, v in facts[row.model].items() if k != "name"} for row in self.rows]
        if rows:
            writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return text.getvalue()

    def plot(self, path: str | os.PathLike) -> None:
        """Draw speeds over batch sizes, and sizes relative to the first model, into an image file.

        Raises:
            CheckpointError: the file cannot be written, or its suffix names no image format.
        """
        from .benchmark_plot import draw  # matplotlib is slow to import

        with drawing(path):
            draw(self, path)

    def write(self, folder: str | os.PathLike, picture: bool = True) -> None:
        """Write `benchmark.md`, `.json`, `.csv` and, unless `picture` is off, `.png` into a directory that exists.

        Raises:
            CheckpointError: a file cannot be written.
        """
        texts = {"md": self.to_markdown() + "\n", "json": self.to_json() + "\n", "csv": self.to_csv()}
        try:
            for suffix, text in texts.items():
                Path(folder, f"benchmark.{suffix}").write_text(text, encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {error.filename}: {error.strerror}") from error
        if picture:
            self.plot(Path(folder, "benchmark.png"))

    def sizes(self) -> list[tuple[str, list[int]]]:
        """(quantity, its value for every model)."""
        return [
            ("parameters", [facts.parameters for facts in self.models]),
            (f"weights, bytes ({self._weight_source()})", [facts.weight_bytes for facts in self.models]),
            ("recurrent state, bytes per sequence", [facts.recurrent_state_bytes for facts in self.models]),
            ("convolution state, bytes per sequence", [facts.conv_state_bytes for facts in self.models]),
        ]

    def _weight_source(self) -> str:
        return " / ".join(dict.fromkeys(facts.weight_source for facts in self.models))

    def _sizes(self) -> list[str]:
        head = ["", *(facts.name for facts in self.models)]
        head += [f"{facts.name} / {self.models[0].name}" for facts in self.models[1:]]
        body = []
        for quantity, values in self.sizes():
            ratios = [f"{value / values[0]:.3f}" if values[0] else "-" for value in values[1:]]
            body.append([quantity, *(f"{value:,}" for value in values), *ratios])
        return table(head, body, right=tuple(range(1, len(head))))

    def _speeds(self) -> list[str]:
        first = self.models[0].name
        head = ("phase", "batch", "model", "tokens/s", "range", f"x {first}", "range", "peak memory")
        body = []
        for row in self.rows:
            speeds = row.tokens_per_second
            peak = "not measured" if speeds else "-"
            if row.peak_memory_bytes is not None:
                peak = f"{row.peak_memory_bytes / 1e9:.2f} GB"
            cells = [row.status, "-"] if not speeds else [f"{median(speeds):,.1f}", _range(speeds, ",.1f")]
            compared = row.ratios and row.model != first
            cells += [f"{median(row.ratios):.2f}", _range(row.ratios, ".2f")] if compared else ["-", "-"]
            body.append([row.phase, str(row.batch_size), row.model, *cells, peak])
        return table(head, body, right=(1, 3, 4, 5, 6, 7))

    def _facts(self) -> list[str]:
        said = self.settings
        facts = [
            f"Prefill of {said['prompt_length']:,} tokens a sequence; decode of {said['new_tokens']:,} tokens a sequence after a "
            f"prompt of {said['decode_prompt_length']:,}. {said['repeats']} counted runs each, the models taking turns, after a "
            "warm-up; medians, smallest and largest.",
            f"{said['device']}, {', '.join(dict.fromkeys(facts.dtype for facts in self.models))}, torch {said['torch']}, "
            f"transformers {said['transformers']}.",
        ]
        for used, what in (("scan", "Scan"), ("conv", "Convolution"), ("state_update", "Decode step")):
            by = {}
            for model in self.models:
                by.setdefault(getattr(model, used), []).append(model.name)
            parts = [name if len(by) == 1 else f"{', '.join(models)}: {name}" for name, models in by.items()]
            facts.append(f"{what}: {'; '.join(parts)}.")
        modes = dict.fromkeys(row.decode for row in self.rows if row.decode)
        compared = [row for row in self.rows if row.agreement is not None]
        lost = [f"{row.model}, batch {row.batch_size}: {row.agreement:.1%}" for row in compared if row.agreement < 1]
        if modes:
            verdict = f"; tokens that equal those of eager steps: {', '.join(lost) or 'all'}" if compared else ""
            facts.append(f"Decode: {', '.join(modes)}{verdict}.")
        if said["device_type"] != "cuda":
            facts.append(f"Peak memory is not measured on {said['device_type']}.")
        return facts


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    """Median, smallest and largest under names that begin with `name`."""
    if not values:
        return {name: None, f"{name}_min": None, f"{name}_max": None}
    return {name: median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _range(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"
