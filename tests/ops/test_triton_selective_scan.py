# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 kernel against the float64 recurrence and the torch version: on a GPU, or in Triton's interpreter."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_ssm.ops.selective_scan import SCAN_SUMS, allocate_sums, selective_scan

from ..reference import _recur


# (sequences, channels, states, steps): programs and groups of steps that are full and that are not, state sizes that
# are powers of two and that are not, one of everything, and the largest blocks.
SIZES = [(2, 6, 4, 9), (1, 19, 16, 16), (3, 33, 5, 7), (1, 1, 1, 1), (2, 40, 1, 3), (1, 3, 100, 6), (1, 9, 200, 5)]
PER_SEQUENCE = ("x", "dt", "B", "C", "z")


def make_inputs(batch=2, channels=6, states=4, length=11):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().double()

    return {
        "x": normal(batch, channels, length),
        "dt": normal(batch, channels, length),
        "A": -torch.exp(normal(channels, states)).float().double(),
        "B": normal(batch, states, length),
        "C": normal(batch, states, length),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": normal(channels) - 1,
    }


def on(device, inputs, dtype=torch.float32):
    return {name: None if tensor is None else tensor.to(device, dtype) for name, tensor in inputs.items()}


def sums_for(inputs, device, names=tuple(SCAN_SUMS), dtype=torch.float32):
    (channels, states), length = inputs["A"].shape, inputs["x"].shape[2]
    return allocate_sums(names, channels=channels, state_size=states, length=length, device=device, dtype=dtype)


def reference(x, dt, A, B, C, D=None, z=None, delta_bias=None, softplus=True):
    """y, the last state and all sums from every decay and state of the recurrence, in the dtype of the inputs."""
    delta = dt if delta_bias is None else dt + delta_bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    steps, maps = delta.permute(2, 0, 1)[..., None], B.permute(2, 0, 1)[:, :, None]
    seen, y = _recur(
        torch.exp(steps * A), steps * x.permute(2, 0, 1)[..., None] * maps, C.permute(2, 0, 1)[:, :, None]
    )
    y = y.permute(1, 2, 0)
    if D is not None:
        y = y + D[:, None] * x
    sums = {
        "decay_error": (seen["readout"] * seen["decay"] * seen["before"]).square().sum((0, 1)),
        "state_energy": (seen["readout"] * seen["after"]).square().sum((0, 1)),
        "state_prev_total": seen["before"].square().sum((0, 1)),
        "state_prev": seen["before"].square().sum(1),
        "decay_sum": seen["decay"].sum(1),
    }
    if z is not None:
        y, sums["gate_energy"] = y * F.silu(z), F.silu(z).square().sum((0, 2))
    return y, seen["after"][-1], sums


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
    options = {"sums": got, "return_last_state": True, "delta_softplus": True, "backend": "triton"}
    got_y, got_state = selective_scan(**on(triton_device, inputs), **options)
    assert_close(got_y, y)
    assert_close(got_state, state)
    assert set(got) == set(sums)
    for name in got:
        assert_close(got[name], sums[name], name=name)


@pytest.mark.parametrize(
    ("optional", "softplus"), [((), True), (("D",), False), (("z",), False), (("delta_bias",), True)]
)
def test_equals_torch(triton_device, optional, softplus):
    inputs = {name: tensor for name, tensor in make_inputs().items() if name in ("x", "A", "B", "C", *optional)}
    inputs["dt"] = make_inputs()["dt"].abs()  # a negative step would make the state grow
    inputs = on(triton_device, inputs)
    names = [name for name in SCAN_SUMS if "z" in optional or name != "gate_energy"]
    options = {"delta_softplus": softplus, "return_last_state": True}
    (y, state, sums), (got_y, got_state, got) = (
        (*selective_scan(**inputs, **options, sums=sums, backend=backend), sums)
        for backend, sums in ((name, sums_for(inputs, triton_device, names)) for name in ("torch", "triton"))
    )
    assert_close(got_y, y)
    assert_close(got_state, state)
    assert got_y.dtype == y.dtype and got_y.stride() == y.stride() and got_state.stride() == state.stride()
    for name in names:
        assert_close(got[name], sums[name], name=name)


def test_a_sum_does_not_depend_on_the_others(triton_device):
    inputs = make_inputs(batch=1, length=9)
    y, state, expected = reference(**inputs)
    for asked in ((), *((name,) for name in SCAN_SUMS)):
        sums = sums_for(inputs, triton_device, asked)
        options = {"delta_softplus": True, "return_last_state": True, "backend": "triton"}
        got_y, got_state = selective_scan(**on(triton_device, inputs), sums=sums, **options)
        assert_close(got_y, y)
        assert_close(got_state, state)
        for name in asked:
            assert_close(sums[name], expected[name], name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(triton_device, dtype):
    """Only y is rounded: the state and the sums are those of the rounded inputs, to float32's accuracy."""
    inputs = on(triton_device, make_inputs(), dtype)
    inputs["A"] = inputs["A"].float()
    exact = {name: tensor.double().cpu() for name, tensor in inputs.items()}
    y, state, expected = reference(**exact)
    sums = sums_for(inputs, triton_device)
    with torch.autocast(triton_device, dtype=dtype):
        got_y, got_state = selective_scan(
            **inputs, delta_softplus=True, sums=sums, return_last_state=True, backend="triton"
        )
    assert got_y.dtype == dtype and got_state.dtype == torch.float32
    assert_close(got_y, y, torch.finfo(dtype).eps)  # half of it on a GPU: the interpreter truncates
    assert_close(got_state, state)
    for name in sums:
        assert_close(sums[name], expected[name], name=name)


def test_layouts_are_free_and_sums_are_added_to(triton_device):
    """Views of [B, L, channels] tensors as transformers has them, contiguous and float64 accumulators, two calls."""
    inputs = make_inputs(batch=3)
    expected = reference(**inputs)[2]
    mixed = on(triton_device, inputs)
    for name in ("z", "B", "C"):
        mixed[name] = mixed[name].transpose(1, 2).contiguous().transpose(1, 2)
    mixed["dt"] = mixed["dt"].repeat_interleave(2, dim=1)[:, ::2]
    mixed["A"] = mixed["A"].t().contiguous().t()
    sums = {
        name: torch.ones(total.shape, device=triton_device, dtype=torch.float64 if "e" in name[:2] else None)
        for name, total in expected.items()
    }
    for part in (slice(0, 1), slice(1, 3)):
        own = {name: mixed[name][part] for name in PER_SEQUENCE}
        selective_scan(**mixed | own, delta_softplus=True, sums=sums, backend="triton")
    for name in sums:
        assert_close(sums[name], expected[name] + 1, name=name)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("fill", [38.0, 88.5])
def test_memoryless_entries_are_finite(triton_device, fill):
    """Rates at the end of float32, with steps so large that their product overflows, and steps of 0."""
    inputs = make_inputs()
    inputs["A"][1] = -min(math.exp(fill), torch.finfo(torch.float32).max)
    inputs["dt"][:, :, ::5] += 50
    inputs["dt"][:, :, 1::5] = -300  # softplus is 0 in float32
    y, state, expected = reference(**{name: tensor.double() for name, tensor in inputs.items()})
    sums = sums_for(inputs, triton_device, ["decay_error", "state_energy"])
    got = selective_scan(**on(triton_device, inputs), delta_softplus=True, sums=sums, backend="triton")
    assert_close(got, y)
    for name in sums:
        assert_close(sums[name], expected[name], name=name)


@pytest.mark.parametrize("shift", [-80.0, -16.0, -7.0, 0.0, 19.9, 30.0])
def test_softplus_keeps_small_and_large_steps(triton_device, shift):
    """With A = 0 and ones elsewhere the state after one step is the step, softplus(dt)."""
    dt = torch.linspace(-1, 1, 33, dtype=torch.float64).view(1, 33, 1).float() + shift
    ones = torch.ones(1, 1, 1)
    inputs = {"x": torch.ones(1, 33, 1), "dt": dt, "A": torch.zeros(33, 1), "B": ones, "C": ones}
    y = selective_scan(**on(triton_device, inputs), delta_softplus=True, backend="triton")
    expected = dt.double().exp().log1p()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=3e-6 if shift > -50 else 1e-5, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most float32 numbers that would fit into any new tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 4)  # also of bytes
        return result


def test_never_holds_the_trajectory(triton_device):
    inputs = on(triton_device, make_inputs(batch=1, channels=24, states=8, length=16))
    sums = sums_for(inputs, triton_device, ["decay_error", "state_energy", "state_prev_total", "gate_energy"])
    with LargestTensor() as largest:
        selective_scan(**inputs, delta_softplus=True, sums=sums, backend="triton")
    assert largest.elements <= 24 * 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_repeats_bit_for_bit_at_a_real_size(triton_device):
    inputs = on(triton_device, make_inputs(2, 768, 16, 2048), torch.bfloat16)
    inputs["A"] = inputs["A"].float()
    expected = sums_for(inputs, triton_device)
    y = selective_scan(**inputs, delta_softplus=True, sums=expected, backend="torch")
    runs = [sums_for(inputs, triton_device) for _ in range(2)]
    first, second = (selective_scan(**inputs, delta_softplus=True, sums=run) for run in runs)
    assert torch.equal(first, second) and all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert_close(first, y, 2.0**-7)
    for name in expected:
        assert_close(runs[0][name], expected[name], 2e-5, name)
