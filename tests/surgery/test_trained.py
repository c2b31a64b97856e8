# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Masked equals sliced on trained models, through saving, loading with the Auto classes and generating."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimum_ssm.families import family_of
from optimum_ssm.surgery.settle import settle
from tests.structured import cut_and_masked, largest, logits


TEXT = "The history of the town begins with a castle that was built on the river in the"
# float32 noise, and for heads what the norm's eps, one number for the whole model, leaves (methods: see surgery/norm.py)
TOLERANCE = {"head": 2e-3, "head_dim": 2e-3}


@pytest.mark.parametrize(
    "name, axis",
    [
        ("mamba-tiny", "state"),
        ("mamba-tiny", "channel"),
        ("mamba-tiny", "dt_rank"),
        ("mamba2-tiny", "state"),
        ("mamba2-tiny", "head"),
        ("mamba2-tiny", "head_dim"),
    ],
)
def test_a_trained_model_that_was_cut_equals_the_masked_one_after_a_reload(
    assets: Path, tmp_path: Path, name: str, axis: str
) -> None:
    dense = AutoModelForCausalLM.from_pretrained(assets / name, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(assets / name)(TEXT, return_tensors="pt").input_ids
    sliced, masked = cut_and_masked(dense, axis)
    settle(sliced, family_of(sliced))
    sliced.save_pretrained(tmp_path / "cut")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in dense.parameters())
    expected = logits(masked, ids)
    assert torch.equal(logits(loaded, ids), logits(sliced, ids)), "what is evaluated is what is saved"
    scale = float(expected.abs().max())
    assert largest(logits(loaded, ids), expected) <= TOLERANCE.get(axis, 1e-5) * scale
    assert largest(expected, logits(dense, ids)) > 1e-2 * scale, "half of the units do something"
    words = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if axis not in TOLERANCE:
        assert torch.equal(loaded.generate(ids, **words), masked.generate(ids, **words))
    assert torch.equal(loaded.generate(ids, **words), sliced.generate(ids, **words))
