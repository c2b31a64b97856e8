# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 scan in torch against a step-by-step loop, transformers' scan and the squared errors its sums stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba import modeling_mamba

from optimum_ssm.errors import CalibrationError
from optimum_ssm.ops import selective_scan as module
from optimum_ssm.ops.selective_scan import SCAN_SUMS, allocate_sums, selective_scan


CHANNELS, STATES = 6, 4


def make_inputs(batch=2, length=37, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, CHANNELS, length),
        "dt": normal(batch, CHANNELS, length),
        "A": -torch.exp(normal(CHANNELS, STATES)),
        "B": normal(batch, STATES, length),
        "C": normal(batch, STATES, length),
        "D": normal(CHANNELS),
        "z": normal(batch, CHANNELS, length),
        "delta_bias": normal(CHANNELS),
        "delta_softplus": True,
    }


def make_sums(names=tuple(SCAN_SUMS), length=37, dtype=torch.float64):
    return allocate_sums(names, channels=CHANNELS, state_size=STATES, length=length, dtype=dtype)


def loop(x, dt, A, B, C, D, z, delta_bias, delta_softplus):
    """y, the last state and all sums, one time step after the other."""
    delta = F.softplus(dt + delta_bias[:, None])
    state = x.new_zeros(x.shape[0], *A.shape)
    outputs, sums = [], {"decay_error": 0, "state_energy": 0, "state_prev": [], "decay_sum": []}
    for t in range(x.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        output_map = C[:, None, :, t]
        sums["decay_error"] += (output_map**2 * (decay * state) ** 2).sum(0)
        sums["state_prev"].append((state**2).sum(0))
        sums["decay_sum"].append(decay.sum(0))
        state = decay * state + (delta[:, :, t] * x[:, :, t])[..., None] * B[:, None, :, t]
        sums["state_energy"] += ((output_map * state) ** 2).sum(0)
        outputs.append((output_map * state).sum(-1) + D * x[:, :, t])
    sums["state_prev"], sums["decay_sum"] = torch.stack(sums["state_prev"]), torch.stack(sums["decay_sum"])
    sums["state_prev_total"] = sums["state_prev"].sum(0)
    sums["gate_energy"] = F.silu(z).square().sum((0, 2))
    return torch.stack(outputs, dim=-1) * F.silu(z), state, sums


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("chunk_size", [None, 1, 8])
def test_equals_step_by_step_loop(length, chunk_size):
    inputs = make_inputs(length=length)
    expected_y, expected_state, expected_sums = loop(**inputs)
    sums = make_sums(length=length)
    y, state = selective_scan(**inputs, sums=sums, return_last_state=True, chunk_size=chunk_size)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
    assert set(sums) == set(expected_sums) == set(SCAN_SUMS)
    for name in sums:
        torch.testing.assert_close(sums[name], expected_sums[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize("optional", [(), ("D",), ("z",), ("delta_bias", "delta_softplus"), ("D", "z", "delta_bias")])
def test_equals_transformers(optional):
    inputs = make_inputs(length=67, dtype=torch.float32)
    inputs["dt"] = inputs["dt"].abs()  # a negative step would make the state grow without softplus
    inputs = {name: value for name, value in inputs.items() if name in ("x", "dt", "A", "B", "C", *optional)}
    if "delta_bias" in inputs:
        inputs["delta_softplus"] = True
    x = inputs.pop("x")
    original = modeling_mamba.mamba_selective_scan
    original = getattr(original, "__wrapped__", original)
    expected_y, expected_state = original(x, **inputs, return_last_state=True)
    y, state = selective_scan(x, **inputs, return_last_state=True, backend="torch")
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4)
    assert y.dtype == expected_y.dtype and y.shape == expected_y.shape


def test_chunk_size_only_rounds():
    inputs = make_inputs(length=129, dtype=torch.float32)
    reference = make_sums(length=129, dtype=torch.float32)
    expected = selective_scan(**inputs, sums=reference, chunk_size=129, backend="torch")
    for chunk_size in (1, 16, 50, 1000):
        sums = make_sums(length=129, dtype=torch.float32)
        y = selective_scan(**inputs, sums=sums, chunk_size=chunk_size, backend="torch")
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        for name in sums:
            torch.testing.assert_close(sums[name], reference[name], rtol=1e-5, atol=0, msg=name)


def test_decay_error_is_the_squared_error_of_a_memoryless_entry():
    inputs = make_inputs() | {"D": None, "z": None}
    sums = make_sums(["decay_error"])
    dense = selective_scan(**inputs, sums=sums)
    for channel, state in ((0, 0), (3, 2), (5, 3)):
        A = inputs["A"].clone()
        A[channel, state] = -torch.exp(torch.tensor(38.0))
        change = selective_scan(**inputs | {"A": A}) - dense
        measured = change.square().sum((0, 2))
        assert measured[channel] > 1e-3
        torch.testing.assert_close(measured[channel], sums["decay_error"][channel, state], rtol=1e-11, atol=0)
        assert measured.sum() == measured[channel]


def test_state_energy_is_the_squared_error_of_a_removed_state():
    inputs = make_inputs() | {"D": None, "z": None}
    sums = make_sums(["state_energy"])
    dense = selective_scan(**inputs, sums=sums)
    for state in range(STATES):
        C = inputs["C"].clone()
        C[:, state] = 0
        measured = (selective_scan(**inputs | {"C": C}) - dense).square().sum((0, 2))
        torch.testing.assert_close(measured, sums["state_energy"][:, state], rtol=1e-11, atol=0)


@pytest.mark.parametrize("step_elements", [1, 2 * CHANNELS * STATES, 2**17])
def test_batch_splits_and_adds(monkeypatch, step_elements):
    """Sums over a batch, however it is sliced inside, are the sums over its sequences added one after the other."""
    inputs = make_inputs(batch=5)
    one_by_one = make_sums()
    parts = []
    for index in range(5):
        part = {name: value[index : index + 1] for name, value in inputs.items() if name in ("x", "dt", "B", "C", "z")}
        parts.append(selective_scan(**inputs | part, sums=one_by_one))
    monkeypatch.setattr(module, "_CPU_STEP_ELEMENTS", step_elements)
    together = make_sums()
    y = selective_scan(**inputs, sums=together)
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-12, atol=1e-12)
    for name in together:
        torch.testing.assert_close(together[name], one_by_one[name], rtol=1e-12, atol=1e-14, msg=name)


def test_layout_of_inputs_and_sums_is_free():
    """Inputs may be views of [B, L, channels] tensors, sums may be contiguous, half inputs are computed in float32."""
    inputs = make_inputs(dtype=torch.bfloat16)
    sums = make_sums()
    y = selective_scan(**inputs, sums=sums, backend="torch")
    assert y.dtype == torch.bfloat16
    other = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    for name in ("x", "dt", "B", "C", "z"):
        other[name] = other[name].transpose(1, 2).contiguous().transpose(1, 2)
    contiguous = {name: torch.zeros(total.shape, dtype=torch.float32) for name, total in sums.items()}
    assert not sums["state_prev"].is_contiguous() and contiguous["state_prev"].is_contiguous()
    expected, state = selective_scan(**other, sums=contiguous, return_last_state=True, backend="torch")
    assert state.dtype == torch.float32
    torch.testing.assert_close(y, expected.bfloat16(), rtol=1e-2, atol=1e-2)
    for name in sums:
        torch.testing.assert_close(sums[name].float(), contiguous[name], rtol=1e-5, atol=0, msg=name)


def test_autocast_does_not_touch_the_arithmetic():
    inputs = make_inputs(dtype=torch.float32)
    expected = selective_scan(**inputs, backend="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(selective_scan(**inputs, backend="torch"), expected)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any new tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_never_holds_the_trajectory():
    inputs = make_inputs(batch=1, length=256)
    sums = make_sums(["decay_error", "state_energy", "state_prev_total", "gate_energy"])
    with LargestTensor() as largest:
        selective_scan(**inputs, sums=sums, chunk_size=16)
    assert largest.elements <= 256 * CHANNELS  # y; the trajectory would be STATES times larger


def test_refuses_wrong_sums():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="unknown sum 'energy'.*decay_error, state_energy"):
        selective_scan(**inputs, sums={"energy": torch.zeros(CHANNELS, STATES)})
    with pytest.raises(ValueError, match="unknown sum 'energy'"):
        make_sums(["energy"])
    with pytest.raises(ValueError, match=r"'state_energy' has shape \[1, 4\].*\[6, 4\] \(channels, state_size\)"):
        selective_scan(**inputs, sums={"state_energy": torch.zeros(1, STATES)})
    with pytest.raises(ValueError, match="'state_energy' is torch.bfloat16"):
        selective_scan(**inputs, sums={"state_energy": torch.zeros(CHANNELS, STATES, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="'gate_energy' needs the gate"):
        selective_scan(**inputs | {"z": None}, sums=make_sums(["gate_energy"]))
    with pytest.raises(ValueError, match="chunk_size is 0"):
        selective_scan(**inputs, chunk_size=0)


def test_refuses_to_detach_in_silence():
    inputs = make_inputs()
    inputs["A"].requires_grad_()
    with pytest.raises(CalibrationError, match="'A' requires grad"):
        selective_scan(**inputs)
    with torch.no_grad():
        assert not selective_scan(**inputs).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    inputs = make_inputs(length=300, dtype=torch.float32)
    expected_sums, sums = make_sums(length=300), make_sums(length=300)
    sums = {name: total.cuda() for name, total in sums.items()}
    expected = selective_scan(**inputs, sums=expected_sums, backend="torch")
    y = selective_scan(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}, sums=sums)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-5)
    for name in sums:
        torch.testing.assert_close(sums[name].cpu(), expected_sums[name], rtol=1e-4, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="is on cpu: it must be on cuda"):
        selective_scan(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}, sums=expected_sums)
