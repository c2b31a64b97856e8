# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection


def test_the_smallest_entries_go_and_the_others_are_untouched():
    weight = torch.randn(9, 14)
    pruned, mask = Magnitude().prune(weight, {}, "linear", Selection(50))
    order = weight.abs().flatten().argsort()
    assert set(mask.flatten().nonzero().flatten().tolist()) == set(order[:50].tolist())
    assert torch.equal(pruned[~mask], weight[~mask])
    assert not pruned[mask].any()


def test_n_m_keeps_the_largest_of_every_group():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.1, 0.0, -0.2, 0.3]])
    _, mask = Magnitude().prune(weight, {}, "linear", Selection(0, pattern=Pattern.parse("2:4")))
    assert mask.tolist() == [[True, False, False, True, True, True, False, False]]


def test_on_a_log_the_smallest_absolute_value_goes():
    a_log = torch.tensor([[0.1, -0.5, 2.0, -3.0]])
    assert Magnitude().prune(a_log, {}, "a_log", Selection(2))[1].tolist() == [[True, True, False, False]]


def test_largest_takes_the_fastest_decays_signed_and_only_of_a_log():
    method = Magnitude(largest=True)
    values = torch.tensor([[0.1, -0.5, 2.0, -3.0]])
    assert method.prune(values, {}, "a_log", Selection(2))[1].tolist() == [[True, False, True, False]]
    assert method.prune(values, {}, "linear", Selection(2))[1].tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("largest, fill", [(False, "zero"), (True, "memoryless")])
def test_the_fill_that_the_order_suits_is_declared(largest, fill):
    assert Magnitude(largest=largest).fill("a_log") == fill
    assert Magnitude(largest=largest).fill("linear") is None


def test_no_calibration_is_asked_for():
    assert all(Magnitude().statistics(kind) == () for kind in ("linear", "conv", "a_log"))
