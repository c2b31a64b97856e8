# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The convolution kernel against torch in float64: on a GPU, or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from optimum_ssm.errors import ConfigurationError


SIZES = [(2, 5, 7, 4), (1, 200, 40, 4), (3, 16, 1, 2), (1, 1, 33, 3)]


def reference(x, weight, bias, activation):
    x, weight = x.double(), weight.double()
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], groups=len(weight))
    y = y if bias is None else y + bias.double()[:, None]
    return F.silu(y) if activation else y


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("turned", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("batch, channels, length, taps", SIZES)
def test_equals_torch(triton_device, batch, channels, length, taps, turned, activation):
    from optimum_ssm.ops.triton_causal_convolution import convolve

    whole = torch.randn(batch, length, channels + 3) if turned else torch.randn(batch, channels + 3, length)
    x = (whole.transpose(1, 2) if turned else whole)[:, 2 : channels + 2].to(triton_device)
    weight, bias = torch.randn(channels, taps, device=triton_device), torch.randn(channels, device=triton_device)
    for given in (bias, None):
        y, wanted = convolve(x, weight, given, activation), reference(x, weight, given, activation)
        assert y.shape == x.shape and y.transpose(1, 2).is_contiguous()
        assert (y.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_bfloat16_is_within_one_unit_of_its_last_place(triton_device):
    from optimum_ssm.ops.triton_causal_convolution import convolve

    x, weight, bias = (torch.randn(*shape).bfloat16().to(triton_device) for shape in ((1, 24, 9), (24, 4), (24,)))
    y = convolve(x, weight, bias, "silu")
    assert y.dtype == torch.bfloat16
    wanted = reference(x, weight, bias, "silu")
    assert ((y.double() - wanted).abs() <= 2**-7 * wanted.abs() + 1e-6).all()  # the interpreter cuts off


def test_wrong_shapes_are_refused(triton_device):
    from optimum_ssm.ops.triton_causal_convolution import convolve

    x, weight, bias = (torch.ones(*shape, device=triton_device) for shape in ((1, 4, 3), (4, 2), (3,)))
    with pytest.raises(ConfigurationError, match="'bias' has shape"):
        convolve(x, weight, bias)
    with pytest.raises(ConfigurationError, match="'weight' has shape"):
        convolve(x, weight[:3])
