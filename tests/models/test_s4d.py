# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""S4D: initial values, kernel and layer against the recurrence in float64, reload."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.models.s4d import S4DConfig, S4DForSequenceClassification, S4DLayer


def test_initial_values_are_s4d_lin():
    torch.manual_seed(0)
    layer = S4DLayer(200).requires_grad_(False)
    assert layer.A_imag.shape == (200, 32)
    torch.testing.assert_close(layer.A_imag[3], math.pi * torch.arange(32.0))
    torch.testing.assert_close(layer.log_A_real.exp(), torch.full((200, 32), 0.5))
    assert float(layer.C.square().sum(-1).mean()) == pytest.approx(1, rel=0.05)
    assert math.log(1e-3) <= layer.log_dt.min() and layer.log_dt.max() <= math.log(0.1)
    assert float(layer.D.std()) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("length", [1, 14])
def test_the_layer_is_its_recurrence(length):
    torch.manual_seed(0)
    layer = S4DLayer(5, 8).double()
    u = torch.randn(2, length, 5, dtype=torch.float64)
    with torch.no_grad():
        A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        decay = (A * layer.log_dt.exp()[:, None]).exp()
        B, C = (decay - 1) / A, torch.complex(*layer.C.unbind(-1))
        state, outputs = torch.zeros(2, 5, 4, dtype=torch.complex128), []
        for t in range(length):
            state = decay * state + B * u[:, t, :, None]
            outputs.append(2 * (C * state).sum(-1).real + layer.D * u[:, t])
        y = torch.stack(outputs, 1)
        value, gate = layer.output_linear(F.gelu(y)).chunk(2, -1)
        torch.testing.assert_close(layer(u), value * torch.sigmoid(gate), rtol=0, atol=1e-12)
        impulse = torch.zeros(1, length, 5, dtype=torch.float64)
        impulse[:, 0] = 1
        kernel = [2 * (C * B * decay**t).sum(-1).real for t in range(length)]
        torch.testing.assert_close(layer.kernel(length), torch.stack(kernel, 1), rtol=0, atol=1e-12)


def test_it_cannot_become_unstable():
    layer = S4DLayer(5, 8)
    with torch.no_grad():
        layer.log_A_real.normal_(std=3)
    assert (layer.discrete(torch.float64)[0].abs() < 1).all()


def test_sizes_of_their_own_reload(tmp_path):
    torch.manual_seed(0)
    config = S4DConfig(
        hidden_size=12, num_hidden_layers=2, ssm_size=8, num_labels=5, layer_sizes=[4, 1], mask_padding=True
    )
    model = S4DForSequenceClassification(config).eval()
    ids = torch.randint(1, 20, (2, 9))
    ids[0, 5:] = 0
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(again) is S4DForSequenceClassification
    assert [block.layer.state_size for block in again.backbone.layers] == [4, 1]
    assert torch.equal(again(ids).logits, model(ids).logits)
    torch.testing.assert_close(model(ids[:1, :5]).logits, model(ids).logits[:1], rtol=0, atol=1e-5)


def test_gradients_reach_all_parameters():
    torch.manual_seed(0)
    layer = S4DLayer(5, 8)
    layer(torch.randn(2, 9, 5)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_a_size_out_of_range_is_refused():
    with pytest.raises(ConfigurationError, match="from 1 to 4"):
        S4DLayer(5, 8, state_size=5)
