# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The result of a comparison: one row per cell; CSV, Markdown and picture come from the same rows."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..report import drawing, table


MEASURED, FAILED, IMPOSSIBLE = "measured", "failed", "impossible"


@dataclass(frozen=True)
class ComparisonRow:
    """One cell with what was found.

    Args:
        method, budget, component, a_log_fill (`str`): which cell; `-` for the fill where no A_log is selected or could be
            pruned.
        status (`str`): `measured`, `failed` (in the middle of the work) or `impossible` (refused before it).
        entries (`int`, *optional*): entries of the selected weights.
        removed (`int`, *optional*): entries removed.
        of_model (`float`, *optional*): removed share of the whole model.
        dense (`float`): perplexity before.
        perplexity (`float`, *optional*): perplexity after.
        seconds (`float`, *optional*): wall time of the pruning pass.
        reason (`str`): why there is no number, or what was left out of a measured cell.
    """

    method: str
    budget: str
    component: str
    a_log_fill: str
    status: str
    entries: int | None = None
    removed: int | None = None
    of_model: float | None = None
    dense: float | None = None
    perplexity: float | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells the cell from all others."""
        return self.method, self.budget, self.component, self.a_log_fill

    @property
    def increase(self) -> float | None:
        """Relative increase of the perplexity over the dense model's."""
        return None if self.perplexity is None else self.perplexity / self.dense - 1


@dataclass(frozen=True)
class Comparison:
    """A filled table.

    Args:
        settings (`dict[str, str]`): model, calibration and protocol.
        rows (`list[ComparisonRow]`): one per cell.
    """

    settings: dict[str, str]
    rows: list[ComparisonRow]

    def to_csv(self) -> str:
        """All rows, floats in full."""
        file = io.StringIO()
        names = [field.name for field in dataclasses.fields(ComparisonRow)]
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([["" if (v := getattr(row, n)) is None else v for n in names] for row in self.rows])
        return file.getvalue()

    def to_markdown(self) -> str:
        """One table per method, components by budgets, with what could not be done below; then all cells."""
        lines = ["# Comparison", "", *(f"- {name}: {value}" for name, value in self.settings.items())]
        dense = next((row.dense for row in self.rows if row.dense is not None), None)
        if dense is not None:
            lines.append(f"- dense perplexity: {dense:.3f}")
        budgets = list(dict.fromkeys(row.budget for row in self.rows))
        for method in dict.fromkeys(row.method for row in self.rows):
            rows = [row for row in self.rows if row.method == method]
            lines += ["", f"## {method}", "", "Perplexity, and its increase over the dense model's.", ""]
            body, notes = [], {}
            for line in lines_of(rows):
                own = {row.budget: row for row in rows if line_of(row, rows) == line}
                entries = next((f"{row.entries:,}" for row in own.values() if row.entries is not None), "-")
                body.append((line, entries, *(_cell(own.get(budget)) for budget in budgets)))
                for row in own.values():
                    if row.reason:
                        notes.setdefault((line, row.reason), []).append(row.budget)
            head = ("component", "entries", *map(budget_label, budgets))
            lines += table(head, body, right=tuple(range(1, len(head))))
            lines += [""] if notes else []
            lines += [
                f"- {name} at {', '.join(map(budget_label, found))}: {text}" for (name, text), found in notes.items()
            ]
        return "\n".join([*lines, "", "## All cells", "", *self._long_table()]) + "\n"

    def _long_table(self) -> list[str]:
        head = ("method", "component", "budget", "A_log fill", "removed", "of the targets", "of the model",
                "before", "after", "pruning s", "status")  # fmt: skip
        body = []
        for r in self.rows:
            share = "-" if not r.entries or r.removed is None else f"{100 * r.removed / r.entries:.2f} %"
            counts = (
                "-" if r.removed is None else f"{r.removed:,}",
                share,
                "-" if r.of_model is None else f"{100 * r.of_model:.2f} %",
            )
            found = (_number(r.dense), _number(r.perplexity), _number(r.seconds, "{:.1f}"))
            body.append((r.method, r.component, r.budget, r.a_log_fill, *counts, *found, r.status))
        return table(head, body, right=(4, 5, 6, 7, 8, 9))

    def plot(self, path: str | os.PathLike) -> None:
        """Draw one heat map per method, component by budget, into an image file.

        Raises:
            CheckpointError: the file cannot be written, or its suffix names no image format.
        """
        from .comparison_plot import draw  # matplotlib is slow to import

        with drawing(path):
            draw(self, path)


def rows_from_csv(text: str) -> list[ComparisonRow]:
    """The rows that `Comparison.to_csv` wrote.

    Raises:
        CheckpointError: the text is no such table.
    """
    kinds = {"entries": int, "removed": int, "of_model": float, "dense": float, "perplexity": float, "seconds": float}
    reader = csv.DictReader(io.StringIO(text))
    names = [field.name for field in dataclasses.fields(ComparisonRow)]
    if reader.fieldnames != names:
        raise CheckpointError(f"the table has the columns {reader.fieldnames}, expected {names}")
    try:
        return [
            ComparisonRow(**{n: (kinds[n](v) if v else None) if n in kinds else v for n, v in row.items()})
            for row in reader
        ]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the table cannot be read: {error}") from error


def line_of(row: ComparisonRow, rows: list[ComparisonRow]) -> str:
    """Name of a row's line in a table of components: with the fill where there is more than one in `rows`."""
    fills = {other.a_log_fill for other in rows if other.component == row.component}
    return f"{row.component} ({row.a_log_fill})" if len(fills) > 1 or row.a_log_fill == "zero" else row.component


def lines_of(rows: list[ComparisonRow]) -> list[str]:
    """The lines of a table of components, in the order of the rows."""
    return list(dict.fromkeys(line_of(row, rows) for row in rows))


def budget_label(budget: str) -> str:
    """`50 %` for `0.5`; N:M as it is."""
    return budget if ":" in budget else f"{100 * float(budget):g} %"


def increase_label(increase: float) -> str:
    """`+3.1 %`, or `x 4.1` from a doubling on."""
    if increase < 1:
        return f"{100 * increase:+.1f} %"
    return f"x {1 + increase:.1f}" if increase < 999 else f"x {1 + increase:.0e}"


def _cell(row: ComparisonRow | None) -> str:
    if row is None:
        return "-"
    return row.status if row.perplexity is None else f"{row.perplexity:.2f} ({increase_label(row.increase)})"


def _number(value: Any, form: str = "{:.3f}") -> str:
    return "-" if value is None else form.format(value)
