# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The report as a picture."""

from __future__ import annotations

import math
import os

from .report import PruningReport


def draw(report: PruningReport, path: str | os.PathLike) -> None:
    """Removed share of every component in every block, above the relative output error of the blocks.

    Args:
        report (`PruningReport`): what to draw.
        path (`str` or `os.PathLike`): image file; the suffix decides the format.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.block is not None]
    touched = list(dict.fromkeys(row.component for row in rows))
    touched = [name for name in touched if any(row.pruned for row in rows if row.component == name)] or ["nothing"]
    blocks = 1 + max((row.block for row in rows), default=0)
    shares = [[math.nan] * blocks for _ in touched]
    for row in rows:
        if row.component in touched and row.elements:
            shares[touched.index(row.component)][row.block] = 100 * row.pruned / row.elements
    errors = [done.block_errors for done in report.passes if any(e is not None for e in done.block_errors)]
    figure = Figure(figsize=(max(6.0, 0.32 * blocks + 3), 1.6 + 0.34 * len(touched) + (1.8 if errors else 0)), dpi=130)
    ratios = [0.34 * len(touched) + 0.4, 1.4] if errors else [1]
    axes = figure.subplots(len(ratios), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})[:, 0]
    image = axes[0].imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
    for i, line in enumerate(shares if blocks <= 16 else []):  # more would not be readable
        for j, share in enumerate(line):
            if not math.isnan(share):
                axes[0].text(
                    j, i, f"{share:.0f}", ha="center", va="center", fontsize=7, color="w" if share < 60 else "k"
                )
    axes[0].set_yticks(range(len(touched)), touched)
    name = os.path.basename(report.model.rstrip("/"))
    axes[0].set_title(f"{name}: {100 * report.sparsity:.2f} % of all parameters removed", fontsize=10)
    figure.colorbar(image, ax=list(axes), label="removed, % of the component", fraction=0.04, pad=0.02)
    for number, series in enumerate(errors, start=1):
        points = [math.nan if error is None else error for error in series]
        axes[1].plot(range(len(points)), points, marker="o", markersize=3, linewidth=1, label=f"pass {number}")
    if errors:
        axes[1].set_xlim(-0.5, blocks - 0.5)
        axes[1].set_ylabel("relative output\nerror of the block", fontsize=8)
        axes[1].grid(alpha=0.3)
        if len(errors) > 1:
            axes[1].legend(fontsize=8)
    axes[-1].set_xlabel("block")
    figure.savefig(path, bbox_inches="tight")
