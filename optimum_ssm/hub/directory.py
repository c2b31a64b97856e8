# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Directories that appear whole or not at all: everything is written beside, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError


@contextmanager
def whole_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory to write into, renamed to `path` when the block ends and removed when it fails.

    Args:
        path (`str` or `os.PathLike`): the final directory; its parents are made.
        overwrite (`bool`): replace a directory that holds something. The old one is there until the new one is whole.

    Raises:
        CheckpointError: `path` is a file, holds something and `overwrite` is off, or cannot be written (no space left,
            no permission). Nothing is left behind then, and an old directory is untouched.
    """
    target = Path(path).absolute()
    check_free(target, overwrite)
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        beside.chmod(0o777 & ~_umask())  # mkdtemp gives 0700, which others could not read
        yield beside
        for file in (path for path in beside.rglob("*") if path.is_file()):
            file.chmod(0o666 & ~_umask())  # safetensors writes 0600
        _replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {' '.join(str(error).split())}") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def check_free(path: Path, overwrite: bool | None) -> None:
    """Refuse a path that cannot become a directory, or one that holds something which must not be lost.

    Even with `overwrite` only a checkpoint is replaced: a directory with a `config.json`, without subdirectories, that is
    neither the working directory nor above it. A directory that exists is replaced by renaming, which a mount point does not
    allow and which needs a parent that can be written to.

    Args:
        path (`Path`): the directory that is to be made.
        overwrite (`bool`, *optional*): whether it may hold a checkpoint; `None`: it may not, and nothing allows it.

    Raises:
        CheckpointError: naming the path and the way out.
    """
    path = path.absolute()
    nearest = next(parent for parent in (path, *path.parents) if parent.exists())
    if not nearest.is_dir():
        raise CheckpointError(f"{nearest} is a file; give a directory")
    if nearest != path and not os.access(nearest, os.W_OK):
        raise CheckpointError(f"{nearest} cannot be written to; give another directory")
    if nearest != path:
        return
    if os.path.ismount(path):
        raise CheckpointError(f"{path} is a mount point and cannot be replaced; give a directory in it")
    if any(path.iterdir()) and not overwrite:
        way = "" if overwrite is None else " or allow overwriting: --overwrite, overwrite=True"
        raise CheckpointError(f"{path} is not empty; give another directory{way}")
    if not os.access(path.parent, os.W_OK):
        raise CheckpointError(
            f"{path} is replaced through {path.parent}, which cannot be written to; give another directory"
        )
    if not any(path.iterdir()):
        return
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise CheckpointError(f"{path} is, or holds, the working directory and is not overwritten; give another one")
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if folders or not (path / "config.json").is_file():
        what = f"holds the directory {folders[0]!r}" if folders else "has no config.json"
        raise CheckpointError(f"{path} {what}, so it is no checkpoint and is not overwritten; give another directory")


def _replace(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    kept = old / target.name
    try:
        target.rename(kept)
        try:
            new.rename(target)
        except OSError:
            kept.rename(target)
            raise
    except OSError:
        with suppress(OSError):  # not empty where the old directory could not be put back: then it must stay
            old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
