# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The bar tells what became of the blocks, on the terminal of the main process and nowhere else."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration.ranks import ALONE, Ranks
from optimum_ssm.passes.progress import progress


class Stream(io.StringIO):
    """What a terminal, or something else, was told."""

    terminal = True

    def isatty(self) -> bool:
        return self.terminal


def listen(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Take the place of stderr; not in a fixture, because pytest sets its own one between setup and call."""
    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def shown(text: str) -> dict[str, str]:
    """What the last state of the pruning bar says."""
    line = [line for line in re.split(r"[\r\n]", text) if line.startswith("Pruning")][-1]
    return {"line": line, **dict(re.findall(r"(\w+)=([^,\]]+)", line))}


def test_the_bar_tells_error_sparsity_and_memory(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = listen(monkeypatch)
    pruner = SSMPruner(make_tiny_model("mamba"))
    config = SSMPrunerConfig(method="wanda", sparsity=0.5, targets=["in_proj"], dataset=token_ids(), seq_len=24)
    report = pruner.prune(config)
    found = shown(stream.getvalue())
    assert "2/2" in found["line"] and "block/s" in found["line"].replace("s/block", "block/s")
    assert float(found["block_error"]) == pytest.approx(report.passes[0].block_errors[-1], rel=1e-2)
    assert float(found["sparsity"].rstrip("%")) / 100 == pytest.approx(report.sparsity, abs=1e-3)
    assert 0.05 < float(found["memory"].split()[0]) < 100


def test_what_was_cut_counts_as_gone(
    make_tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = listen(monkeypatch)
    pruner = SSMPruner(make_tiny_model("mamba2"))
    report = pruner.prune(SSMPrunerConfig(method="magnitude", axis="head", sparsity=0.5, multiple_of=2))
    found = shown(stream.getvalue())
    assert found["block_error"] == "-"
    assert float(found["sparsity"].rstrip("%")) / 100 == pytest.approx(report.sparsity, abs=1e-3)


@pytest.mark.parametrize("last", [
    {"method": "magnitude", "sparsity": 0.6, "targets": ["in_proj.B", "in_proj.z"]},
    {"method": "magnitude", "axis": "head", "sparsity": 0.5, "multiple_of": 2},
])  # fmt: skip
def test_what_earlier_passes_removed_counts_too(
    make_tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, last: dict[str, object]
) -> None:
    """Units that were cut, and masks: once where the last pass masks the same entries, not at all where it cuts them."""
    pruner = SSMPruner(make_tiny_model("mamba2"))
    pruner.prune(SSMPrunerConfig(method="magnitude", axis="state", sparsity=0.5, multiple_of=1))
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["in_proj", "out_proj"]))
    stream = listen(monkeypatch)
    report = pruner.prune(SSMPrunerConfig(**last))
    assert float(shown(stream.getvalue())["sparsity"].rstrip("%")) / 100 == pytest.approx(report.sparsity, abs=6e-4)


def test_a_tied_head_of_an_offloaded_model_counts_once(
    make_tiny_model: Callable[..., PreTrainedModel],
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    make_tiny_model("mamba").save_pretrained(tmp_path / "dense")
    pruner = SSMPruner.from_pretrained(tmp_path / "dense", device_map={"": "disk"})
    stream = listen(monkeypatch)
    report = pruner.prune(SSMPrunerConfig(method="wanda", sparsity=0.5, dataset=token_ids(2, 24), seq_len=24))
    assert float(shown(stream.getvalue())["sparsity"].rstrip("%")) / 100 == pytest.approx(report.sparsity, abs=6e-4)


def test_quiet_without_a_terminal(
    make_tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = listen(monkeypatch)
    stream.terminal = False
    SSMPruner(make_tiny_model("mamba")).prune(SSMPrunerConfig(method="magnitude", sparsity=0.5))
    assert "Pruning" not in stream.getvalue()


def test_quiet_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = listen(monkeypatch)
    assert list(progress(range(3), "Counting", "item", Ranks(1, 2))) == [0, 1, 2]
    assert "Counting" not in stream.getvalue()
    assert list(progress(range(3), "Counting", "item", ALONE)) == [0, 1, 2]
    assert "Counting" in stream.getvalue()
