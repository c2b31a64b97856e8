# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sums over the inputs of the scan, token by token in float64."""

import pytest
import torch
from torch.nn import functional as F

from optimum_ssm.ops.scan_moments import SCAN_MOMENTS, mamba2_moments, mamba_moments


def naive(x, dt, B, C, bias, softplus, limit):
    """x (B, L, H, P), dt (B, L, H), B and C (B, L, G, N)."""
    (batch, length, heads, _), (groups, states) = x.shape, B.shape[2:]
    found = {
        "tokens": torch.zeros(1), "dt": torch.zeros(heads), "x_energy": torch.zeros(heads),
        "b_energy": torch.zeros(groups, states), "c_energy": torch.zeros(groups, states),
        "dt_b_energy": torch.zeros(heads, states),
    }  # fmt: skip
    found = {name: value.double() for name, value in found.items()}
    for s in range(batch):
        for t in range(length):
            step = dt[s, t].double() + (0 if bias is None else bias.double())
            step = (F.softplus(step) if softplus else step).clamp(*limit)
            found["tokens"] += 1
            found["dt"] += step
            found["b_energy"] += B[s, t].double() ** 2
            found["c_energy"] += C[s, t].double() ** 2
            for h in range(heads):
                found["x_energy"][h] += (x[s, t, h].double() ** 2).sum()
                found["dt_b_energy"][h] += (step[h] * B[s, t, h * groups // heads].double()) ** 2
    return found


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2(groups, softplus):
    x, dt, B, C = (
        torch.randn(2, 5, 4, 3),
        torch.rand(2, 5, 4),
        torch.randn(2, 5, groups, 6),
        torch.randn(2, 5, groups, 6),
    )
    bias, limit = torch.randn(4), (0.2, 0.9)
    kwargs = {"dt_bias": bias, "dt_softplus": softplus, "dt_limit": limit, "D": torch.ones(4), "chunk_size": 4}
    wanted = naive(x, dt, B, C, bias, softplus, limit)
    found = mamba2_moments(SCAN_MOMENTS, x, dt, B, C, kwargs)
    assert found.keys() == wanted.keys() == set(SCAN_MOMENTS)
    for name, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_mamba(with_bias, dtype):
    """x and dt are (B, I, L), B and C (B, N, L)."""
    x, dt, B, C = (torch.randn(2, size, 5).to(dtype) for size in (6, 6, 3, 3))
    bias = torch.randn(6) if with_bias else None
    kwargs = {"delta_bias": bias, "delta_softplus": True, "z": torch.ones(2, 6, 5)}
    turned = (
        x.transpose(1, 2)[..., None],
        dt.transpose(1, 2),
        B.transpose(1, 2)[:, :, None],
        C.transpose(1, 2)[:, :, None],
    )
    wanted = naive(*turned, bias, True, (0, float("inf")))
    for name, value in mamba_moments(SCAN_MOMENTS, x, dt, B, C, kwargs).items():
        torch.testing.assert_close(value.double(), wanted[name], rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_for():
    x, dt, B, C = torch.randn(1, 4, 2, 1), torch.rand(1, 4, 2), torch.randn(1, 4, 1, 3), torch.randn(1, 4, 1, 3)
    assert mamba2_moments(("dt",), x, dt, B, C, {}).keys() == {"dt"}
    assert mamba2_moments((), x, dt, B, C, {}) == {}
