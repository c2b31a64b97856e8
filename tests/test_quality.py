# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""On trained models the better criterion gives the better model (oracle 45); of A_log and at 2:4 see test_pruner.py."""

from pathlib import Path

import pytest

from optimum_ssm import SSMPruner, SSMPrunerConfig


LITTLE = {"num_samples": 4, "seq_len": 128, "windows": 2}
PROJECTIONS = ("alps", "sparsegpt", "wanda", "magnitude")
STATES = ("state_energy", "random", "magnitude")


def perplexity(
    texts: Path, path: Path, num_samples: int = 32, seq_len: int = 256, windows: int = 12, **config: object
) -> float:
    """Of the model in `path` on the excerpt in `texts`, half of it pruned by a config."""
    dataset = str(texts / "wikitext-2" / "calibration.txt")
    options = {"sparsity": 0.5, "num_samples": num_samples, "seq_len": seq_len, "dataset": dataset, **config}
    pruner = SSMPruner.from_pretrained(path, SSMPrunerConfig(**options), dtype="float32")
    pruner.prune()
    return pruner.evaluate(texts / "wikitext-2" / "evaluation.txt", window=512, max_windows=windows)


def test_projections_with_little_text(assets: Path) -> None:
    found = {m: perplexity(assets, assets / "mamba2-tiny", method=m, **LITTLE) for m in PROJECTIONS}
    assert found["alps"] <= 1.01 * found["sparsegpt"] and found["sparsegpt"] <= found["wanda"] < found["magnitude"]


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_states_with_little_text(assets: Path, name: str) -> None:
    found = {m: perplexity(assets, assets / name, method=m, axis="state", **LITTLE) for m in STATES}
    assert found["state_energy"] < min(found["random"], found["magnitude"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_projections(assets: Path, name: str) -> None:
    """`best` <= `alps` <= `sparsegpt` <= `wanda` < `magnitude` at 50 %, within 1 %."""
    found = {m: perplexity(assets, assets / name, method=m) for m in ("best", *PROJECTIONS)}
    assert found["best"] <= found["alps"] <= 1.01 * found["sparsegpt"] and found["sparsegpt"] <= 1.01 * found["wanda"]
    assert found["wanda"] < 1.01 * found["magnitude"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_states(assets: Path, name: str) -> None:
    """Half of the states: `state_energy` below random ones and below magnitude."""
    found = {m: perplexity(assets, assets / name, method=m, axis="state") for m in STATES}
    assert found["state_energy"] < min(found["random"], found["magnitude"])


# ------------------------------------------------------------------ ten times the size

MEDIUM = {"num_samples": 8, "seq_len": 256, "windows": 2}


@pytest.fixture(params=["mamba-24m", "mamba2-24m"])
def larger(request: pytest.FixtureRequest, shared_dir: Path) -> Path:
    """A larger trained model, from beside the repository."""
    path = shared_dir / "models" / request.param
    if not path.is_dir():
        pytest.skip(f"needs the trained model {request.param} in {path.parent}, which is not here")
    return path


@pytest.mark.slow
def test_projections_of_a_larger_model(assets: Path, larger: Path) -> None:
    found = {m: perplexity(assets, larger, method=m, **MEDIUM) for m in PROJECTIONS}
    assert found["alps"] <= 1.01 * found["sparsegpt"] and found["sparsegpt"] <= 1.01 * found["wanda"]
    assert found["wanda"] < 1.01 * found["magnitude"]


@pytest.mark.slow
def test_states_of_a_larger_model(assets: Path, larger: Path) -> None:
    found = {m: perplexity(assets, larger, method=m, axis="state", **MEDIUM) for m in STATES}
    assert found["state_energy"] < min(found["random"], found["magnitude"])


@pytest.mark.slow
def test_a_log_of_a_larger_model(assets: Path, larger: Path) -> None:
    """Memoryless: `c2` <= `v2` < `v1` and magnitude, within 1 %; Mamba-2 has `c2` alone."""
    forms = {v: {"method": "sparsessm", "method_kwargs": {"variant": v}} for v in ("c2", "v2", "v1")}
    if "mamba2" in larger.name:
        del forms["v2"], forms["v1"]
    forms["magnitude"] = {"method": "magnitude"}
    found = {v: perplexity(assets, larger, targets=["A_log"], **form, **MEDIUM) for v, form in forms.items()}
    if "v2" in found:
        assert found["c2"] <= 1.01 * found["v2"] and found["v2"] < min(found["v1"], found["magnitude"])
    assert found["c2"] < found["magnitude"]
