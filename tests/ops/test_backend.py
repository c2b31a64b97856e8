# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which scan runs where, what the kernels refuse, and a whole model whose scans run in Triton."""

import pytest
import torch

from optimum_ssm.calibration.seam import replaced_scan
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.ops import backend as module
from optimum_ssm.ops.backend import use_triton
from optimum_ssm.ops.selective_scan import SCAN_SUMS, selective_scan
from optimum_ssm.ops.state_space_dual import SCAN_SUMS as MAMBA2_SUMS
from optimum_ssm.ops.state_space_dual import state_space_dual

from ..reference import trace
from .test_triton_selective_scan import assert_close, on
from .test_triton_selective_scan import make_inputs as mamba_inputs
from .test_triton_state_space_dual import make_inputs as mamba2_inputs


@pytest.fixture
def x(triton_device):
    return torch.ones(1, 2, 3, device=triton_device)


@pytest.fixture
def open_choice(monkeypatch):
    monkeypatch.delenv(module.VARIABLE, raising=False)


def test_auto_is_triton_on_a_gpu_and_torch_on_the_cpu(x, open_choice, monkeypatch):
    assert use_triton(x, 16) == use_triton(x, 16, "auto") == x.is_cuda
    assert not use_triton(x.cpu(), 16)
    assert use_triton(x, 16, "triton") and not use_triton(x, 16, "torch")
    assert not use_triton(x[:0], 16, "triton")


def test_the_variable_decides_where_the_caller_does_not(x, monkeypatch):
    monkeypatch.setenv(module.VARIABLE, "triton")
    assert use_triton(x, 16) and not use_triton(x, 16, "torch")
    monkeypatch.setenv(module.VARIABLE, "torch")
    assert not use_triton(x, 16) and use_triton(x, 16, "triton")
    monkeypatch.setenv(module.VARIABLE, "cuda")
    with pytest.raises(ConfigurationError, match="OPTIMUM_SSM_SCAN is 'cuda': allowed are auto, torch, triton"):
        use_triton(x, 16)


def test_triton_is_refused_where_it_cannot_run(x, monkeypatch):
    with pytest.raises(ConfigurationError, match="backend is 'fused': allowed are auto, torch, triton"):
        use_triton(x, 16, "fused")
    with pytest.raises(ConfigurationError, match="x is torch.float64"):
        use_triton(x.double(), 16, "triton")
    with pytest.raises(ConfigurationError, match="state size is 257, at most 256"):
        use_triton(x, 257, "triton")
    monkeypatch.setattr(module, "_triton_interprets", lambda: False)
    with pytest.raises(ConfigurationError, match="x is on cpu.*TRITON_INTERPRET=1"):
        use_triton(x.cpu(), 16, "triton")
    monkeypatch.setattr(module, "_triton_is_installed", lambda: False)
    with pytest.raises(ConfigurationError, match="triton is not installed"):
        use_triton(x, 16, "triton")


@pytest.mark.parametrize(
    ("name", "change"),
    [("dt", lambda t: t[:, :-1]), ("B", lambda t: t[:, :-1]), ("C", lambda t: t[..., :-1]), ("D", lambda t: t[:1])],
)
def test_kernels_refuse_what_they_would_read_past_its_end(triton_device, name, change):
    mamba, mamba2 = on(triton_device, mamba_inputs()), on(triton_device, mamba2_inputs())
    for scan, inputs in ((selective_scan, mamba), (state_space_dual, mamba2)):
        with pytest.raises(ConfigurationError, match=rf"'{name}' has shape .*: it must be"):
            scan(**inputs | {name: change(inputs[name])}, backend="triton")


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_model_runs_through_the_kernels(triton_device, make_tiny_model, token_ids, monkeypatch, model_type):
    """Logits and sums of one block against the float64 trace, which shares nothing with the package."""
    model = make_tiny_model(model_type, num_hidden_layers=1)
    ids = token_ids(2, 10)
    (block,), logits = trace(model, ids)
    model.to(triton_device)
    monkeypatch.setenv(module.VARIABLE, "triton")
    calls = []
    monkeypatch.setattr(module, "_obstacle", lambda *seen: calls.append(seen))
    names = tuple(SCAN_SUMS if model_type == "mamba" else MAMBA2_SUMS)
    with torch.no_grad(), replaced_scan(family_of(model), model) as seam, torch.backends.cudnn.flags(allow_tf32=False):
        seam.start(names)
        got = model(ids.to(triton_device), use_cache=False).logits
    assert [size for _, size in calls if size] == [model.config.state_size]  # the convolution, on a GPU, has none
    assert_close(got, logits, 2e-5)
    lost = (block["readout"] * block["decay"] * block["before"]).square()
    energy = (block["readout"] * block["after"]).square()
    over_heads = (0, 1) if model_type == "mamba" else (0, 1, 3, 4)
    assert_close(seam.sums["decay_error"], lost.sum(over_heads), 2e-5)
    assert_close(seam.sums["state_energy"], energy.sum(over_heads[:3]), 2e-5)
    if model_type == "mamba":
        assert_close(seam.sums["state_prev"], block["before"].square().sum(1), 2e-5)
        assert_close(seam.sums["decay_sum"], block["decay"].sum(1), 2e-5)
