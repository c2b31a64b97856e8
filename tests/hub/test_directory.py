# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A directory is whole or it is not there; what was there before goes only when the new one is complete."""

import errno
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from optimum_ssm import CheckpointError
from optimum_ssm.hub.directory import check_free, whole_directory


FULL = OSError(errno.ENOSPC, "No space left on device")


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)
    (folder / "weights").write_text(text)


def test_a_new_directory_appears_with_its_parents_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with whole_directory(target) as new:
        assert not target.exists() and new.parent == target.parent, "a rename stays on one file system"
        fill(new, "new")
    assert contents(tmp_path) == {"a/b/out/config.json": "new", "a/b/out/weights": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out") as new:
        fill(new, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and len(contents(tmp_path)) == 2


def test_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with whole_directory("out") as new:
        fill(new, "new")
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_others_may_read_what_their_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with whole_directory(tmp_path / "out") as new:
            fill(new, "new")
    finally:
        assert os.umask(before) == 0o022, "the process keeps its umask"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_what_holds_something_is_refused_without_overwrite(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="out is not empty; give another directory or allow overwriting"):
        with whole_directory(tmp_path / "out"):
            pytest.fail("the block was entered")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and set(contents(tmp_path / "out").values()) == {"old"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_target(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(CheckpointError, match="out is a file; give a directory"):
        with whole_directory(tmp_path / "out", overwrite):
            pytest.fail("the block was entered")
    assert contents(tmp_path) == {"out": "mine"}


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    (tmp_path / "out" / "stale.txt").write_text("old")
    with whole_directory(tmp_path / "out", overwrite=True) as new:
        assert (tmp_path / "out" / "stale.txt").exists(), "the old one is there until the new one is whole"
        fill(new, "new")
    assert contents(tmp_path) == {"out/config.json": "new", "out/weights": "new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "denied"), SafetensorError("I/O error:\nfull")])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_in_the_middle_leaves_the_old_one_whole_and_nothing_beside_it(
    tmp_path: Path, error: Exception, existing: bool
) -> None:
    if existing:
        fill(tmp_path / "out", "old")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="^cannot write .*/out: ") as caught:
        with whole_directory(tmp_path / "out", overwrite=True) as new:
            fill(new, "half")
            raise error
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a bug")])
def test_other_exceptions_pass_unchanged_and_leave_nothing_either(tmp_path: Path, error: BaseException) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        with whole_directory(tmp_path / "out", overwrite=True) as new:
            fill(new, "half")
            raise error
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and set(contents(tmp_path / "out").values()) == {"old"}


def failing_rename(monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> None:
    """Let the renames with these numbers fail, the first one being 1."""
    original, count = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        count.append(1)
        if len(count) in failing:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("failing", [{1}, {2}])
def test_a_rename_that_fails_puts_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: set[int]
) -> None:
    fill(tmp_path / "out", "old")
    failing_rename(monkeypatch, failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        with whole_directory(tmp_path / "out", overwrite=True) as new:
            fill(new, "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and set(contents(tmp_path / "out").values()) == {"old"}


def test_an_old_directory_that_cannot_be_put_back_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", "old")
    failing_rename(monkeypatch, {2, 3})
    with pytest.raises(CheckpointError, match="Input/output error"):
        with whole_directory(tmp_path / "out", overwrite=True) as new:
            fill(new, "new")
    assert set(contents(tmp_path).values()) == {"old"} and len(contents(tmp_path)) == 2


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file; give a directory") as caught:
        with whole_directory(tmp_path / "file" / "out"):
            pytest.fail("the block was entered")
    assert "\n" not in str(caught.value)


def test_check_free_agrees_before_any_work_is_done(tmp_path: Path) -> None:
    check_free(tmp_path / "new", overwrite=False)
    check_free(tmp_path, overwrite=False)
    (tmp_path / "file").touch()
    for path, overwrite in ((tmp_path, False), (tmp_path / "file", True), (tmp_path / "file" / "in", True)):
        with pytest.raises(CheckpointError):
            check_free(path, overwrite)


def test_check_free_refuses_a_mount_point() -> None:
    with pytest.raises(CheckpointError, match="^/ is a mount point and cannot be replaced; give a directory in it$"):
        check_free(Path("/"), overwrite=True)


def test_check_free_names_a_way_only_where_there_is_one(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(CheckpointError, match="or allow overwriting: --overwrite, overwrite=True$"):
        check_free(tmp_path / "out", overwrite=False)
    with pytest.raises(CheckpointError, match="give another directory$"):
        check_free(tmp_path / "out", overwrite=None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_check_free_wants_a_parent_in_which_it_can_rename(tmp_path: Path) -> None:
    (tmp_path / "parent" / "out").mkdir(parents=True)
    (tmp_path / "parent").chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="out is replaced through .*parent, which cannot be written to"):
            check_free(tmp_path / "parent" / "out", overwrite=False)
    finally:
        (tmp_path / "parent").chmod(0o755)


def test_overwrite_replaces_checkpoints_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "out", "old")
    check_free(tmp_path / "out", overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").touch()
    (tmp_path / "config.json").touch()
    cases = {"has no config.json": tmp_path / "notes", "holds the directory 'notes'": tmp_path}
    for message, path in cases.items():
        with pytest.raises(CheckpointError, match=message):
            check_free(path, overwrite=True)
    (tmp_path / "out" / "below").mkdir()
    for inside in (tmp_path / "out", tmp_path / "out" / "below"):
        monkeypatch.chdir(inside)
        with pytest.raises(CheckpointError, match="working directory"):
            check_free(tmp_path / "out", overwrite=True)
