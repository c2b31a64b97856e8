# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A comparison as a picture: one heat map per method."""

from __future__ import annotations

import math
import os

from .comparison_table import Comparison, budget_label, increase_label, line_of, lines_of


CEILING = 10.0  # times the dense perplexity, where the colours end


def draw(comparison: Comparison, path: str | os.PathLike) -> None:
    """Increase of the perplexity over the dense model's, component by budget, one panel per method.

    Colours are the logarithm of the ratio, the same in all panels, and end at `CEILING` times the dense perplexity. Cells
    without a number are hatched and say whether they were impossible or failed.

    Args:
        comparison (`Comparison`): what to draw.
        path (`str` or `os.PathLike`): image file; the suffix decides the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    budgets = list(dict.fromkeys(row.budget for row in comparison.rows))
    lines = {m: lines_of([row for row in comparison.rows if row.method == m]) for m in methods}
    most = max(len(found) for found in lines.values())
    width = max(2.6, 0.85 * len(budgets)) + 1.5
    figure = Figure(figsize=(width * len(methods) + 1.2, 0.42 * most + 1.3), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(methods), squeeze=False)[0]
    image = None
    for axes, method in zip(panels, methods):
        rows = [row for row in comparison.rows if row.method == method]
        shown = [[math.nan] * len(budgets) for _ in lines[method]]
        for row in rows:
            i, j = lines[method].index(line_of(row, rows)), budgets.index(row.budget)
            if row.perplexity is None:
                box = Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor="0.93", edgecolor="0.7", hatch="//", linewidth=0)
                axes.add_patch(box)
                text, colour = ("not\npossible" if row.status == "impossible" else row.status), "0.35"
            else:
                shown[i][j] = math.log10(min(CEILING, max(1.0, row.perplexity / row.dense)))
                text, colour = increase_label(row.increase), "w" if shown[i][j] < 0.6 else "k"
            axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
        image = axes.imshow(
            shown, aspect="auto", cmap="viridis", vmin=0, vmax=math.log10(CEILING), interpolation="nearest"
        )
        axes.set_xlim(-0.5, len(budgets) - 0.5)
        axes.set_ylim(len(lines[method]) - 0.5, -0.5)
        axes.set_xticks(range(len(budgets)), [budget_label(b) for b in budgets])
        axes.set_yticks(range(len(lines[method])), lines[method])
        axes.tick_params(labelsize=8)
        axes.set_title(method, fontsize=9)
    ticks = [1, 1.5, 2, 3, 5, CEILING]
    bar = figure.colorbar(image, ax=list(panels), ticks=[math.log10(t) for t in ticks])
    bar.ax.set_yticklabels([*(f"x {t:g}" for t in ticks[:-1]), f"x {CEILING:g} or more"], fontsize=7)
    figure.suptitle(
        f"{os.path.basename(comparison.settings.get('model', ''))}: perplexity over the dense model's", fontsize=10
    )
    figure.savefig(path)
