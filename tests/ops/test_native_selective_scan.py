# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The scan in C against the float64 recurrence and the torch version, for every instruction set that it is written for."""

import math

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.ops import native_library
from optimum_ssm.ops.backend import scan_backend
from optimum_ssm.ops.selective_scan import SCAN_SUMS, selective_scan
from optimum_ssm.ops.state_space_dual import state_space_dual

from .test_triton_selective_scan import (
    PER_SEQUENCE,
    LargestTensor,
    assert_close,
    make_inputs,
    on,
    reference,
    sums_for,
)
from .test_triton_state_space_dual import make_inputs as mamba2_inputs


# (sequences, channels, states, steps): whole vectors and panels of channels and not, blocks of steps that are full, more
# than one and not full, one of everything, and more states than Triton allows.
SIZES = [
    (2, 6, 4, 9), (1, 19, 16, 70), (3, 33, 5, 64), (1, 1, 1, 1), (2, 150, 1, 3), (1, 64, 3, 129), (1, 17, 256, 9),
    (1, 3, 300, 6), (2, 128, 16, 1),
]  # fmt: skip
NATIVE = {"delta_softplus": True, "backend": "native"}


pytestmark = pytest.mark.usefixtures("compiled")


@pytest.fixture(scope="module", params=["native", "x86-64-v3", "x86-64"])
def instruction_set(request, tmp_path_factory):
    """The library for this processor, for AVX2 and for SSE2, where this processor has them."""
    patch = pytest.MonkeyPatch()
    patch.setenv(native_library.VARIABLE, str(tmp_path_factory.mktemp("cache")))
    patch.setattr(native_library, "NATIVE_FLAGS", ((f"-march={request.param}",),))
    if request.param == "x86-64-v3" and "AVX2" not in torch.backends.cpu.get_cpu_capability().replace(
        "AVX512", "AVX2"
    ):
        pytest.skip("this processor has no AVX2")
    try:
        built = native_library.build(native_library.SOURCES)
    except native_library.BuildError as error:
        pytest.skip(f"the compiler does not know -march={request.param}: {error}")
    patch.setattr(native_library, "_library", lambda: built)
    yield request.param
    patch.undo()


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_the_recurrence_in_float64(instruction_set, sizes):
    inputs = make_inputs(*sizes)
    y, state, sums = reference(**inputs)
    got = sums_for(inputs, "cpu")
    got_y, got_state = selective_scan(**on("cpu", inputs), sums=got, return_last_state=True, **NATIVE)
    assert_close(got_y, y)
    assert_close(got_state, state)
    assert set(got) == set(sums)
    for name in got:
        assert_close(got[name], sums[name], name=name)


@pytest.mark.parametrize(
    ("optional", "softplus"), [((), True), (("D",), False), (("z",), False), (("delta_bias",), True)]
)
def test_equals_torch(optional, softplus):
    inputs = {name: tensor for name, tensor in make_inputs().items() if name in ("x", "A", "B", "C", *optional)}
    inputs["dt"] = make_inputs()["dt"].abs()  # a negative step would make the state grow
    inputs = on("cpu", inputs)
    names = [name for name in SCAN_SUMS if "z" in optional or name != "gate_energy"]
    options = {"delta_softplus": softplus, "return_last_state": True}
    (y, state, sums), (got_y, got_state, got) = (
        (*selective_scan(**inputs, **options, sums=sums, backend=backend), sums)
        for backend, sums in ((name, sums_for(inputs, "cpu", names)) for name in ("torch", "native"))
    )
    assert_close(got_y, y)
    assert_close(got_state, state)
    assert got_y.dtype == y.dtype and got_y.stride() == y.stride() and got_state.stride() == state.stride()
    for name in names:
        assert_close(got[name], sums[name], name=name)


def test_y_and_a_sum_do_not_depend_on_the_others(instruction_set):
    """Not in one bit: a block gives the next one the same, whether its statistics are wanted or not."""
    inputs = on("cpu", make_inputs(2, 40, 5, 70))
    every = sums_for(inputs, "cpu")
    y, state = selective_scan(**inputs, sums=every, return_last_state=True, **NATIVE)
    for asked in ((), ("state_prev", "decay_sum"), *((name,) for name in SCAN_SUMS)):
        sums = sums_for(inputs, "cpu", asked)
        got_y, got_state = selective_scan(**inputs, sums=sums, return_last_state=True, **NATIVE)
        assert torch.equal(got_y, y) and torch.equal(got_state, state)
        for name in asked:
            # How many steps a block has depends on whether a sum is kept for every step.
            assert_close(sums[name], every[name], 1e-6, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype):
    """Only y is rounded: the state and the sums are those of the rounded inputs, to float32's accuracy."""
    inputs = on("cpu", make_inputs(), dtype)
    inputs["A"] = inputs["A"].float()
    y, state, expected = reference(**{name: tensor.double() for name, tensor in inputs.items()})
    sums = sums_for(inputs, "cpu")
    with torch.autocast("cpu", dtype=dtype):
        got_y, got_state = selective_scan(**inputs, sums=sums, return_last_state=True, **NATIVE)
    assert got_y.dtype == dtype and got_state.dtype == torch.float32
    assert_close(got_y, y, torch.finfo(dtype).eps / 2 * 1.01)
    assert_close(got_state, state)
    for name in sums:
        assert_close(sums[name], expected[name], name=name)


@pytest.mark.parametrize("time_first", [(), ("x",), ("z", "B", "C"), ("dt", "z"), PER_SEQUENCE])
def test_layouts_are_free_and_sums_are_added_to(instruction_set, time_first):
    """Views of [B, L, channels] tensors as transformers has them, contiguous and float64 accumulators, two calls."""
    inputs = make_inputs(3, 37, 4, 50)
    expected_y, _, expected = reference(**inputs)
    mixed = on("cpu", inputs)
    for name in time_first:
        mixed[name] = mixed[name].transpose(1, 2).contiguous().transpose(1, 2)
    mixed["dt"] = mixed["dt"].repeat_interleave(2, dim=1)[:, ::2]
    mixed["x"] = torch.stack([mixed["x"], mixed["z"]], dim=-1)[..., 0] if time_first == ("z", "B", "C") else mixed["x"]
    mixed["A"] = mixed["A"].t().contiguous().t()
    sums = {
        name: torch.ones(total.shape, dtype=torch.float64 if "e" in name[:2] else None)
        for name, total in expected.items()
    }
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        own = {name: mixed[name][part] for name in PER_SEQUENCE}
        parts.append(selective_scan(**mixed | own, sums=sums, **NATIVE))
    assert_close(torch.cat(parts), expected_y)
    for name in sums:
        assert_close(sums[name], expected[name] + 1, name=name)


def test_float64_sums_lose_nothing_over_many_calls():
    inputs = on("cpu", make_inputs(1, 20, 4, 30))
    names = ["decay_error", "state_energy", "state_prev_total", "gate_energy"]
    once, often = (sums_for(inputs, "cpu", names, torch.float64) for _ in range(2))
    selective_scan(**inputs, sums=once, **NATIVE)
    for _ in range(50):
        selective_scan(**inputs, sums=often, **NATIVE)
    for name in names:
        assert_close(often[name], 50 * once[name], 1e-14, name)


@pytest.mark.parametrize("fill", [38.0, 88.5])
def test_memoryless_entries_are_finite_and_decay_to_zero(instruction_set, fill):
    """Rates at the end of float32, with steps so large that their product overflows, and steps of 0."""
    inputs = make_inputs()
    inputs["A"][1] = -min(math.exp(fill), torch.finfo(torch.float32).max)
    inputs["dt"][:, :, ::5] += 50
    inputs["dt"][:, :, 1::5] = -300  # softplus is 0 in float32
    y, state, expected = reference(**inputs)
    sums = sums_for(inputs, "cpu", ["decay_error", "state_energy", "decay_sum"])
    got = selective_scan(**on("cpu", inputs), sums=sums, **NATIVE)
    assert_close(got, y)
    for name in sums:
        assert_close(sums[name], expected[name], name=name)
    moving = torch.ones(inputs["x"].shape[2], dtype=torch.bool)
    moving[1::5] = False
    assert sums["decay_sum"][moving, 1].eq(0).all() and sums["decay_sum"][~moving, 1].eq(2).all()


def test_decays_are_exact_to_two_units_in_the_last_place(instruction_set):
    """A state of 1 after the first step is its decay after the second, exp(A). SSE2 has no fused products: 3 units."""
    A = torch.linspace(-95, 88, 20001)[:, None]
    x = torch.zeros(1, len(A), 2)
    x[..., 0] = 1
    ones = torch.ones(1, 1, 2)
    options = {"return_last_state": True, "backend": "native"}
    state = selective_scan(x, torch.ones_like(x), A, ones, ones, **options)[1][0].double()
    exact = A.double().exp()
    normal = exact >= torch.finfo(torch.float32).tiny
    units = 3 if instruction_set == "x86-64" else 2
    assert ((state - exact).abs() <= units * exact * torch.finfo(torch.float32).eps)[normal].all()
    assert (state - exact).abs()[~normal].max() <= torch.finfo(torch.float32).tiny
    assert state[exact < 1e-39].eq(0).all() and state[A.eq(A.max())].isfinite().all()


@pytest.mark.parametrize("shift", [-80.0, -16.0, -7.0, 0.0, 19.9, 30.0])
def test_softplus_keeps_small_and_large_steps(instruction_set, shift):
    """With A = 0 and ones elsewhere the state after one step is the step, softplus(dt)."""
    dt = torch.linspace(-1, 1, 33, dtype=torch.float64).view(1, 33, 1).float() + shift
    ones = torch.ones(1, 1, 1)
    y = selective_scan(torch.ones(1, 33, 1), dt, torch.zeros(33, 1), ones, ones, **NATIVE)
    torch.testing.assert_close(y.double(), dt.double().exp().log1p(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "delta_bias"])
def test_what_is_not_finite_stays_so(instruction_set, name, value):
    """Where torch gives NaN or an infinity, C does, and nowhere else."""
    inputs = on("cpu", make_inputs(2, 20, 4, 11))
    inputs[name].view(-1)[inputs[name].numel() // 2] = value
    expected, sums = sums_for(inputs, "cpu"), sums_for(inputs, "cpu")
    y = selective_scan(**inputs, sums=expected, delta_softplus=True, backend="torch")
    got = selective_scan(**inputs, sums=sums, **NATIVE)
    assert torch.equal(got.isfinite(), y.isfinite())
    for key in sums:
        assert torch.equal(sums[key].isfinite(), expected[key].isfinite()), key


@pytest.mark.parametrize("names", [(), ("decay_error",), tuple(SCAN_SUMS)])
def test_threads_do_not_change_a_bit(names):
    inputs = on("cpu", make_inputs(2, 330, 16, 300))  # enough work for several threads, with a panel that is not full
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            sums = sums_for(inputs, "cpu", names)
            found.append((selective_scan(**inputs, sums=sums, **NATIVE), sums))
    finally:
        torch.set_num_threads(before)
    for y, sums in found[1:]:
        assert torch.equal(y, found[0][0])
        assert all(torch.equal(sums[name], found[0][1][name]) for name in names)


def test_never_holds_the_trajectory():
    inputs = on("cpu", make_inputs(batch=1, channels=24, states=8, length=16))
    sums = sums_for(inputs, "cpu", ["decay_error", "state_energy", "state_prev_total", "gate_energy"])
    with LargestTensor() as largest:
        selective_scan(**inputs, sums=sums, **NATIVE)
    assert largest.elements <= 2 * 24 * 16  # y, and float64 sums over time


def test_refuses_what_it_cannot_scan():
    inputs = on("cpu", make_inputs())
    with pytest.raises(
        ConfigurationError, match="the native scan cannot run: x is torch.float64, allowed are float32"
    ):
        selective_scan(**make_inputs(), **NATIVE)
    with pytest.raises(ConfigurationError, match="x is on meta, it must be on the CPU"):
        scan_backend(inputs["x"].to("meta"), 4, "native")
    for name, change in (("dt", lambda t: t[:, :-1]), ("C", lambda t: t[..., :-1]), ("D", lambda t: t[:1])):
        with pytest.raises(ConfigurationError, match=rf"'{name}' has shape .*: it must be"):
            selective_scan(**inputs | {name: change(inputs[name])}, **NATIVE)
    empty = {name: inputs[name][:0] for name in PER_SEQUENCE}
    assert selective_scan(**inputs | empty, **NATIVE).shape == empty["x"].shape


def test_mamba2_has_no_native_scan(monkeypatch):
    inputs = on("cpu", mamba2_inputs())
    with pytest.raises(
        ConfigurationError, match="'native', which only Mamba's scan has: allowed are auto, torch, triton"
    ):
        state_space_dual(**inputs, backend="native")
    expected = state_space_dual(**inputs, backend="torch")
    monkeypatch.setenv("OPTIMUM_SSM_SCAN", "native")
    assert torch.equal(state_space_dual(**inputs), expected)


def test_auto_is_native_on_the_cpu(monkeypatch):
    monkeypatch.delenv("OPTIMUM_SSM_SCAN", raising=False)
    inputs = on("cpu", make_inputs(1, 40, 16, 64))
    native, torch_ = (selective_scan(**inputs, delta_softplus=True, backend=name) for name in ("native", "torch"))
    assert not torch.equal(native, torch_)
    assert torch.equal(selective_scan(**inputs, delta_softplus=True), native)
    monkeypatch.setenv("OPTIMUM_SSM_SCAN", "torch")
    assert torch.equal(selective_scan(**inputs, delta_softplus=True), torch_)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_no_matter(dtype):
    inputs = on("cpu", make_inputs(2, 20, 4, 9))
    wanted = selective_scan(**inputs, return_last_state=True, **NATIVE)
    torch.set_default_dtype(dtype)
    try:
        found = selective_scan(**inputs, return_last_state=True, **NATIVE)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) and one.dtype == torch.float32 for one, other in zip(found, wanted))


def test_no_state_at_all():
    """What is left is the skip connection and the gate, as in torch."""
    inputs = on("cpu", make_inputs(1, 20, 4, 9))
    inputs |= {"A": inputs["A"][:, :0], "B": inputs["B"][:, :0], "C": inputs["C"][:, :0]}
    assert_close(selective_scan(**inputs, **NATIVE), selective_scan(**inputs, **NATIVE | {"backend": "torch"}))
