# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A comparison on disk: table, settings, Markdown and picture; a run that was cut off goes on from the table."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from transformers.utils import logging

from ..errors import CheckpointError
from ..evaluation.comparison_table import Comparison, ComparisonRow, rows_from_csv


logger = logging.get_logger(__name__)

TABLE, SETTINGS, TEXT, PICTURE = "comparison.csv", "comparison.json", "comparison.md", "comparison.png"


class ComparisonFiles:
    """The files of one comparison in a directory, which may hold other things too.

    Args:
        directory (`str` or `os.PathLike`): made if it does not exist.
        overwrite (`bool`): forget the rows that are there.
    """

    def __init__(self, directory: str | os.PathLike, overwrite: bool = False):
        self.directory, self.overwrite = Path(directory), overwrite
        self._known: list[ComparisonRow] = []
        nearest = next(
            path for path in (self.directory.absolute(), *self.directory.absolute().parents) if path.exists()
        )
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise CheckpointError(f"{self.directory} cannot be written to; give another directory")

    def known(self, settings: dict[str, str]) -> list[ComparisonRow]:
        """The rows of an earlier run with these settings.

        Raises:
            CheckpointError: the directory holds a table with other settings, or one that cannot be read.
        """
        if self.overwrite or not (self.directory / TABLE).exists():
            return []
        try:
            found = json.loads((self.directory / SETTINGS).read_text(encoding="utf-8"))
            self._known = rows_from_csv((self.directory / TABLE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory / TABLE} cannot be continued: {error}; overwrite it") from error
        except CheckpointError as error:
            raise CheckpointError(f"{self.directory / TABLE}: {error}; overwrite it") from error
        for name in dict.fromkeys([*found, *settings]):
            if found.get(name) != settings.get(name):
                raise CheckpointError(
                    f"{self.directory} holds a comparison with {name}: {found.get(name)!r}, this one has "
                    f"{settings.get(name)!r}; give another directory or overwrite it"
                )
        return self._known

    def write(self, comparison: Comparison) -> None:
        """Write table and settings, each whole or not at all; rows of an earlier run that were not asked for now stay.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        self._write(SETTINGS, json.dumps(comparison.settings, indent=1) + "\n")
        self._write(TABLE, self._with_known(comparison).to_csv())

    def finish(self, comparison: Comparison) -> list[Path]:
        """Write everything, with text and picture of all rows; the paths. Without matplotlib there is no picture."""
        self.write(comparison)
        whole = self._with_known(comparison)
        self._write(TEXT, whole.to_markdown())
        written = [TABLE, SETTINGS, TEXT]
        try:
            whole.plot(self.directory / PICTURE)
            written.append(PICTURE)
        except ModuleNotFoundError as error:  # the rows may be hours of work: they must not end in this
            logger.warning(f"no picture: {error}; the same command draws it where matplotlib is installed")
        return [self.directory / name for name in written]

    def _with_known(self, comparison: Comparison) -> Comparison:
        fresh = {row.key for row in comparison.rows}
        return Comparison(comparison.settings, [*comparison.rows, *(r for r in self._known if r.key not in fresh)])

    def _write(self, name: str, text: str) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.directory, encoding="utf-8", delete=False) as file:
                file.write(text)
            os.chmod(file.name, 0o644)
            os.replace(file.name, self.directory / name)
        except OSError as error:
            raise CheckpointError(f"cannot write {self.directory / name}: {error}") from error
