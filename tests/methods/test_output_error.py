# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The error that reports print is the error of the layer's output (oracle 18)."""

import pytest
import torch

from optimum_ssm.calibration.statistics import ConvGram, Gram
from optimum_ssm.methods.base import output_error

from ..reference import relative_error


def test_the_error_from_the_gram_matrix_is_that_of_the_outputs():
    weight, inputs = torch.randn(10, 16), torch.randn(3, 40, 16) @ torch.randn(16, 16)
    pruned = weight.masked_fill(torch.rand(10, 16) < 0.5, 0) + 0.01 * torch.randn(10, 16)
    statistic = Gram()
    statistic.update(inputs)
    x = inputs.double().reshape(-1, 16)
    expected = ((x @ (weight - pruned).double().T) ** 2).sum() / ((x @ weight.double().T) ** 2).sum()
    found = float(output_error(weight, pruned, {"gram": statistic.value()}))
    assert found == pytest.approx(float(expected), rel=1e-4)
    assert found == pytest.approx(relative_error(weight, pruned, statistic.value()), rel=1e-4)


def test_the_error_of_a_convolution_is_that_of_its_outputs():
    weight, inputs = torch.randn(6, 4), torch.randn(3, 20, 6)
    pruned = weight.masked_fill(torch.rand(6, 4) < 0.5, 0)
    statistic = ConvGram(4)
    statistic.update(inputs)

    def outputs(taps):
        return torch.nn.functional.conv1d(inputs.transpose(1, 2), taps[:, None], padding=3, groups=6)[..., :20]

    expected = (outputs(weight) - outputs(pruned)).square().sum() / outputs(weight).square().sum()
    found = float(output_error(weight, pruned, {"conv_gram": statistic.value()}))
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_no_gram_matrix_no_error():
    weight = torch.randn(3, 4)
    assert output_error(weight, weight, {"col_energy": torch.ones(4)}) is None


def test_an_output_that_is_zero_anyway_loses_nothing():
    zero = torch.zeros(3, 4)
    assert output_error(zero, zero, {"gram": torch.eye(4)}) == 0
