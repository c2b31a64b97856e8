# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a killed process left among the temporary files goes when the next one comes; what is in doubt stays."""

import os
from pathlib import Path

import pytest

from optimum_ssm.calibration import scratch
from optimum_ssm.calibration.scratch import LOCK, Scratch, temporary_directory


pytestmark = [
    pytest.mark.skipif(not scratch._system(), reason="needs locks and the name of the running system"),
    pytest.mark.usefixtures("temporary"),
]


def abandoned(kind: str = "weights") -> Path:
    """A directory as a killed process leaves it: the system has closed its files."""
    left = Scratch(kind)
    (left.path / "block.safetensors").write_bytes(b"values")
    return killed(left)


def killed(scratch: Scratch) -> Path:
    """The directory, whose lock is free."""
    _, _, (path, lock, _), _ = scratch._finalizer.detach()
    os.close(lock)
    return path


def test_it_is_there_until_it_is_removed(temporary: Path) -> None:
    one, other = Scratch("stream"), Scratch("stream")
    assert one.path.parent == other.path.parent == temporary and one.path != other.path
    one.remove()
    assert list(temporary.iterdir()) == [other.path]
    one.remove(), other.remove()
    assert not list(temporary.iterdir())


def test_it_goes_with_the_last_that_needs_it_but_not_with_a_child(temporary: Path) -> None:
    one = Scratch("weights")
    child = os.fork()
    if child == 0:
        one.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert one.path.exists()
    del one
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("kind", ["stream", "weights"])
def test_what_a_killed_process_left_goes_with_the_next_one(kind: str, temporary: Path) -> None:
    left, alive = abandoned(kind), Scratch("weights")
    assert not left.exists()
    left = abandoned(kind)
    assert temporary_directory() == temporary and not left.exists()
    assert (alive.path / LOCK).exists(), "its process lives"


def test_a_child_that_was_forked_stands_for_the_owner(temporary: Path) -> None:
    """It has the open file too, as a duplicate of the descriptor has it."""
    left = Scratch("weights")
    child = os.dup(left._finalizer.peek()[2][1])
    killed(left)
    assert temporary_directory() == temporary and left.path.exists()
    os.close(child)
    assert temporary_directory() == temporary and not left.path.exists()


@pytest.mark.parametrize("doubt", ["another system", "no lock", "not locked yet", "another user", "a link"])
def test_what_is_in_doubt_stays(doubt: str, temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = abandoned()
    if doubt == "another system":
        (left / LOCK).write_bytes(b"f" + (left / LOCK).read_bytes()[1:] + b"x")
    elif doubt == "no lock":
        (left / LOCK).unlink()
    elif doubt == "not locked yet":
        (left / LOCK).rename(left / f"{LOCK}.new")
    elif doubt == "another user":
        monkeypatch.setattr(os, "getuid", lambda: -1)
    else:
        left.rename(tmp_path / "elsewhere")
        left.symlink_to(tmp_path / "elsewhere")
    temporary_directory()
    assert (left / "block.safetensors").exists()


def test_where_nothing_can_be_locked_directories_work_and_nothing_is_removed(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    left = abandoned()
    monkeypatch.setattr(scratch.fcntl, "flock", refuse)
    without = Scratch("weights")
    assert left.exists() and not (without.path / LOCK).exists()
    monkeypatch.setattr(scratch, "fcntl", None)
    without.remove(), Scratch("weights").remove()
    assert list(temporary.iterdir()) == [left]
