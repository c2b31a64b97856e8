# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`PruningReport`: one row per parameter of the model; totals, table, JSON and picture come from the same rows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError


REPORT_VERSION = 1
HIGHER_SCORES = "higher scores than the removed entries"


@dataclass
class Row:
    """One parameter.

    Args:
        name (`str`): qualified name.
        component (`str`): short name that blocks share, such as `in_proj` or `norm`.
        block (`int`, *optional*): index of its block in the dense model.
        shape (`list[int]`): shape after the last pass; `[0]` where the whole block is gone.
        elements (`int`): entries before pruning; 0 where a compensation made the parameter.
        pruned (`int`): entries removed, by a mask or with a unit that owned them.
        reason (`str`): why the other entries were kept.
        methods (`list[str]`): methods that pruned it, one per pass.
        error (`float`, *optional*): relative squared output error, where the last method could tell.
        segments (`dict[str, list[int]]`): per row segment, [entries before, removed entries].
    """

    name: str
    component: str
    block: int | None
    shape: list[int]
    elements: int
    pruned: int = 0
    reason: str = ""
    methods: list[str] = field(default_factory=list)
    error: float | None = None
    segments: dict[str, list[int]] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Entries that are still there."""
        return self.elements - self.pruned

    @property
    def stored(self) -> int:
        """Entries that the checkpoint holds, zeros included."""
        return math.prod(self.shape)

    @property
    def dropped(self) -> bool:
        """Whether it went with its whole block."""
        return self.shape == [0]

    @property
    def masked(self) -> int:
        """Removed entries that are still stored, as zeros or as what `A_log` is filled with."""
        return self.pruned - (self.elements - self.stored) if self.elements else 0


@dataclass
class Pass:
    """One pruning pass.

    Args:
        config (`dict`): its settings.
        seconds (`float`): wall time, with `earlier_seconds`.
        tokens (`int`): calibration tokens.
        block_errors (`list`): relative output error of each block of the dense model on its own inputs; `None` where there
            was no calibration, or no block any more.
        reconstruction (`list`): per block the relative distance from the dense model's output before and after its kept
            weights were tuned; empty without reconstruction.
        reconstruction_seconds (`float`, *optional*): what that took, over all blocks, also those of an earlier run that was
            interrupted; `None` where it is not known.
        removed (`int`): entries that this pass removed and no earlier one had.
        units (`dict`): for a structured pass `axis`, and by block the units `before` and `kept`, which were `removed`, and
            the `groups` of which each keeps the same number. Of whole blocks there is one entry, see
            `report_blocks.record_drops`.
        blocks (`int`): blocks that the pass went over; 0 where it is not known.
        earlier_blocks (`int`): how many of them were taken from an earlier run that was interrupted.
        earlier_seconds (`float`): what all that was taken from it had cost there. How a run went is no part of what was
            done: passes that differ in nothing else are equal.
    """

    config: dict[str, Any]
    seconds: float
    tokens: int
    block_errors: list[float | None]
    reconstruction: list[list[float] | None] = field(default_factory=list)
    reconstruction_seconds: float | None = None
    removed: int = 0
    units: dict[str, Any] = field(default_factory=dict)
    blocks: int = 0
    earlier_blocks: int = field(default=0, compare=False)
    earlier_seconds: float = field(default=0.0, compare=False)


@dataclass
class PruningReport:
    """What was removed from a model, what was kept, and why.

    Tied tensors are counted once. Sparsity is always of the whole model unless a component is named beside it.

    Args:
        model (`str`): id or directory of the dense model.
        model_type (`str`): `config.model_type`.
        dtype_bytes (`int`): bytes per stored entry.
        recurrent_state_bytes (`int`): float32 bytes of recurrent state per sequence.
        conv_state_bytes (`int`): bytes of convolution state per sequence.
        rows (`list[Row]`): one per parameter.
        passes (`list[Pass]`): what was done, in order.
        perplexity (`dict[str, dict]`): measured perplexities with their protocol, by stage (`dense`, `pruned`).
        dense_state_bytes (`int`, *optional*): recurrent state per sequence before any unit was removed.
        loads_with (`str`): what has to be there to load the result: `"transformers"` or `"optimum_ssm"`.
        sizes (`list[dict]`): sizes of every block after a structured pass.
    """

    model: str
    model_type: str
    dtype_bytes: int
    recurrent_state_bytes: int
    conv_state_bytes: int
    rows: list[Row]
    passes: list[Pass] = field(default_factory=list)
    perplexity: dict[str, dict] = field(default_factory=dict)
    dense_state_bytes: int | None = None
    loads_with: str = "transformers"
    sizes: list[dict[str, int]] = field(default_factory=list)

    @property
    def blocks(self) -> list[int]:
        """Blocks of the dense model that are still there, in order: the first is the model's block 0 now, and so on."""
        return sorted({row.block for row in self.rows if row.block is not None and not row.dropped})

    @property
    def parameters(self) -> int:
        """Entries of all parameters before pruning."""
        return sum(row.elements for row in self.rows)

    @property
    def pruned(self) -> int:
        """Entries removed."""
        return sum(row.pruned for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Removed share of the whole model."""
        return self.pruned / self.parameters if self.parameters else 0.0

    @property
    def parameters_after(self) -> int:
        """Entries that the model has now, removed ones that are stored as zeros included."""
        return sum(row.stored for row in self.rows)

    @property
    def masked(self) -> int:
        """Removed entries that are still stored, as zeros."""
        return sum(row.masked for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weights on disk: zeros are stored like any other number."""
        return self.parameters_after * self.dtype_bytes

    @property
    def nonzero_bytes(self) -> int:
        """Bytes that the entries which were not removed would need without any index."""
        return (self.parameters_after - self.masked) * self.dtype_bytes

    def components(self) -> list[tuple[str, int, int, str]]:
        """(component, entries, removed, why the rest was kept), largest first; segments follow their weight."""
        totals: dict[str, list] = {}
        for row in self.rows:
            entry = totals.setdefault(row.component, [0, 0, {}, {}])
            entry[0] += row.elements
            entry[1] += row.pruned
            if not row.dropped:
                entry[2][row.reason] = None
            for name, (elements, pruned) in row.segments.items():
                part = entry[3].setdefault(name, [0, 0])
                part[0] += elements
                part[1] += pruned
        table = []
        for name, (elements, pruned, reasons, segments) in sorted(totals.items(), key=lambda item: -item[1][0]):
            table.append((name, elements, pruned, "; ".join(reasons)))
            if pruned:
                parts = segments.items()
                table += [(f"{name}.{part}", count, gone, f"part of {name}") for part, (count, gone) in parts]
        return table

    def to_markdown(self) -> str:
        """The report as a Markdown table over components, with the whole model below and the passes above."""
        from .report_text import markdown  # it needs the classes of this file

        return markdown(self)

    def __str__(self) -> str:
        return self.to_markdown()

    def to_json(self) -> str:
        """The report as JSON, versioned, with the totals beside the rows they are sums of."""
        values = dataclasses.asdict(self)
        totals = {"parameters": self.parameters, "pruned": self.pruned, "sparsity": self.sparsity}
        return json.dumps({"version": REPORT_VERSION, "totals": totals, **values}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PruningReport:
        """The report that `to_json` wrote.

        Raises:
            CheckpointError: the text is no report of a version that this library reads.
        """
        try:
            values = json.loads(text)
            if values.pop("version") != REPORT_VERSION:
                raise ValueError(f"version is not {REPORT_VERSION}")
            values.pop("totals")
            rows = [Row(**row) for row in values.pop("rows")]
            passes = [Pass(**done) for done in values.pop("passes")]
            return cls(rows=rows, passes=passes, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"the pruning report cannot be read: {reason}") from error

    def plot(self, path: str | os.PathLike) -> None:
        """Draw removed shares (component by block) and the blocks' output errors into an image file.

        Raises:
            CheckpointError: the file cannot be written, or its suffix names no image format.
        """
        from .report_plot import draw  # matplotlib is slow to import

        with drawing(path):
            draw(self, path)


@contextmanager
def drawing(path: str | os.PathLike) -> Iterator[None]:
    """Errors of an image that cannot be written become the library's own, naming the file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot draw {os.fspath(path)}: {' '.join(str(error).split())}") from error


def table(head: Iterable[str], body: Iterable[Iterable[str]], right: tuple[int, ...] = ()) -> list[str]:
    """Lines of a Markdown table whose columns are padded, so that it also reads well in a terminal."""
    rows = [list(head), *map(list, body)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths)))
        return f"| {' | '.join(cells)} |"

    rule = [("-" * (w - 1) + ":" if i in right else "-" * w) for i, w in enumerate(widths)]
    return [line(rows[0]), f"| {' | '.join(rule)} |", *map(line, rows[1:])]
