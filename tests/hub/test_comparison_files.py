# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A comparison on disk goes on where it was cut off, and never mixes rows of different settings."""

import sys
from pathlib import Path

import pytest

from optimum_ssm import CheckpointError
from optimum_ssm.evaluation.comparison_table import Comparison, ComparisonRow
from optimum_ssm.hub.comparison_files import TABLE, ComparisonFiles


SETTINGS = {"model": "m", "evaluation": "e"}
A = ComparisonRow("wanda", "0.5", "in_proj", "-", "measured", 10, 5, 0.125, 20.0, 1 / 3 + 21, 0.1)
B = ComparisonRow("wanda", "2:4", "in_proj", "-", "impossible", dense=20.0, reason='a "reason", with a comma')


def test_rows_come_back_with_the_same_settings_alone(tmp_path: Path) -> None:
    assert ComparisonFiles(tmp_path / "new").known(SETTINGS) == []
    ComparisonFiles(tmp_path / "new").write(Comparison(SETTINGS, [A, B]))
    assert ComparisonFiles(tmp_path / "new").known(SETTINGS) == [A, B]
    with pytest.raises(CheckpointError, match="with evaluation: 'e', this one has 'f'; give another directory or"):
        ComparisonFiles(tmp_path / "new").known({**SETTINGS, "evaluation": "f"})
    assert ComparisonFiles(tmp_path / "new", overwrite=True).known({**SETTINGS, "evaluation": "f"}) == []


def test_rows_that_were_not_asked_for_again_stay(tmp_path: Path) -> None:
    ComparisonFiles(tmp_path).write(Comparison(SETTINGS, [A, B]))
    files = ComparisonFiles(tmp_path)
    files.known(SETTINGS)
    other = ComparisonRow("wanda", "0.5", "A_log", "-", "measured", 4, 2, 0.05, 20.0, 30.0, 0.1)
    files.write(Comparison(SETTINGS, [other, B]))
    assert ComparisonFiles(tmp_path).known(SETTINGS) == [other, B, A]


def test_all_files_are_written(tmp_path: Path) -> None:
    written = ComparisonFiles(tmp_path).finish(Comparison(SETTINGS, [A, B]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert all(path.stat().st_size for path in written) and len(written) == 4
    assert "21.33" in (tmp_path / "comparison.md").read_text()


@pytest.mark.parametrize("text", ["", "method,budget\n", "not a table", "\x00"])
def test_a_table_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    ComparisonFiles(tmp_path).write(Comparison(SETTINGS, [A]))
    (tmp_path / TABLE).write_text(text)
    with pytest.raises(CheckpointError, match="overwrite it"):
        ComparisonFiles(tmp_path).known(SETTINGS)


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written to"):
        ComparisonFiles(tmp_path / "file" / "below")


def test_without_matplotlib_the_table_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = ComparisonFiles(tmp_path).finish(Comparison(SETTINGS, [A, B]))
    assert [path.name for path in written] == ["comparison.csv", "comparison.json", "comparison.md"]
