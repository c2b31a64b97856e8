# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
from optimum_ssm.sparsity.allocations.uniform import Uniform

from .evidence import item


def test_every_tensor_loses_its_own_rounded_share():
    items = [item(size=5), item(size=7), item("A_log", size=3, kind="a_log")]
    assert Uniform().counts(items, [None] * 3, 0.5) == [3, 4, 2]


def test_it_needs_no_plan_pass():
    assert all(Uniform().statistics(kind, ("gram",)) is None for kind in ("linear", "conv", "a_log"))
