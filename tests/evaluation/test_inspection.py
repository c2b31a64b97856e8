# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds is counted from its weights, whoever made it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from optimum_ssm import PruningReport, SSMPruner
from optimum_ssm.evaluation.inspection import inspect_checkpoint


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruningReport, "plot", lambda self, path: Path(path).write_bytes(b"no picture"))


def removed(report: PruningReport) -> dict[str, int]:
    return {row.name: row.pruned for row in report.rows if row.pruned}


@pytest.mark.parametrize("fill", ["memoryless", "zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_what_the_pruner_reported(
    either_tiny_model: PreTrainedModel, tmp_path: Path, fill: str, dtype: torch.dtype
) -> None:
    recipe = [
        {"method": "random", "sparsity": 0.5, "targets": ["A_log", "in_proj.x"], "a_log_fill": fill},
        {"method": "magnitude", "pattern": "2:4", "targets": ["out_proj", "conv1d"]},
    ]
    pruner = SSMPruner(either_tiny_model.to(dtype), pruning_config=recipe)
    pruner.prune()
    pruner.report.perplexity = {"pruned": {"perplexity": 9.5, "protocol": "some text", "dataset": "some text",
                                           "windows": 1, "window": 2}}  # fmt: skip
    pruner.save_pretrained(tmp_path / "out")
    found = inspect_checkpoint(tmp_path / "out")
    assert removed(found) == removed(pruner.report) and found.sparsity == pruner.report.sparsity
    assert [row.segments for row in found.rows] == [row.segments for row in pruner.report.rows]
    assert found.passes == [] and found.perplexity == pruner.report.perplexity
    assert found.model == "./out"
    assert all(row.reason for row in found.rows)


def test_a_dense_checkpoint_has_nothing_removed(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    assert found.pruned == 0 and found.parameters == tiny_mamba.num_parameters()


def test_zeros_that_are_no_removals_are_not_counted(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    """A_log = log 1 at initialisation, biases and norms of zero."""
    mixer = tiny_mamba.base_model.layers[0].mixer
    for parameter in (mixer.A_log, mixer.conv1d.bias, mixer.D, tiny_mamba.base_model.norm_f.weight):
        parameter.data.zero_()
    mixer.x_proj.weight.data[2:5] = 0
    tiny_mamba.save_pretrained(tmp_path)
    assert removed(inspect_checkpoint(tmp_path)) == {"backbone.layers.0.mixer.x_proj.weight": 3 * 64}


def test_a_fill_that_only_looks_like_one_is_counted_where_that_weight_was_pruned(
    make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """Layer 1 was not touched: its zeros of A_log are a decay rate of 1."""
    model = make_tiny_model("mamba")
    for block in model.base_model.layers:
        block.mixer.A_log.data[:, 0] = 0
    config = {"method": "magnitude", "sparsity": 0.5, "targets": ["re:.*layers.0.mixer.A_log"], "a_log_fill": "zero"}
    pruner = SSMPruner(model, pruning_config=config)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "out")
    assert removed(inspect_checkpoint(tmp_path / "out")) == {"backbone.layers.0.mixer.A_log": 256}
