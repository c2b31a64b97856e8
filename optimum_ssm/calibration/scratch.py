# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Directories among the temporary files: made, removed, and a disk that refuses them told in one line.

A process that is killed removes nothing. So each directory holds a file that its process keeps locked, and whoever needs
such a directory next first removes those whose lock is free: the system frees it with the process, however that ends. A
lock says that only on the system that gave it, so directories of other machines, and of this one before it was
restarted, stay, as do those of other users and those without a lock.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from transformers.utils import logging

from ..errors import CalibrationError


try:
    import fcntl
except ImportError:  # Windows; nothing is locked there, and so nothing taken for left behind
    fcntl = None

PREFIXES = {kind: f"optimum_ssm_{kind}_" for kind in ("stream", "weights")}
LOCK = "lock"

logger = logging.get_logger(__name__)


def temporary_directory() -> Path:
    """Where temporary files go, without what killed processes left there.

    Raises:
        CalibrationError: there is no directory that can be written to.
    """
    try:
        folder = Path(tempfile.gettempdir())
    except OSError as error:
        raise CalibrationError(f"{error}. Set TMPDIR to a directory that can be written to") from error
    _clean(folder)
    return folder


class Scratch:
    """A new directory among the temporary files, there until `remove`, or as long as this object; where the process is killed,
    until another one is made.

    Args:
        kind (`str`): what it is for: `"stream"` or `"weights"`.

    Attributes:
        path (`Path`): the directory.

    Raises:
        CalibrationError: it cannot be made; the directory that it was to lie in is named.
    """

    def __init__(self, kind: str):
        parent = temporary_directory()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIXES[kind], dir=parent))
        except OSError as error:
            raise CalibrationError(
                f"no directory can be made in {parent}, where temporary files go: {error}. Set TMPDIR to a directory that "
                "can be written to"
            ) from error
        self._finalizer = weakref.finalize(self, _remove, self.path, _hold(self.path), os.getpid())

    def remove(self) -> None:
        """Remove it with all that is in it."""
        self._finalizer()


def _remove(folder: Path, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:  # a child that was forked, at its end
        return
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _system() -> bytes:
    """The running system, as what its locks mean ends with it; empty where it has no name."""
    if fcntl is None:
        return b""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.uname().nodename}".encode()
    return b""


def _hold(folder: Path) -> int | None:
    """The descriptor of a locked file in a directory; `None` where nothing can be locked."""
    if not (system := _system()):
        return None
    descriptor = None
    try:
        descriptor = os.open(folder / f"{LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(descriptor, system)
        os.rename(folder / f"{LOCK}.new", folder / LOCK)  # under its name it is never seen free
        return descriptor
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None


def _clean(parent: Path) -> None:
    """Remove the directories whose processes have ended, where that is beyond doubt."""
    if not (system := _system()):
        return
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(tuple(PREFIXES.values())) and entry.is_dir(follow_symlinks=False):
                _remove_if_free(Path(entry.path), system)


def _remove_if_free(folder: Path, system: bytes) -> None:
    with suppress(OSError):  # not readable, gone by now, or locked
        if folder.lstat().st_uid != os.getuid():
            return
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.read(descriptor, len(system) + 1) == system:
                shutil.rmtree(folder, ignore_errors=True)
                logger.info(f"{folder} was left by a process that was killed, and is removed")
        finally:
            os.close(descriptor)
