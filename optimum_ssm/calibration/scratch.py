# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Directories among the temporary files: made, removed, and a disk that refuses them told in one line."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..errors import CalibrationError


def temporary_directory() -> Path:
    """Where temporary files go.

    Raises:
        CalibrationError: there is no directory that can be written to.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise CalibrationError(f"{error}. Set TMPDIR to a directory that can be written to") from error


class Scratch:
    """A new directory among the temporary files, there until `remove`.

    Args:
        kind (`str`): a part of its name.

    Attributes:
        path (`Path`): the directory.

    Raises:
        CalibrationError: it cannot be made; the directory that it was to lie in is named.
    """

    def __init__(self, kind: str):
        parent = temporary_directory()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"optimum_ssm_{kind}_", dir=parent))
        except OSError as error:
            raise CalibrationError(
                f"no directory can be made in {parent}, where temporary files go: {error}. Set TMPDIR to a directory that "
                "can be written to"
            ) from error

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
