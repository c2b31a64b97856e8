# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The gated RMSNorm kernel against its formula in float64 and transformers' module: on a GPU, or in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from optimum_ssm.calibration.seam import replaced_scan
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.ops import backend
from optimum_ssm.ops.gated_norm import MOST_CHANNELS, can_normalise, gated_norm


EPS = 1e-5


def reference(x, gate, weight, group_size):
    u = (x.double() * F.silu(gate.double())).unflatten(-1, (-1, group_size))
    return weight.double() * (u * (u.square().mean(-1, keepdim=True) + EPS).rsqrt()).flatten(-2)


def operands(device, batch, length, channels):
    """Slices of wider tensors, as gate is in a Mamba-2 block."""
    x, gate = torch.randn(batch, length + 1, channels), torch.randn(batch, length, channels + 5)
    return x.to(device)[:, 1:], gate.to(device)[..., 2 : channels + 2], torch.randn(channels).to(device)


@pytest.mark.parametrize(
    "batch, length, channels, group_size", [(2, 3, 40, 40), (1, 4, 48, 16), (3, 1, 7, 1), (1, 2, 600, 600)]
)
def test_equals_the_formula(triton_device, batch, length, channels, group_size):
    x, gate, weight = operands(triton_device, batch, length, channels)
    y, wanted = gated_norm(x, gate, weight, group_size, EPS), reference(x, gate, weight, group_size)
    assert y.is_contiguous() and y.dtype == torch.float32
    assert (y.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_bfloat16_is_within_one_unit_of_its_last_place(triton_device):
    """Of a float32 scan output, whose gate and weight are bfloat16."""
    x, gate, weight = operands(triton_device, 2, 3, 64)
    gate, weight = gate.bfloat16(), weight.bfloat16()
    y, wanted = gated_norm(x, gate, weight, 32, EPS), reference(x, gate, weight, 32)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - wanted).abs() <= 2**-7 * wanted.abs() + 1e-6).all()  # the interpreter cuts off


def test_wrong_shapes_are_refused(triton_device):
    x, gate, weight = operands(triton_device, 1, 2, 12)
    with pytest.raises(ConfigurationError, match="'gate' has shape"):
        gated_norm(x, gate[..., 1:], weight, 12, EPS)
    with pytest.raises(ConfigurationError, match="'weight' has shape"):
        gated_norm(x, gate, weight[1:], 12, EPS)
    with pytest.raises(ConfigurationError, match="12 channels do not divide into groups of 5"):
        gated_norm(x, gate, weight, 5, EPS)


def test_what_it_cannot_do_is_left_to_torch(triton_device, monkeypatch):
    x, gate, _ = operands(triton_device, 1, 2, 12)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with torch.no_grad():
        assert can_normalise(x, gate, 12)
        assert not can_normalise(x, None, 12)
        assert not can_normalise(x, gate, MOST_CHANNELS + 1)
        assert not can_normalise(x.mT.contiguous().mT, gate, 12)
        assert not can_normalise(x[0], gate[0], 12)
        assert not can_normalise(x[:0], gate[:0], 12)
        monkeypatch.setenv(backend.VARIABLE, "torch")
        assert not can_normalise(x, gate, 12)
        monkeypatch.delenv(backend.VARIABLE)
        assert can_normalise(x, gate, 12) == x.is_cuda
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert not can_normalise(x, gate, 12)  # under autograd


def test_a_model_is_normalised_in_it(triton_device, make_tiny_model, token_ids, monkeypatch):
    """While the scan is replaced; afterwards by its own module, and with gradients as well."""
    model, ids = make_tiny_model("mamba2").to(triton_device), token_ids(2, 6).to(triton_device)
    original, seen = MambaRMSNormGated.forward, []
    monkeypatch.setenv(backend.VARIABLE, "triton")
    monkeypatch.setattr(backend, "_obstacle", lambda x, size: seen.append((tuple(x.shape), size)))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    shape = 2, 6, model.backbone.layers[0].mixer.intermediate_size
    with replaced_scan(family_of(model), model):
        with torch.no_grad():
            found = model(ids, use_cache=False).logits
        assert seen.count((shape, 0)) == len(model.backbone.layers)
        seen.clear()
        model(ids, use_cache=False).logits.sum().backward()
        assert (shape, 0) not in seen
    assert MambaRMSNormGated.forward is original
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
