# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""On trained models the better criterion gives the better model (oracle 45); of A_log and at 2:4 see test_pruner.py."""

from pathlib import Path

import pytest

from optimum_ssm import SSMPruner, SSMPrunerConfig


def perplexity(assets: Path, name: str, **config: object) -> float:
    dataset = str(assets / "wikitext-2" / "calibration.txt")
    options = {"sparsity": 0.5, "num_samples": 32, "seq_len": 256, "dataset": dataset, **config}
    pruner = SSMPruner.from_pretrained(assets / name, SSMPrunerConfig(**options), dtype="float32")
    pruner.prune()
    return pruner.evaluate(assets / "wikitext-2" / "evaluation.txt", window=512, max_windows=12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_projections(assets: Path, name: str) -> None:
    """`best` <= `alps` <= `sparsegpt` <= `wanda` < `magnitude` at 50 %, within 1 %."""
    found = {m: perplexity(assets, name, method=m) for m in ("best", "alps", "sparsegpt", "wanda", "magnitude")}
    assert found["best"] <= found["alps"] <= 1.01 * found["sparsegpt"] and found["sparsegpt"] <= 1.01 * found["wanda"]
    assert found["wanda"] < 1.01 * found["magnitude"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_states(assets: Path, name: str) -> None:
    """Half of the states: `state_energy` below random ones and below magnitude."""
    found = {m: perplexity(assets, name, method=m, axis="state") for m in ("state_energy", "random", "magnitude")}
    assert found["state_energy"] < min(found["random"], found["magnitude"])
