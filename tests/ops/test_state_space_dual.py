# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 scan against a step-by-step loop, transformers' scan and the squared errors its sums stand for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba2 import modeling_mamba2

from optimum_ssm.errors import CalibrationError
from optimum_ssm.ops.state_space_dual import SCAN_SUMS, allocate_sums, state_space_dual


HEADS, HEAD_DIM, GROUPS, STATES = 4, 3, 2, 5


def make_inputs(batch=2, length=37, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, HEADS, HEAD_DIM),
        "dt": normal(batch, length, HEADS),
        "A": -torch.exp(normal(HEADS)),
        "B": normal(batch, length, GROUPS, STATES),
        "C": normal(batch, length, GROUPS, STATES),
        "D": normal(HEADS),
        "dt_bias": normal(HEADS) - 2,
        "dt_softplus": True,
        "initial_states": normal(batch, HEADS, HEAD_DIM, STATES),
    }


def make_sums(names=tuple(SCAN_SUMS), dtype=torch.float64):
    return allocate_sums(names, heads=HEADS, state_size=STATES, dtype=dtype)


def loop(x, dt, A, B, C, D, dt_bias, dt_softplus, initial_states, dt_limit=(0.0, math.inf)):
    """y, the final state and both sums, one time step after the other."""
    delta = F.softplus(dt + dt_bias).clamp(*dt_limit)
    B, C = (maps.repeat_interleave(HEADS // GROUPS, dim=2) for maps in (B, C))
    state, outputs, sums = initial_states, [], {"decay_error": 0, "state_energy": 0}
    for t in range(x.shape[1]):
        decayed = torch.exp(delta[:, t] * A)[:, :, None, None] * state
        output_map = C[:, t, :, None, :]
        sums["decay_error"] += ((output_map * decayed) ** 2).sum((0, 2, 3))
        state = decayed + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        sums["state_energy"] += ((output_map * state) ** 2).sum((0, 2))
        outputs.append((output_map * state).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, dim=1), state, sums


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("chunk_size", [1, 8, 64])
def test_equals_step_by_step_loop(length, chunk_size):
    inputs = make_inputs(length=length)
    expected_y, expected_state, expected_sums = loop(**inputs, dt_limit=(0.05, 0.6))
    sums = make_sums()
    y, state = state_space_dual(
        **inputs, dt_limit=(0.05, 0.6), sums=sums, return_final_states=True, chunk_size=chunk_size
    )
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
    assert set(sums) == set(expected_sums) == set(SCAN_SUMS)
    for name in sums:
        torch.testing.assert_close(sums[name], expected_sums[name], rtol=1e-11, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "missing", [(), ("initial_states",), ("D",), ("dt_bias",), ("D", "dt_bias", "initial_states")]
)
@pytest.mark.parametrize("dt_limit", [(0.0, math.inf), (0.05, 0.6)])
def test_equals_transformers(missing, dt_limit):
    inputs = make_inputs(length=67, dtype=torch.float32) | {"dt_limit": dt_limit}
    inputs = {name: value for name, value in inputs.items() if name not in missing}
    x = inputs.pop("x")
    original = modeling_mamba2.mamba2_chunk_scan
    original = getattr(original, "__wrapped__", original)
    expected_y, expected_state = original(x, **inputs, chunk_size=16, return_final_states=True)
    y, state = state_space_dual(x, **inputs, return_final_states=True)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-4)
    assert y.dtype == expected_y.dtype and y.shape == expected_y.shape


def test_chunk_size_only_rounds():
    inputs = make_inputs(length=129, dtype=torch.float32)
    reference = make_sums(dtype=torch.float32)
    expected = state_space_dual(**inputs, sums=reference, chunk_size=129)
    for chunk_size in (1, 16, 50, 1000):
        sums = make_sums(dtype=torch.float32)
        y = state_space_dual(**inputs, sums=sums, chunk_size=chunk_size)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for name in sums:
            torch.testing.assert_close(sums[name], reference[name], rtol=1e-5, atol=0, msg=name)


@pytest.mark.parametrize("decay_rate", [1e-4, 1.0, 100.0])
def test_sums_are_accurate_in_float32(decay_rate):
    """The norms come from a recursion that subtracts: long memory, short memory and inputs that cancel the state."""
    inputs = make_inputs(length=400)
    inputs["A"] = torch.full((HEADS,), -decay_rate, dtype=torch.float64)
    inputs["x"][:, 1::2] = -inputs["x"][:, ::2]
    inputs["B"][:, 1::2] = inputs["B"][:, ::2]
    expected = loop(**inputs)[2]
    sums = make_sums(dtype=torch.float32)
    state_space_dual(**{k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}, sums=sums)
    for name in sums:
        torch.testing.assert_close(sums[name], expected[name].float(), rtol=1e-4, atol=1e-12, msg=name)


def test_decay_error_is_the_squared_error_of_memoryless_states():
    """With C reduced to one state, a memoryless head changes y by that state alone; decay_error adds them up."""
    inputs = make_inputs() | {"D": None}
    sums = make_sums(["decay_error"])
    state_space_dual(**inputs, sums=sums)
    for head in range(HEADS):
        A = inputs["A"].clone()
        A[head] = -math.exp(38)
        measured = 0
        for state in range(STATES):
            only = torch.zeros_like(inputs["C"])
            only[..., state] = inputs["C"][..., state]
            change = state_space_dual(**inputs | {"C": only}) - state_space_dual(**inputs | {"C": only, "A": A})
            measured += change.square().sum((0, 1, 3))
        torch.testing.assert_close(measured[head], sums["decay_error"][head], rtol=1e-11, atol=0)
        assert measured[head] > 1e-3 and measured.sum() == measured[head]


def test_state_energy_is_the_squared_error_of_a_removed_state():
    inputs = make_inputs() | {"D": None}
    sums = make_sums(["state_energy"])
    dense = state_space_dual(**inputs, sums=sums)
    for group in range(GROUPS):
        heads = slice(group * HEADS // GROUPS, (group + 1) * HEADS // GROUPS)
        for state in range(STATES):
            C = inputs["C"].clone()
            C[:, :, group, state] = 0
            measured = (state_space_dual(**inputs | {"C": C}) - dense).square().sum((0, 1, 3))
            torch.testing.assert_close(measured[heads], sums["state_energy"][heads, state], rtol=1e-11, atol=0)
            torch.testing.assert_close(measured.sum(), measured[heads].sum())


@pytest.mark.parametrize("fill", [38.0, 88.0])
def test_memoryless_head_is_finite(fill):
    inputs = make_inputs(dtype=torch.float32) | {"initial_states": None}
    inputs["A"][1] = -math.exp(fill)
    inputs["dt"][:, ::5] += 50.0  # large steps overflow A·Δ in float32
    sums = make_sums(dtype=torch.float32)
    y = state_space_dual(**inputs, sums=sums)
    delta = F.softplus(inputs["dt"] + inputs["dt_bias"])[:, :, 1, None]
    gain = (inputs["B"][:, :, 0] * inputs["C"][:, :, 0]).sum(-1, keepdim=True)
    torch.testing.assert_close(
        y[:, :, 1], (delta * gain + inputs["D"][1]) * inputs["x"][:, :, 1], rtol=1e-4, atol=1e-4
    )
    assert y.isfinite().all() and all(total.isfinite().all() for total in sums.values())
    assert sums["decay_error"][1] == 0 and (sums["decay_error"][[0, 2, 3]] > 0).all()


def test_batch_splits_and_adds():
    inputs = make_inputs(batch=3)
    together, one_by_one = make_sums(), make_sums()
    y = state_space_dual(**inputs, sums=together)
    per_sequence = ("x", "dt", "B", "C", "initial_states")
    for index in range(3):
        part = {name: inputs[name][index : index + 1] for name in per_sequence}
        torch.testing.assert_close(
            state_space_dual(**inputs | part, sums=one_by_one), y[index : index + 1], rtol=1e-12, atol=1e-12
        )
    for name in together:
        torch.testing.assert_close(together[name], one_by_one[name], rtol=1e-12, atol=0, msg=name)


def test_layout_of_inputs_is_free():
    """Inputs may be views of a [B, channels, L] tensor; half inputs are computed in float32, also under autocast."""
    inputs = make_inputs(dtype=torch.bfloat16)
    sums, expected_sums = make_sums(), make_sums(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = state_space_dual(**inputs, sums=sums)
    assert y.dtype == torch.float32
    other = {name: value.float() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    for name in ("x", "B", "C"):
        other[name] = other[name].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    torch.testing.assert_close(y, state_space_dual(**other, sums=expected_sums), rtol=1e-5, atol=1e-5)
    for name in sums:
        torch.testing.assert_close(sums[name].float(), expected_sums[name], rtol=1e-5, atol=0, msg=name)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any new tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_never_holds_the_trajectory():
    inputs = make_inputs(batch=1, length=1024)
    with LargestTensor() as largest:
        state_space_dual(**inputs, sums=make_sums(), chunk_size=16)
    assert largest.elements <= 1024 * HEADS * HEAD_DIM  # y; the trajectory would be STATES times larger


def test_leaves_its_inputs_alone():
    inputs = make_inputs()
    copies = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    state_space_dual(**inputs, sums=make_sums(), return_final_states=True)
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs if name != "dt_softplus")


def test_refuses_wrong_arguments():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="unknown sum 'state_prev': allowed are decay_error, state_energy"):
        state_space_dual(**inputs, sums={"state_prev": torch.zeros(HEADS)})
    with pytest.raises(ValueError, match=r"'decay_error' has shape \[1\].*\[4\] \(heads\)"):
        state_space_dual(**inputs, sums={"decay_error": torch.zeros(1)})
    with pytest.raises(ValueError, match="chunk_size is 0"):
        state_space_dual(**inputs, chunk_size=0)
    with pytest.raises(ValueError, match="4 heads cannot share 3 groups"):
        state_space_dual(**inputs | {"B": inputs["B"][:, :, [0, 0, 1]], "C": inputs["C"][:, :, [0, 0, 1]]})
    inputs["A"].requires_grad_()
    with pytest.raises(CalibrationError, match="'A' requires grad"):
        state_space_dual(**inputs)
    with torch.no_grad():
        assert not state_space_dual(**inputs).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    inputs = make_inputs(length=300, dtype=torch.float32)
    expected_sums, sums = make_sums(), {name: total.cuda() for name, total in make_sums().items()}
    expected = state_space_dual(**inputs, sums=expected_sums)
    y = state_space_dual(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}, sums=sums)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-4, atol=1e-4)
    for name in sums:
        torch.testing.assert_close(sums[name].cpu(), expected_sums[name], rtol=1e-4, atol=1e-6, msg=name)
