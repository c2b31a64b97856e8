# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The convolution before a scan in C, against torch's, and a whole model that runs through it."""

import math

import pytest
import torch
import torch.nn.functional as F

from optimum_ssm.calibration.seam import replaced_scan
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.ops import causal_convolution as module
from optimum_ssm.ops.causal_convolution import can_convolve, causal_convolution


pytestmark = pytest.mark.usefixtures("compiled", "no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def make_inputs(batch, channels, length, taps):
    """x is half of a projection's output, as in transformers."""
    x = torch.randn(batch, length, 2 * channels).transpose(1, 2)[:, :channels]
    return x, torch.randn(channels, taps), torch.randn(channels)


def reference(x, weight, bias, activation):
    x, weight = x.double(), weight.double()[:, None]
    bias = None if bias is None else bias.double()
    y = F.conv1d(x, weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))[..., : x.shape[2]]
    return y if activation is None else F.silu(y)


@pytest.mark.parametrize("sizes", [(2, 48, 130, 4), (1, 19, 64, 4), (3, 5, 2, 4), (1, 1, 1, 1), (2, 64, 65, 3)])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_equals_torch(sizes, activation):
    x, weight, bias = make_inputs(*sizes)
    assert can_convolve(x, weight, activation)
    for own in (bias, None):
        y = causal_convolution(x, weight, own, activation)
        torch.testing.assert_close(y.double(), reference(x, weight, own, activation), rtol=1e-5, atol=1e-6)
        assert y.dtype == torch.float32 and y.transpose(1, 2).is_contiguous()


def test_threads_do_not_change_a_bit():
    inputs, before = make_inputs(3, 515, 513, 4), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(causal_convolution(*inputs, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value):
    x, weight, bias = make_inputs(2, 20, 30, 4)
    x[1, 7, 11] = value
    y = causal_convolution(x, weight, bias)
    assert torch.equal(y.isfinite(), reference(x, weight, bias, None).isfinite())


def test_is_left_to_torch_where_it_cannot_run(monkeypatch):
    x, weight, bias = make_inputs(2, 8, 10, 4)
    assert can_convolve(x, weight, "silu")
    assert not can_convolve(x.contiguous(), weight, "silu") and not can_convolve(x, weight, "gelu")
    assert not can_convolve(x.double(), weight.double(), "silu") and not can_convolve(x[:0], weight, "silu")
    with torch.enable_grad():
        assert not can_convolve(x, weight, "silu")
    monkeypatch.setenv("OPTIMUM_SSM_SCAN", "torch")
    assert not can_convolve(x, weight, "silu")
    for wrong in ((weight[1:], bias), (weight, bias[1:])):
        with pytest.raises(ConfigurationError, match="has shape .*: it must be"):
            causal_convolution(x, *wrong)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_model_runs_through_it_and_has_its_own_back(make_tiny_model, token_ids, monkeypatch, model_type):
    model, ids = make_tiny_model(model_type), token_ids(2, 10)
    family, calls = family_of(model), []
    modelling = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=["causal_conv1d_fn"])
    original, expected = modelling.causal_conv1d_fn, model(ids, use_cache=False).logits
    library = module.library
    monkeypatch.setattr(module, "library", lambda: calls.append(1) or library())
    with pytest.raises(RuntimeError, match="stop"), replaced_scan(family, model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        raise RuntimeError("stop")
    assert len(calls) == 2 and modelling.causal_conv1d_fn is original


def test_what_it_cannot_read_is_refused():
    x, weight = torch.ones(1, 4, 8, dtype=torch.float64).transpose(1, 2), torch.ones(8, 4)
    with pytest.raises(ConfigurationError, match="x is torch.float64 with stride 1 over channels"):
        causal_convolution(x, weight)
    with pytest.raises(ConfigurationError, match="x is torch.float32 with stride 4 over channels"):
        causal_convolution(torch.ones(1, 8, 4), weight)
