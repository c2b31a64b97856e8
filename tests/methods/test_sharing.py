# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Weights and segments with one input share what is derived from its Gram matrix, and nothing else is shared."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.methods._sharing import once_per_matrix


class Result:
    def __init__(self, value: float):
        self.value = value


@once_per_matrix
def derived(matrix: Tensor, factor: float) -> Result:
    return Result(float(matrix.sum()) * factor)


def test_a_result_is_that_of_the_matrix_as_it_is() -> None:
    one, two = torch.eye(3), torch.eye(3)
    first = derived(one, 2.0)
    assert derived(one, 2.0) is first and derived(two, 2.0) is not first, "equal matrices are not the same"
    assert derived(one, 3.0).value == 9 and derived(one, 2.0).value == 6
    one[0, 0] = 5
    assert derived(one, 2.0).value == 14, "it was written to"
    with torch.inference_mode():
        assert derived(torch.eye(2), 1.0).value == 2, "counts no writes, and is not remembered"


def test_nothing_outlives_the_matrix() -> None:
    matrix = torch.eye(3)
    seen = weakref.ref(derived(matrix, 1.0))
    assert seen() is not None
    del matrix
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("method, solver", [("sparsegpt", "cholesky_ex"), ("alps", "eigh")])
def test_segments_of_a_weight_share_one_factorisation(
    tiny_mamba2: PreTrainedModel,
    make_tiny_model: Callable[..., PreTrainedModel],
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    solver: str,
) -> None:
    """z, x, B, C and dt of in_proj have one input, out_proj another: two sites in each of two blocks."""
    calls, original = [], getattr(torch.linalg, solver)
    monkeypatch.setattr(torch.linalg, solver, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    segments = [f"in_proj.{name}" for name in ("z", "x", "B", "C", "dt")]
    options = {"method": method, "sparsity": 0.5, "dataset": token_ids(), "seq_len": 24}
    shared = SSMPruner(tiny_mamba2, pruning_config=SSMPrunerConfig(targets=[*segments, "out_proj"], **options))
    shared.prune()
    assert len(calls) == 2 * 2
    # alone, the last segment of the first block is what it is among the others
    alone = SSMPruner(make_tiny_model("mamba2"), pruning_config=SSMPrunerConfig(targets=["in_proj.dt"], **options))
    alone.prune()
    name = "backbone.layers.0.mixer.in_proj.weight"
    rows = slice(-8, None)
    assert torch.equal(alone.model.get_parameter(name)[rows], shared.model.get_parameter(name)[rows])
    assert alone.masks[name][rows].any()
