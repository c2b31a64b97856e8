# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A run that went on counts the seconds of the one before it, and says what it took from it."""

import json
from pathlib import Path

import pytest

from optimum_ssm import PruningReport
from optimum_ssm.hub.model_card import write_card
from optimum_ssm.hub.shards import ShardDirectory
from tests.passes.interrupted import LAYERS, pruner_of


@pytest.mark.parametrize("run", ["weights", "gradients"])
def test_seconds_of_an_earlier_run_are_counted_and_said(run: str, tmp_path: Path) -> None:
    first = pruner_of(run, tmp_path)
    first.prune()
    (tmp_path / "pass-1-block-0002.safetensors").unlink()  # and the one behind it is computed again, too
    pieces, directory = sorted(path.stem for path in tmp_path.glob("*.safetensors")), ShardDirectory(tmp_path)
    took = {name: directory.facts(name)["seconds"] for name in pieces}
    plan = "pass-1-plan" if run == "weights" else "pass-1-gradients"
    assert took[plan] > 0 and all(took[f"pass-1-block-{index:04d}"] > 0 for index in (0, 1, 3))
    again = pruner_of(run, tmp_path)
    (done,) = again.prune().passes
    assert (done.earlier_blocks, done.blocks) == (2, LAYERS)
    assert done.earlier_seconds == pytest.approx(sum(took.values()) - took["pass-1-block-0003"])
    assert done.seconds > done.earlier_seconds
    said = f" {done.seconds:.1f} s; 2 of 4 blocks were finished by an earlier run, in {done.earlier_seconds:.1f} s of these"
    assert said in str(again.report) and "earlier run" not in str(first.report)
    assert PruningReport.from_json(again.report.to_json()).passes[0].earlier_seconds == done.earlier_seconds
    write_card(tmp_path / "README.md", again.model, again._done, again.report, None, None)
    assert said in (tmp_path / "README.md").read_text()
    done.seconds = first.report.passes[0].seconds
    done.reconstruction_seconds = first.report.passes[0].reconstruction_seconds
    assert [done] == first.report.passes, "what was done is the same"


def test_only_a_plan_of_an_earlier_run(tmp_path: Path) -> None:
    pruner_of("weights", tmp_path).prune()
    for piece in tmp_path.glob("*-block-*"):
        piece.unlink()
    report = pruner_of("weights", tmp_path).prune()
    done = report.passes[0]
    assert done.earlier_blocks == 0 and done.seconds > done.earlier_seconds > 0
    done.seconds, done.earlier_seconds = 9.0, 4.0
    assert "9.0 s; an earlier run took 4.0 s of these" in str(report)


def test_a_report_from_before_this_was_counted(tmp_path: Path) -> None:
    values = json.loads(pruner_of("weights", None).prune().to_json())
    for name in ("blocks", "earlier_blocks", "earlier_seconds"):
        del values["passes"][0][name]
    done = PruningReport.from_json(json.dumps(values)).passes[0]
    assert (done.blocks, done.earlier_blocks, done.earlier_seconds) == (0, 0, 0.0)
