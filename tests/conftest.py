# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What all tests share: tiny random models, small trained ones, and paths. No test touches the network."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from optimum_ssm.families import FAMILIES
from optimum_ssm.methods import METHODS
from optimum_ssm.sparsity.allocations import ALLOCATIONS


ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 64
# Sizes that no two axes share where they could be mixed up: 2I = 128, G·N = 16, and a time step rank of 6 that neither
# 2:4 nor 4:8 divides. A family that is not named here gets the common ones.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "expand": 2,
    "conv_kernel": 4,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": True,
}
SIZES = {
    "mamba": {"intermediate_size": 64, "time_step_rank": 6},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16},
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws from the same seed, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """`examples/assets`: `mamba-tiny` and `mamba2-tiny` (trained, with tokenizer), `wikitext-2/*.txt`."""
    return ROOT / "examples" / "assets"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Larger models and data beside the repository; tests that need them are skipped where they are absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the directory {path} with larger models and data, which is not here")
    return path


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., PreTrainedModel]:
    """`make_tiny_model("mamba2", seed=1, n_groups=1)`: a tiny random model, float32, in eval mode."""
    return tiny_model


@pytest.fixture
def tiny_mamba() -> PreTrainedModel:
    """Mamba: hidden 32, 2 layers, I = 64, N = 8, R = 6, vocabulary 64."""
    return tiny_model("mamba")


@pytest.fixture
def tiny_mamba2() -> PreTrainedModel:
    """Mamba-2: hidden 32, 2 layers, 8 heads of 8 in 2 groups, N = 8, vocabulary 64."""
    return tiny_model("mamba2")


@pytest.fixture(params=["mamba", "mamba2"])
def either_tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Both tiny models, one after the other."""
    return tiny_model(request.param)


@pytest.fixture
def load_trained(assets: Path) -> Callable[..., PreTrainedModel]:
    """`load_trained("mamba-tiny")`: a small trained model, float32, in eval mode, fresh at every call."""

    def load(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(assets / name, dtype=dtype, local_files_only=True).eval()

    return load


@pytest.fixture
def token_ids() -> Callable[..., torch.Tensor]:
    """`token_ids(samples, length)`: random ids of the tiny models' vocabulary, int64, seeded."""

    def draw(samples: int = 4, length: int = 24, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
        return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def clean_registries() -> Iterator[None]:
    """What a test registers is gone when it ends."""
    registries = (METHODS, FAMILIES, ALLOCATIONS)
    before = [dict(registry._entries) for registry in registries]
    yield
    for registry, entries in zip(registries, before):
        for name in registry._entries.keys() - registry._modules().keys() - entries.keys():
            del registry._entries[name]


def tiny_model(model_type: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A tiny random model in which every parameter matters: no bias, D or norm weight has its initial value."""
    sizes = {**COMMON, **SIZES.get(model_type, {}), **changes}
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw all parameters: weights N(0, 0.2²), decay rates in [0.5, 8], time steps around 0.2, norms around 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if name.endswith("A_log"):
                parameter.copy_(torch.rand(parameter.shape, generator=draw) * 2.8 - 0.7)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.copy_(0.5 * noise - 1.5)
            elif name.endswith(".D") or "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
