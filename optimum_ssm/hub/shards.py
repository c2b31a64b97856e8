# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A directory of finished pieces of a run. Each is one safetensors file that appears whole or not at all.

A piece is written beside under a name that is never read, forced to the disk, and renamed. So a process that is killed,
or a disk that fills up, leaves the pieces that were there before and nothing else that would be taken for one. Each holds its
own name and a checksum, because a wrong bit would end in a wrong model that nobody looks at twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..digest import digest
from ..errors import CheckpointError
from ..version import __version__


MARKER = "optimum_ssm_shards.json"
HALF = ".half"  # what a piece is called while it is written
# Of the metadata of a safetensors file: all that is not a tensor, as JSON, and the checksum of everything.
ENTRY, CHECKSUM = "optimum_ssm", "sha256"


class ShardDirectory:
    """The pieces in one directory, made or opened.

    Args:
        path (`str` or `os.PathLike`): new, empty, or made by an earlier run; halves of pieces in it are removed.

    Raises:
        CheckpointError: it holds something else, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            found = sorted(entry.name for entry in self.path.iterdir() if not entry.name.endswith(HALF))
            if found and MARKER not in found:
                raise CheckpointError(
                    f"resume_from={str(path)!r} holds {found[0]!r} and no {MARKER}: it was not made by an interrupted run. "
                    "Give a new or empty directory"
                )
            for half in self.path.glob(f"*{HALF}"):
                half.unlink()
            if not os.access(self.path, os.W_OK):  # not only after the first block
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not found:
                self._write(MARKER, (json.dumps({"optimum_ssm_version": __version__}) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"resume_from={str(path)!r} cannot be used: {_why(error)}") from error

    def names(self) -> list[str]:
        """The pieces that are there, sorted."""
        return sorted(path.stem for path in self.path.glob("*.safetensors"))

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write a piece, over one of the same name.

        Args:
            name (`str`): its name.
            tensors (`Mapping[str, Tensor]`): in main memory.
            facts (`Mapping[str, Any]`): JSON-ready values.

        Raises:
            CheckpointError: it cannot be written, such as for lack of space. What was there before is as it was.
        """
        tensors = {key: value.contiguous() for key, value in tensors.items()}
        said = json.dumps({"name": name, "facts": facts})
        content = save(tensors, {ENTRY: said, CHECKSUM: _checksum(said, tensors)})
        try:
            self._write(f"{name}.safetensors", content)
        except OSError as error:
            raise CheckpointError(
                f"{self.path / name}.safetensors cannot be written: {_why(error)}. The finished blocks before it are whole; "
                "start again with the same resume_from once it can be"
            ) from error

    def facts(self, name: str) -> dict[str, Any]:
        """What a piece says besides its tensors. Where it has some, they are not looked at, and so its checksum is not.

        Raises:
            CheckpointError: the file is no piece of that name.
        """
        return self._open(name)[1]

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a piece, in main memory, and the rest.

        Raises:
            CheckpointError: the file is damaged, or no piece of that name.
        """
        return self._open(name, tensors=True)

    def _open(self, name: str, tensors: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.path / f"{name}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                said, checksum = (file.metadata()[entry] for entry in (ENTRY, CHECKSUM))
                whole = tensors or not list(file.keys())
                found = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}
            if whole and _checksum(said, found) != checksum:
                raise ValueError("its checksum is not that of what it holds")
            content = json.loads(said)
            if content["name"] != name:
                raise ValueError(f"it is the piece {content['name']!r}")
            return found, content["facts"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {_why(error)}. Remove it, and what it held is computed again"
            ) from error

    def _write(self, name: str, content: bytes) -> None:
        half, whole = self.path / f"{name}{HALF}", self.path / name
        try:
            with open(half, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, whole)
        except OSError:
            with suppress(OSError):
                half.unlink()
            raise
        if os.name != "posix":
            return  # directories cannot be opened there
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, must survive a power cut
        finally:
            os.close(folder)


def _checksum(said: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what a piece says and of its tensors."""
    digests = {key: digest(value) for key, value in sorted(tensors.items())}
    return hashlib.sha256(f"{said} {json.dumps(digests)}".encode()).hexdigest()


def _why(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it says nothing of {error}"
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
