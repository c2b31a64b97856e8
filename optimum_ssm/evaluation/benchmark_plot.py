# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A benchmark as a picture."""

from __future__ import annotations

import os
from statistics import median

from .benchmark_report import BenchmarkReport


def draw(report: BenchmarkReport, path: str | os.PathLike) -> None:
    """Tokens per second over batch sizes, a panel for each phase, beside the sizes relative to the first model.

    Args:
        report (`BenchmarkReport`): what to draw.
        path (`str` or `os.PathLike`): image file; the suffix decides the format.
    """
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(row.phase for row in report.rows))
    figure = Figure(figsize=(4.2 * (len(phases) + 1), 3.8), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(phases) + 1, squeeze=False)[0]
    colours = {facts.name: f"C{index}" for index, facts in enumerate(report.models)}
    for panel, phase in zip(axes, phases):
        _draw_speeds(panel, report, phase, colours)
    _draw_sizes(axes[-1], report, colours)
    figure.savefig(path, bbox_inches="tight")


def _draw_speeds(panel, report: BenchmarkReport, phase: str, colours: dict[str, str]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    batches = sorted({row.batch_size for row in report.rows if row.phase == phase})
    lost = []
    for facts in report.models:
        rows = [row for row in report.rows if row.phase == phase and row.model == facts.name]
        done = [row for row in rows if row.seconds]
        lost += [f"{row.model}, batch {row.batch_size}: {row.status}" for row in rows if not row.seconds]
        speeds = [row.tokens_per_second for row in done]
        middles = [median(values) for values in speeds]
        below = [middle - min(values) for middle, values in zip(middles, speeds)]
        above = [max(values) - middle for middle, values in zip(middles, speeds)]
        panel.errorbar(
            [row.batch_size for row in done],
            middles,
            yerr=[below, above],
            color=colours[facts.name],
            label=facts.name,
            marker="o",
            markersize=4,
            linewidth=1.2,
            capsize=3,
        )
        for row in done:
            if row.ratios and facts.name != report.models[0].name:
                panel.annotate(
                    f"x {median(row.ratios):.2f}",
                    (row.batch_size, median(row.tokens_per_second)),
                    xytext=(-5, 4),  # beside the error bar, and a line rises to the right
                    textcoords="offset points",
                    ha="right",
                    fontsize=7,
                    color=colours[facts.name],
                )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.2, y=0.2)
    panel.set_xticks(batches, [str(batch) for batch in batches])
    panel.set_xlabel("batch size")
    panel.set_ylabel("tokens per second")
    panel.set_title("\n".join([_title(report, phase), *lost]), fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def _title(report: BenchmarkReport, phase: str) -> str:
    if phase == "prefill":
        return f"prefill, {report.settings['prompt_length']:,} tokens a sequence"
    modes = dict.fromkeys(row.decode for row in report.rows if row.decode)
    return f"decode, {', '.join(modes)}"


def _draw_sizes(panel, report: BenchmarkReport, colours: dict[str, str]) -> None:
    sizes = [(quantity.partition(",")[0], values) for quantity, values in report.sizes() if values[0]]
    width = 0.8 / len(report.models)
    for index, facts in enumerate(report.models):
        places = [row + (index - (len(report.models) - 1) / 2) * width for row in range(len(sizes))]
        shares = [100 * values[index] / values[0] for _, values in sizes]
        panel.barh(places, shares, height=0.9 * width, color=colours[facts.name])
        for place, share in zip(places, shares):
            panel.text(share, place, f" {share:.1f}", va="center", fontsize=7)
    panel.set_yticks(range(len(sizes)), [quantity for quantity, _ in sizes], fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlabel(f"% of {report.models[0].name}")
    panel.set_title("size", fontsize=9)
