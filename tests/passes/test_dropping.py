# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A search for blocks or SSMs to drop goes on after an interruption, round by round, and ends bit for bit as without one."""

from pathlib import Path

import pytest
import torch

from optimum_ssm import CheckpointError, SSMPruner
from optimum_ssm.calibration.activations import Activations
from optimum_ssm.hub.shards import ShardDirectory
from optimum_ssm.passes import dropping
from tests.conftest import VOCABULARY, tiny_model
from tests.passes.test_resume import assert_equal


def pruner_of(kind: str, folder: Path | None, **kwargs: str) -> SSMPruner:
    """Four blocks, of which two lose their unit."""
    ids = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(5))
    config = {"method": "block_drop", "sparsity": 0.5, "dataset": ids, "seq_len": 10, "batch_size": 2}
    return SSMPruner(
        tiny_model(kind, num_hidden_layers=4),
        pruning_config=[{**config, "method_kwargs": kwargs, "resume_from": folder}],
    )


def whole(kind: str, **kwargs: str) -> SSMPruner:
    pruner = pruner_of(kind, None, **kwargs)
    pruner.prune()
    return pruner


def pieces(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("kind, unit", [("mamba2", "block"), ("mamba", "ssm")])
def test_a_finished_round_is_not_repeated(
    kind: str, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, measure = [], dropping._Search._perplexities

    def until_the_second(self: dropping._Search, left: list[int]) -> list[float]:
        asked.append(left)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(self, left)

    monkeypatch.setattr(dropping._Search, "_perplexities", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        pruner_of(kind, tmp_path, unit=unit).prune()
    assert pieces(tmp_path) == ["pass-1-round-0000"]
    pruner = pruner_of(kind, tmp_path, unit=unit)
    pruner.prune()
    assert asked[0] == [0, 1, 2, 3] and asked[1] == asked[2] and len(asked) == 3
    assert_equal(whole(kind, unit=unit), pruner)
    assert pieces(tmp_path) == ["pass-1-round-0000", "pass-1-round-0001"]


@pytest.mark.parametrize("options", [{"unit": "ssm"}, {"score": "influence"}])
def test_a_finished_search_runs_nothing(
    options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that ended before anything was dropped. Influences are one table, taken from one pass."""
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(dropping, "mute_ssm", None)
        patch.setattr(dropping, "remove_blocks", None)
        pruner_of("mamba2", tmp_path, **options).prune()
    assert pieces(tmp_path) == ["pass-1-round-0000", "pass-1-round-0001"][: 1 if "score" in options else 2]
    expected = whole("mamba2", **options)
    monkeypatch.setattr(Activations, "__init__", None)
    pruner = pruner_of("mamba2", tmp_path, **options)
    pruner.prune()
    assert_equal(expected, pruner)


def test_a_score_that_is_infinite_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = dropping._Search._perplexity_without
    monkeypatch.setattr(
        dropping._Search, "_perplexity_without", lambda self, i, *rest: measure(self, i, *rest) if i else float("inf")
    )
    expected = pruner_of("mamba", tmp_path)
    expected.prune()
    assert ShardDirectory(tmp_path).facts("pass-1-round-0000")["scores"][0] == float("inf")
    pruner = pruner_of("mamba", tmp_path)
    pruner.prune()
    assert_equal(expected, pruner)


def test_rounds_of_another_search_are_refused(tmp_path: Path) -> None:
    pruner_of("mamba", tmp_path, score="influence").prune()
    pruner = pruner_of("mamba", tmp_path)
    with pytest.raises(
        CheckpointError,
        match=r"pass-1-round-0000\.safetensors was made by another run: config\.method_kwargs was .*influence.*, is \{\}",
    ):
        pruner.prune()
    assert len(pruner.model.base_model.layers) == 4


def test_rounds_that_follow_lost_ones_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may round otherwise when it computes a lost round again, and another unit may go."""
    pruner_of("mamba", tmp_path).prune()
    expected, directory = whole("mamba"), ShardDirectory(tmp_path)
    (tmp_path / "pass-1-round-0000.safetensors").unlink()
    facts = directory.facts("pass-1-round-0001")
    left: list[int] = sorted({0, 1, 2, 3} - set(expected.report.passes[0].units["order"][:1]))
    assert facts["left"] == left
    directory.write("pass-1-round-0001", {}, {**facts, "left": [0, *left[:2]], "scores": [3.0, 2.0, 1.0]})
    pruner = pruner_of("mamba", tmp_path)
    pruner.prune()
    assert_equal(expected, pruner)
    assert directory.facts("pass-1-round-0001")["left"] == left
