# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Tuning a block's kept weights: towards the dense block, masks stay, and what it brought and took is told as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import CalibrationError, PruningReport, SSMPruner, SSMPrunerConfig
from optimum_ssm.passes.reconstruction import Reconstruction
from tests.reference import trace


MODELS = ("mamba", "mamba2")
TARGETS = ["in_proj", "out_proj", "A_log"]


def prune(model: PreTrainedModel, ids: Tensor, epochs: int, **kwargs: Any) -> SSMPruner:
    config = SSMPrunerConfig(
        method="magnitude",
        sparsity=0.6,
        targets=TARGETS,
        dataset=ids,
        seq_len=ids.shape[1],
        reconstruction_epochs=epochs,
        **kwargs,
    )
    pruner = SSMPruner(model)
    pruner.prune(config)
    return pruner


def outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What flows into the first block and out of every one, in float64."""
    return [model.base_model.embeddings.weight.detach().double()[ids], *(b["output"] for b in trace(model, ids)[0])]


def distance(found: Tensor, wished: Tensor, entered: Tensor) -> float:
    return float((found - wished).square().sum() / (wished - entered).square().sum())


@pytest.mark.parametrize("model_type", MODELS)
def test_the_distances_are_those_of_a_float64_forward_and_fall(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], model_type: str
) -> None:
    """Of the first block before and after; of the second after, on what the tuned first block gives."""
    ids = token_ids(8)
    dense, plain, tuned = (make_tiny_model(model_type) for _ in range(3))
    prune(plain, ids, epochs=0)
    report = prune(tuned, ids, epochs=3, reconstruction_kwargs={"lr": 5e-3}).report
    (first, last), wished = report.passes[0].reconstruction, outputs(dense, ids)
    without, with_it = outputs(plain, ids), outputs(tuned, ids)
    assert first[0] == pytest.approx(distance(without[1], wished[1], wished[0]), rel=1e-3)
    assert first[1] == pytest.approx(distance(with_it[1], wished[1], wished[0]), rel=1e-3)
    assert last[1] == pytest.approx(distance(with_it[2], wished[2], with_it[1]), rel=1e-3)
    assert first[1] < 0.9 * first[0] and last[1] < 0.9 * last[0]
    assert distance(with_it[2], wished[2], wished[1]) < 0.9 * distance(without[2], wished[2], wished[1])


@pytest.mark.parametrize("model_type", MODELS)
def test_all_that_is_left_of_a_block_is_tuned_and_masks_are_those_without_tuning(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], model_type: str
) -> None:
    """The mask of the first block: that of the second may follow from the first one's new output."""
    ids, dense = token_ids(8), make_tiny_model(model_type)
    plain, tuned = (prune(make_tiny_model(model_type), ids, epochs) for epochs in (0, 2))
    for name, parameter in tuned.model.named_parameters():
        before = dense.get_parameter(name)
        mask = tuned.masks.get(name, torch.zeros_like(before, dtype=torch.bool))
        assert torch.equal(mask, plain.masks.get(name, torch.zeros_like(mask))), name
        assert (parameter[mask] == (38 if name.endswith("A_log") else 0)).all(), name
        if name.startswith("backbone.layers."):
            assert (parameter != before)[~mask].any(), f"{name} was not tuned"
        else:
            assert torch.equal(parameter, before), f"{name} lies outside of the blocks"


def test_a_block_is_never_left_farther_than_pruning_left_it(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    ids = token_ids(8)
    plain = prune(make_tiny_model("mamba"), ids, epochs=0)
    far = prune(make_tiny_model("mamba"), ids, epochs=1, reconstruction_kwargs={"lr": 0.5})
    assert all(before == after for before, after in far.report.passes[0].reconstruction)
    for name, parameter in far.model.named_parameters():
        assert torch.equal(parameter, plain.model.get_parameter(name)), name


def test_tuning_that_leaves_the_finite_numbers_names_the_block_and_the_rate(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    with pytest.raises(
        CalibrationError, match=r"^backbone\.layers\.0: block reconstruction diverged; lower its lr of"
    ):
        prune(tiny_mamba, token_ids(8), epochs=2, reconstruction_kwargs={"lr": 1e30})


def test_a_block_that_adds_nothing_is_left_as_pruning_left_it(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor]
) -> None:
    plain, tuned = (make_tiny_model("mamba") for _ in range(2))
    for model in (plain, tuned):
        model.base_model.layers[0].mixer.out_proj.weight.data.zero_()
    prune(plain, token_ids(4), epochs=0)
    report = prune(tuned, token_ids(4), epochs=1).report
    first, last = report.passes[0].reconstruction
    assert first == [0, 0] and 0 < last[1] <= last[0]
    for name, parameter in plain.base_model.layers[0].named_parameters():
        assert torch.equal(parameter, tuned.base_model.layers[0].get_parameter(name)), name
    assert PruningReport.from_json(report.to_json()).passes[0] == report.passes[0]


def test_a_block_that_tuning_left_without_numbers_is_as_it_was_before() -> None:
    """In float16 a step leads out of the range, where infinity times 0 is NaN, which is not above any number."""
    block = torch.nn.Linear(2, 1, bias=False, dtype=torch.float16)
    with torch.no_grad():
        block.weight.fill_(6e4)
        pairs = [(torch.eye(2, dtype=torch.float16), torch.full((2, 1), 1e5))]
        found = Reconstruction(epochs=1, lr=1e4).tune(
            block, "block", pairs, lambda x: block(x.to(block.weight.dtype)), lambda: None
        )
    assert block.weight.tolist() == [[6e4, 6e4]]
    assert found[0] == found[1] > 0


def test_gain_and_time_are_in_the_text_and_in_the_file(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    report = prune(tiny_mamba, token_ids(8), epochs=1).report
    done = report.passes[0]
    assert 0 < done.reconstruction_seconds < done.seconds
    found = re.search(r"mean distance from the dense blocks from (\S+) to (\S+), in (\S+) s\.", str(report))
    before, after = (sum(pair[i] for pair in done.reconstruction) / 2 for i in (0, 1))
    assert found is not None and found.groups() == (
        f"{before:.2e}",
        f"{after:.2e}",
        f"{done.reconstruction_seconds:.1f}",
    )
    assert PruningReport.from_json(report.to_json()).passes[0] == done
    report = prune(tiny_mamba, token_ids(8), epochs=0).report
    assert report.passes[0].reconstruction == [] and report.passes[0].reconstruction_seconds == 0
    assert "Reconstruction" not in str(report)
