# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The kernel of matrix products against the float64 recurrence: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch

from optimum_ssm.ops.state_space_dual import state_space_dual

from .test_triton_state_space_dual import OPTIONAL, assert_close, make_inputs, on, reference, sums_for


# Two bfloat16 numbers hold a float32 one to 2^-16 (cut off, as the interpreter does) or 2^-17 (rounded).
TOLERANCE = 3e-5
# Sums have products of one bfloat16 number on a GPU, each of them wrong by up to 2^-9, and of float32 in the interpreter.
OF_SUMS = {"cpu": 1e-5, "cuda": 2e-3}


def bfloat16_inputs(device, *sizes):
    """What the kernel takes: x, B and C in bfloat16; and the same numbers in float64."""
    inputs = make_inputs(*sizes)
    for name in ("x", "B", "C"):
        inputs[name] = inputs[name].bfloat16().double()
    given = on(device, inputs)
    return given | {name: given[name].bfloat16() for name in ("x", "B", "C")}, inputs


def scanned(inputs, **options):
    return state_space_dual(**inputs, dt_softplus=True, return_final_states=True, backend="triton", **options)


@pytest.fixture(autouse=True)
def only_this_kernel(monkeypatch, triton_device):
    """The other one fails where it is called after all."""
    from optimum_ssm.ops import triton_state_space_dual

    monkeypatch.delattr(triton_state_space_dual, "_recur")


# (sequences, steps, heads, head dim, groups, states): parts of a chunk, whole ones, several, and groups
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 9, 4, 16, 2, 32),
        (1, 1, 1, 16, 1, 32),
        (1, 130, 2, 32, 1, 32),
        (2, 64, 2, 64, 1, 128),
        (1, 67, 6, 64, 3, 64),
    ],
)
def test_equals_the_recurrence_in_float64(triton_device, sizes):
    given, inputs = bfloat16_inputs(triton_device, *sizes)
    y, state, sums = reference(**inputs)
    got = sums_for(inputs, triton_device, dtype=torch.float64)
    got_y, got_state = scanned(given, sums=got)
    assert_close(got_y, y, TOLERANCE)
    assert_close(got_state, state, TOLERANCE)
    for name in sums:
        assert_close(got[name], sums[name], OF_SUMS[triton_device], name)
    assert got_y.dtype == got_state.dtype == torch.float32


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("states", [32, 64, 128])
def test_every_size_of_tile(triton_device, states, head_dim):
    given, inputs = bfloat16_inputs(triton_device, 1, 70, 2, head_dim, 1, states)
    y, state, sums = reference(**inputs)
    plain_y, plain_state = scanned(given)
    got = sums_for(inputs, triton_device)
    got_y, got_state = scanned(given, sums=got)
    assert_close(got_y, y, TOLERANCE)
    assert_close(got_state, state, TOLERANCE)
    for name in sums:
        assert_close(got[name], sums[name], OF_SUMS[triton_device], name)
    assert torch.equal(plain_y, got_y) and torch.equal(plain_state, got_state)


@pytest.mark.parametrize("asked", ["decay_error", "state_energy"])
def test_a_sum_does_not_depend_on_the_other_and_is_added_to(triton_device, asked):
    given, inputs = bfloat16_inputs(triton_device, 2, 70, 4, 16, 2, 32)
    expected = reference(**inputs)[2][asked]
    sums = sums_for(inputs, triton_device, (asked,))
    for part in (slice(0, 1), slice(1, 2)):
        own = {name: given[name][part] for name in ("x", "dt", "B", "C", "initial_states")}
        scanned(given | own, sums=sums)
    assert_close(sums[asked], expected, OF_SUMS[triton_device])


@pytest.mark.parametrize("rate", [1e-4, 1.0, 20.0, 100.0, math.exp(38)])
def test_sums_are_accurate_for_long_and_short_memory(triton_device, rate):
    """Inputs that cancel the state at every second step; every entry of a sum, also where next to nothing is left of it."""
    given, inputs = bfloat16_inputs(triton_device, 1, 100, 2, 16, 1, 32)
    for tensors in (given, inputs):
        tensors["A"] = torch.full_like(tensors["A"], -torch.tensor(rate).float())
        tensors["x"][:, 1::2] = -tensors["x"][:, ::2]
        tensors["B"][:, 1::2] = tensors["B"][:, ::2]
    expected = reference(**inputs)[2]
    sums = sums_for(inputs, triton_device)
    scanned(given, sums=sums)
    for name in sums:
        rtol = 20 * OF_SUMS[triton_device]  # the error is one of what was before it was cancelled
        torch.testing.assert_close(sums[name].double().cpu(), expected[name], rtol=rtol, atol=1e-30, msg=name)


def test_what_is_left_to_the_recurrence(triton_device):
    """Other sizes, other dtypes, and rows that do not lie as vectors are loaded."""
    from optimum_ssm.ops.triton_chunk_scan import suits

    given, _ = bfloat16_inputs(triton_device, 1, 3, 1, 16, 1, 64)
    x, B, C = (given[name] for name in ("x", "B", "C"))
    assert suits(x, B, C) and suits(x, B[..., :32], C[..., :32])
    assert not suits(x.float(), B, C) and not suits(x, B, C.float())
    assert not suits(x[..., :12], B, C) and not suits(x, B[..., :31], C[..., :31])
    assert not suits(x.transpose(1, 3).contiguous().transpose(1, 3), B, C)
    padded = torch.zeros(1, 3, 1, 72, dtype=torch.bfloat16, device=triton_device)
    assert not suits(x, padded[..., :64], C)


@pytest.mark.parametrize("missing", [*((name,) for name in OPTIONAL), OPTIONAL])
def test_what_may_be_missing(triton_device, missing):
    given, inputs = bfloat16_inputs(triton_device, 2, 70, 4, 16, 2, 32)
    given, inputs = ({n: t for n, t in tensors.items() if n not in missing} for tensors in (given, inputs))
    y, state, _ = reference(**inputs, limit=(0.05, 0.6))
    got_y, got_state = scanned(given, dt_limit=(0.05, 0.6))
    assert_close(got_y, y, TOLERANCE)
    assert_close(got_state, state, TOLERANCE)


@pytest.mark.parametrize("rate", [1e-4, 3.0, 100.0, math.exp(38), math.exp(88)])
def test_long_and_short_memory(triton_device, rate):
    """A memoryless head among them: nothing overflows, and its state is that of the last step."""
    given, inputs = bfloat16_inputs(triton_device, 1, 100, 2, 16, 1, 32)
    inputs["A"][0] = given["A"][0] = -torch.tensor(rate).float()
    y, state, _ = reference(**inputs)
    got_y, got_state = scanned(given)
    assert_close(got_y[:, :, 0], y[:, :, 0], TOLERANCE)
    assert_close(got_state[:, 0], state[:, 0], TOLERANCE)


def test_parts_of_a_convolution_output(triton_device):
    """x, B and C as views of one [B, L, channels], as the mixer cuts them."""
    given, inputs = bfloat16_inputs(triton_device, 2, 66, 2, 32, 2, 32)
    y = reference(**inputs)[0]
    rows = torch.cat([given[name].flatten(2) for name in ("x", "B", "C")], 2)
    parts = rows.split([64, 64, 64], 2)
    views = {name: part.unflatten(2, given[name].shape[2:]) for name, part in zip(("x", "B", "C"), parts)}
    assert_close(scanned(given | views)[0], y, TOLERANCE)


def test_non_finite_inputs_stay_so(triton_device):
    given, _ = bfloat16_inputs(triton_device, 1, 70, 2, 16, 1, 32)
    given["dt"][0, 3, 0] = math.nan
    y, state = scanned(given)
    assert y[0, 3:, 0].isnan().all() and state[0, 0].isnan().all()
    assert y[0, :, 1].isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_bit_for_bit_at_a_real_size(triton_device):
    given, inputs = bfloat16_inputs(triton_device, 2, 2048, 24, 64, 1, 128)
    wide = on(triton_device, inputs, torch.float64)
    expected = sums_for(inputs, triton_device, dtype=torch.float64)
    y = state_space_dual(**wide, dt_softplus=True, sums=expected, backend="torch")
    runs = [sums_for(inputs, triton_device, dtype=torch.float64) for _ in range(2)]
    first, second = (scanned(given, sums=run)[0] for run in runs)
    assert torch.equal(first, second) and all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert_close(first, y, 1e-5)
    for name in expected:
        torch.testing.assert_close(runs[0][name], expected[name], rtol=OF_SUMS["cuda"], atol=0, msg=name)
