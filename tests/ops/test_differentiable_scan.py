# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The differentiable Mamba-1 scan against finite differences, transformers' autograd and `selective_scan`."""

import math
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.mamba import modeling_mamba

from optimum_ssm.ops import differentiable_scan as module
from optimum_ssm.ops.differentiable_scan import differentiable_selective_scan
from optimum_ssm.ops.selective_scan import selective_scan


NAMES = ("x", "dt", "A", "B", "C", "D", "z", "delta_bias")
REQUIRED = NAMES[:5]


def make_inputs(
    batch: int = 2, channels: int = 3, states: int = 2, length: int = 7, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, maps = (batch, channels, length), (batch, states, length)
    inputs = {name: normal(*rows) for name in ("x", "dt", "z")} | {name: normal(*maps) for name in ("B", "C")}
    inputs |= {"A": -torch.exp(normal(channels, states)), "D": normal(channels), "delta_bias": normal(channels) - 1}
    return {name: inputs[name].to(dtype).requires_grad_() for name in NAMES}


def gradients(scan: Callable, inputs: dict[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
    """The gradient of every input, for one cotangent of y and one of the last state."""
    y, state = scan(**inputs, delta_softplus=True, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in (y, state)]
    return dict(zip(inputs, torch.autograd.grad((y, state), tuple(inputs.values()), cotangents), strict=True))


def assert_relatively_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str) -> None:
    assert (actual - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("names", [NAMES, REQUIRED, (*REQUIRED, "D"), (*REQUIRED, "z"), (*REQUIRED, "delta_bias")])
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_gradcheck_optional_inputs(names, delta_softplus):
    inputs = make_inputs()
    if not delta_softplus:  # negative steps would make the state grow
        inputs |= {name: inputs[name].detach().abs().requires_grad_() for name in ("dt", "delta_bias")}

    def scan(*tensors):
        options = {"delta_softplus": delta_softplus, "return_last_state": True, "chunk_size": 3}
        return differentiable_selective_scan(**dict(zip(names, tensors, strict=True)), **options)

    torch.autograd.gradcheck(scan, tuple(inputs[name] for name in names))


@pytest.mark.parametrize("length", [1, 6, 7])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_gradcheck_chunks(monkeypatch, length, chunk_size):
    """Tiles of 2 and 1 of the 3 channels of a sequence: gradients of B and C are added over tiles."""
    monkeypatch.setattr(module, "_CPU_STEP_ELEMENTS", 4)
    inputs = make_inputs(length=length)

    def scan(*tensors):
        return differentiable_selective_scan(*tensors, True, True, chunk_size=chunk_size)

    torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("frozen", NAMES)
def test_an_input_may_be_frozen(frozen):
    inputs = make_inputs()
    differentiable_selective_scan(**inputs, delta_softplus=True).square().sum().backward()
    others = {name: tensor.detach().requires_grad_(name != frozen) for name, tensor in inputs.items()}
    differentiable_selective_scan(**others, delta_softplus=True).square().sum().backward()
    assert others.pop(frozen).grad is None
    assert all(torch.equal(tensor.grad, inputs[name].grad) for name, tensor in others.items())


@pytest.mark.parametrize("step_elements", [2**10, 2**14])
def test_gradients_equal_transformers(monkeypatch, step_elements):
    monkeypatch.setattr(module, "_CPU_STEP_ELEMENTS", step_elements)
    inputs = make_inputs(channels=96, states=16, length=67, dtype=torch.float32)
    original = modeling_mamba.mamba_selective_scan
    original = getattr(original, "__wrapped__", original)
    renamed = {("hidden_states" if name == "x" else name): tensor for name, tensor in inputs.items()}
    expected = gradients(original, renamed)
    actual = gradients(differentiable_selective_scan, inputs, chunk_size=16)
    for name, gradient in zip(NAMES, expected.values(), strict=True):
        assert_relatively_close(actual[name], gradient, 1e-4, name)
        assert actual[name].dtype == gradient.dtype and actual[name].shape == gradient.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", [NAMES, REQUIRED])
def test_forward_equals_selective_scan(dtype, names):
    inputs = {
        name: tensor for name, tensor in make_inputs(channels=40, length=45, dtype=dtype).items() if name in names
    }
    y, state = differentiable_selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    with torch.no_grad():
        expected_y, expected_state = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
        unrecorded = differentiable_selective_scan(**inputs, delta_softplus=True)
    assert y.requires_grad and state.requires_grad and y.stride() == expected_y.stride()
    torch.testing.assert_close(y.detach(), expected_y)
    torch.testing.assert_close(state.detach(), expected_state)
    assert torch.equal(unrecorded, expected_y) and not unrecorded.requires_grad


def test_gradients_have_the_dtype_of_their_input():
    inputs = make_inputs(channels=24, length=33, dtype=torch.float32)
    mixed = {
        name: tensor.detach().bfloat16() if name in ("x", "dt", "B") else tensor for name, tensor in inputs.items()
    }
    mixed = {name: tensor.detach().requires_grad_() for name, tensor in mixed.items()}
    same_values = {name: tensor.detach().float().requires_grad_() for name, tensor in mixed.items()}
    expected = gradients(differentiable_selective_scan, same_values)
    for name, gradient in gradients(differentiable_selective_scan, mixed).items():
        assert gradient.dtype == mixed[name].dtype
        assert_relatively_close(gradient.float(), expected[name], 2e-2, name)


def test_chunks_tiles_and_layouts_only_round(monkeypatch):
    inputs = make_inputs(batch=3, channels=20, states=4, length=50)
    expected = gradients(differentiable_selective_scan, inputs, chunk_size=50)
    for step_elements, chunk_size in ((2**14, 1), (2**14, 16), (2**14, 1000), (80, 7), (13, None)):
        monkeypatch.setattr(module, "_CPU_STEP_ELEMENTS", step_elements)
        for name, gradient in gradients(differentiable_selective_scan, inputs, chunk_size=chunk_size).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12, msg=name)
    turned = inputs | {
        name: inputs[name].detach().mT.contiguous().mT.requires_grad_() for name in ("x", "dt", "B", "C", "z")
    }
    for name, gradient in gradients(differentiable_selective_scan, turned).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-12, msg=name)


def test_saved_tensors_grow_with_the_number_of_chunks():
    batch, channels, states, length = 2, 12, 8, 61
    inputs = make_inputs(batch, channels, states, length)
    for chunk_size in (1, 4, 8, 61):
        saved = []

        def pack(tensor: torch.Tensor, sizes: list[int] = saved) -> torch.Tensor:
            sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            differentiable_selective_scan(**inputs, delta_softplus=True, chunk_size=chunk_size)
        starts = math.ceil(length / chunk_size) * batch * channels * states
        assert starts in saved
        # Steps beyond the state size make the chunk starts smaller than the inputs, which are saved as well.
        assert max(saved) == max(starts, batch * channels * length)
        assert chunk_size > states or max(saved) == starts


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any new tensor had."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_neither_pass_holds_the_trajectory():
    batch, channels, states, length = 2, 12, 8, 128
    inputs = make_inputs(batch, channels, states, length)
    with LargestTensor() as largest:
        gradients(differentiable_selective_scan, inputs, chunk_size=8)
    assert largest.elements == batch * channels * length  # the trajectory is `states` times larger


def test_autocast_does_not_touch_the_arithmetic():
    inputs = make_inputs(channels=24, length=33, dtype=torch.float32)
    expected = gradients(differentiable_selective_scan, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(differentiable_selective_scan, inputs)
    assert all(torch.equal(actual[name], expected[name]) for name in NAMES)


def test_backward_repeats_on_a_retained_graph():
    inputs = make_inputs()
    loss = differentiable_selective_scan(**inputs, delta_softplus=True).square().sum()
    first = torch.autograd.grad(loss, tuple(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(loss, tuple(inputs.values()))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "delta_bias"])
def test_second_derivative_raises(name):
    inputs = make_inputs()
    y = differentiable_selective_scan(**inputs, delta_softplus=True)
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs[name], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", NAMES[1:])
def test_refuses_wrong_shapes(name):
    inputs = make_inputs()
    inputs[name] = inputs[name].detach()[:1]
    with pytest.raises(ValueError, match=rf"'{name}' has shape .*: it must be"):
        differentiable_selective_scan(**inputs)


def test_refuses_a_chunk_of_nothing():
    with pytest.raises(ValueError, match="chunk_size is 0"):
        differentiable_selective_scan(**make_inputs(), chunk_size=0)
