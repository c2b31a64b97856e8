# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 kernel against the float64 recurrence and the torch version: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F

from optimum_ssm.ops.state_space_dual import SCAN_SUMS, allocate_sums, state_space_dual

from ..reference import _recur


# (sequences, steps, heads, head dim, groups, states)
SIZES = [(2, 9, 4, 3, 2, 5), (1, 4, 2, 64, 1, 16), (1, 5, 6, 8, 3, 128), (1, 1, 1, 1, 1, 1), (1, 3, 2, 20, 2, 200)]
OPTIONAL = ("D", "dt_bias", "initial_states")


def make_inputs(batch=2, length=7, heads=4, head_dim=3, groups=2, states=5):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": normal(batch, length, heads),
        "A": -torch.exp(normal(heads)).float().double(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
        "dt_bias": normal(heads) - 2,
        "initial_states": normal(batch, heads, head_dim, states),
    }


def on(device, inputs, dtype=torch.float32):
    return {name: tensor.to(device, dtype) for name, tensor in inputs.items()}


def sums_for(inputs, device, names=tuple(SCAN_SUMS), dtype=torch.float32):
    heads, states = inputs["x"].shape[2], inputs["B"].shape[3]
    return allocate_sums(names, heads=heads, state_size=states, device=device, dtype=dtype)


def reference(x, dt, A, B, C, D=None, dt_bias=None, initial_states=None, limit=(0.0, math.inf)):
    """y, the last state and both sums from every state of the recurrence, in the dtype of the inputs."""
    heads, groups = x.shape[2], B.shape[2]
    delta = F.softplus(dt if dt_bias is None else dt + dt_bias).clamp(*limit).transpose(0, 1)
    B, C = (maps.repeat_interleave(heads // groups, dim=2).transpose(0, 1)[..., None, :] for maps in (B, C))
    decay = torch.exp(delta * A)[..., None, None]
    drive = (delta[..., None] * x.transpose(0, 1))[..., None] * B
    # The state before the first step enters as what an earlier step leaves.
    first = torch.zeros_like(drive[:1]) if initial_states is None else initial_states[None]
    rows = (torch.cat([tensor[:1], tensor]) for tensor in (decay, C))
    decay, C = rows
    seen, y = _recur(decay, torch.cat([first, drive]), C)
    seen = {name: tensor[1:] for name, tensor in seen.items()}
    y = y[1:].transpose(0, 1)
    sums = {
        "decay_error": (seen["readout"] * seen["decay"] * seen["before"]).square().sum((0, 1, 3, 4)),
        "state_energy": (seen["readout"] * seen["after"]).square().sum((0, 1, 3)),
    }
    return y if D is None else y + D[:, None] * x, seen["after"][-1], sums


def assert_close(actual, expected, tolerance=1e-5, name=""):
    """Within `tolerance` of the largest entry."""
    error = (actual.double().cpu() - expected.double().cpu()).abs().max()
    assert error <= tolerance * expected.abs().max().clamp(min=1e-30), (name, error)
    assert actual.shape == expected.shape


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_recurrence_in_float64(triton_device, sizes):
    inputs = make_inputs(*sizes)
    y, state, sums = reference(**inputs)
    got = sums_for(inputs, triton_device)
    options = {"sums": got, "return_final_states": True, "dt_softplus": True, "backend": "triton"}
    got_y, got_state = state_space_dual(**on(triton_device, inputs), **options)
    assert_close(got_y, y)
    assert_close(got_state, state)
    assert set(got) == set(sums) == set(SCAN_SUMS)
    for name in got:
        assert_close(got[name], sums[name], name=name)


@pytest.mark.parametrize("missing", [(), *((name,) for name in OPTIONAL), OPTIONAL])
def test_equals_torch(triton_device, missing):
    inputs = {name: tensor for name, tensor in on(triton_device, make_inputs()).items() if name not in missing}
    options = {
        "dt_softplus": True,
        "dt_limit": (0.05, 0.6) if missing else (0.0, math.inf),
        "return_final_states": True,
    }
    (y, state, sums), (got_y, got_state, got) = (
        (*state_space_dual(**inputs, **options, sums=sums, backend=backend), sums)
        for backend, sums in ((name, sums_for(inputs, triton_device)) for name in ("torch", "triton"))
    )
    assert_close(got_y, y)
    assert_close(got_state, state)
    assert got_y.dtype == y.dtype == got_state.dtype == torch.float32 and got_y.stride() == y.stride()
    for name in sums:
        assert_close(got[name], sums[name], name=name)


@pytest.mark.parametrize("asked", [(), ("decay_error",), ("state_energy",)])
def test_a_sum_does_not_depend_on_the_other(triton_device, asked):
    inputs = make_inputs(batch=1)
    y, state, expected = reference(**inputs)
    sums = sums_for(inputs, triton_device, asked)
    options = {"dt_softplus": True, "return_final_states": True, "backend": "triton"}
    got_y, got_state = state_space_dual(**on(triton_device, inputs), sums=sums, **options)
    assert_close(got_y, y)
    assert_close(got_state, state)
    for name in asked:
        assert_close(sums[name], expected[name], name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(triton_device, dtype):
    inputs = on(triton_device, make_inputs(), dtype)
    inputs |= {name: inputs[name].float() for name in ("A", "dt_bias", "dt")}
    y, state, expected = reference(**{name: tensor.double().cpu() for name, tensor in inputs.items()})
    sums = sums_for(inputs, triton_device, dtype=torch.float64)
    with torch.autocast(triton_device, dtype=dtype):
        got_y, got_state = state_space_dual(
            **inputs, dt_softplus=True, sums=sums, return_final_states=True, backend="triton"
        )
    assert_close(got_y, y)
    assert_close(got_state, state)
    for name in sums:
        assert_close(sums[name], expected[name], name=name)


def test_layouts_are_free_and_sums_are_added_to(triton_device):
    """x, B and C as views of a [B, channels, L] convolution output, as transformers has them; two calls."""
    inputs = make_inputs(batch=3)
    expected = reference(**inputs)[2]
    mixed = on(triton_device, inputs)
    for name in ("x", "B", "C"):
        mixed[name] = mixed[name].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    mixed["initial_states"] = mixed["initial_states"].mT.contiguous().mT
    mixed["dt"] = mixed["dt"].repeat_interleave(2, dim=2)[..., ::2]
    sums = {name: torch.ones(total.shape, device=triton_device) for name, total in expected.items()}
    for part in (slice(0, 1), slice(1, 3)):
        own = {name: mixed[name][part] for name in ("x", "dt", "B", "C", "initial_states")}
        state_space_dual(**mixed | own, dt_softplus=True, sums=sums, backend="triton")
    for name in sums:
        assert_close(sums[name], expected[name] + 1, name=name)


@pytest.mark.parametrize("rate", [1e-4, 100.0, math.exp(38), math.exp(88)])
def test_sums_are_accurate_for_long_and_short_memory(triton_device, rate):
    """Inputs that cancel the state at every second step; every entry of a sum to float32's accuracy."""
    inputs = make_inputs(1, 24, 2, 3, 1, 5)
    inputs["A"] = torch.full_like(inputs["A"], -rate).float().double()
    inputs["x"][:, 1::2] = -inputs["x"][:, ::2]
    inputs["B"][:, 1::2] = inputs["B"][:, ::2]
    expected = reference(**inputs)[2]
    sums = sums_for(inputs, triton_device)
    y = state_space_dual(**on(triton_device, inputs), dt_softplus=True, sums=sums, backend="triton")
    assert y.isfinite().all()
    for name in sums:
        torch.testing.assert_close(sums[name].double().cpu(), expected[name], rtol=2e-4, atol=1e-12, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_bit_for_bit_at_a_real_size(triton_device):
    inputs = on(triton_device, make_inputs(2, 2048, 24, 64, 1, 128))
    expected = sums_for(inputs, triton_device)
    y = state_space_dual(**inputs, dt_softplus=True, sums=expected, backend="torch")
    runs = [sums_for(inputs, triton_device) for _ in range(2)]
    first, second = (state_space_dual(**inputs, dt_softplus=True, sums=run) for run in runs)
    assert torch.equal(first, second) and all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert_close(first, y, 2e-5)
    for name in expected:
        assert_close(runs[0][name], expected[name], 5e-5, name)
