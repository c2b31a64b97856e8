# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan for training: differentiable, fast on a CPU, without the states of all steps in memory.

The forward pass keeps the state before every chunk of T time steps. The backward pass walks the chunks in reverse,
computes the states of a chunk again (arXiv 2312.00752, Sec. 3.3.2: recomputation) and runs the adjoint recurrence.
Sequences and channels are walked in tiles, in which a step is some operations on [sequences, state size, channels]:
large enough to outweigh the calls, small enough for the cache and for torch to stay in the calling thread. Where cores
are shared, waiting for other threads at every step takes longer than all the rest.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from ..errors import ConfigurationError
from .scan_sums import check_inputs, compute_dtype
from .selective_scan import selective_scan


# One time step of a tile on CPU. Torch shares out elementwise operations among threads from 32,768 elements on, except
# `exp`, which it shares out much earlier: hence `exp2` below.
_CPU_STEP_ELEMENTS = 2**14
# The states of one chunk of a tile, and again its decays: large ones leave the cache, small ones keep more states.
_CPU_CHUNK_ELEMENTS, _DEVICE_CHUNK_ELEMENTS = 2**19, 2**25


def differentiable_selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    chunk_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-1 selective scan (arXiv 2312.00752, Eq. 2 and Algorithm 2), once differentiable in every tensor.

    The recurrence is that of `selective_scan`, which runs instead where nothing asks for a gradient. For backward,
    ceil(L/T)·B·I·N + O(B·I·L) elements are kept; backward adds 2T steps of one tile, of at most B·I·N each.

    Args:
        x, dt, z: scan input after convolution and SiLU, time step before bias and softplus, gate, [B, I, L].
        A: negative state matrix -exp(A_log), [I, N].
        B, C: input and output maps, [B, N, L].
        D, delta_bias: skip connection, bias of dt, [I].
        delta_softplus: whether Δ = dt + delta_bias goes through softplus.
        return_last_state: also return h_{L-1}. Gradients flow through it as well.
        chunk_size: T, by default from the size of a tile. It changes results by rounding only.

    Returns:
        y, [B, I, L] in x's dtype (a transposed view of a contiguous [B, L, I]); with `return_last_state` also the
        state [B, I, N]. State and arithmetic, also that of gradients, are float32 (float64 where x is float64),
        whatever the other dtypes. A gradient has the dtype of its input.

    Raises:
        ConfigurationError: a tensor's shape does not fit x and A, or chunk_size < 1.
        RuntimeError: when a gradient is differentiated again.
    """
    check_inputs("differentiable_selective_scan", chunk_size)
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _check_shapes(tensors)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())):
        options = {"return_last_state": return_last_state, "chunk_size": chunk_size}
        return selective_scan(**tensors, delta_softplus=delta_softplus, **options)
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows, delta, B, C = (_time_major(tensor, dtype) for tensor in (x, dt, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        y, state = _SelectiveScan.apply(chunk_size, delta, rows, A.to(dtype).t(), B, C)
        if D is not None:
            y = y + rows * D.to(dtype)
        if z is not None:
            y = y * F.silu(_time_major(z, dtype))
        y = y.to(x.dtype).transpose(1, 2)
    return (y, state.transpose(1, 2)) if return_last_state else y


class _SelectiveScan(torch.autograd.Function):
    """y [B, L, I] before skip and gate and last state [B, N, I], from Δ, x [B, L, I], A [N, I], B and C [B, L, N]."""

    @staticmethod
    def forward(ctx: FunctionCtx, chunk_size: int | None, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, A = inputs[1:3]
        ctx.tiles, ctx.steps = _tiling(x, len(A), chunk_size)
        y, last_state = torch.empty_like(x), x.new_empty(len(x), *A.shape)
        starts = x.new_empty(math.ceil(x.shape[1] / ctx.steps), *last_state.shape)
        for part, columns in ctx.tiles:
            tile, state = _Tile(inputs, part, columns), torch.zeros_like(last_state[part, :, columns])
            decay, outputs = torch.empty_like(state), []
            for t, C in enumerate(tile.C):
                if t % ctx.steps == 0:
                    starts[t // ctx.steps, part, :, columns] = state
                tile.step(t, decay, state, state)
                outputs.append(_weighted_sum(C.mT, state))
            y[part, :, columns] = torch.cat(outputs, 1)
            last_state[part, :, columns] = state
        ctx.save_for_backward(*inputs, starts)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, starts = ctx.saved_tensors
        grad_y, grad_state = grad_y.contiguous(), grad_state.contiguous()
        grads = d_delta, d_x, d_A, d_B, d_C = [torch.zeros_like(tensor) for tensor in inputs]
        with torch.autocast(grad_y.device.type, enabled=False):
            for part, columns in ctx.tiles:
                tile, g = _Tile(inputs, part, columns), grad_state[part, :, columns].clone()
                of_tile = tile.backward(starts[:, part, :, columns], grad_y[part, :, columns], g, ctx.steps)
                views = d_A[:, columns], d_delta[part, :, columns], d_x[part, :, columns], d_B[part], d_C[part]
                for view, grad in zip(views, of_tile, strict=True):
                    view.add_(grad)
        d_delta.addcmul_(inputs[1], d_x)  # so far d_x is the gradient of Δ x
        d_x.mul_(inputs[0])
        return None, *grads


class _Tile:
    """k channels of s sequences: A [N, k] and, for every step, rows Δ, Δ x [s, 1, k] and maps B, C [s, N, 1]."""

    def __init__(self, inputs: Sequence[torch.Tensor], part: slice, columns: slice) -> None:
        delta, x = (rows[part, :, columns].unsqueeze(2) for rows in inputs[:2])
        self.delta, self.delta_x = delta.unbind(1), (delta * x).unbind(1)
        self.A = inputs[2][:, columns].contiguous()
        self.A_base2 = self.A / math.log(2)
        self.B, self.C = (maps[part].unsqueeze(3).unbind(1) for maps in inputs[3:])

    def step(self, t: int, decay: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Fills `decay` with dA_t and `after` with h_t, given h_{t-1} in `before`: all [s, N, k]."""
        torch.mul(self.delta[t], self.A_base2, out=decay).exp2_()
        torch.mul(decay, before, out=after).addcmul_(self.delta_x[t], self.B[t])

    def backward(self, starts: torch.Tensor, dy: torch.Tensor, g: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """The gradients of A [N, k], of Δ through dA alone and Δ x [s, L, k], of B and C [s, L, N]: from the states
        before every chunk of `steps` steps and the gradients of y [s, L, k] and, in `g`, the last state [s, N, k]."""
        decay, states = (g.new_empty(rows, *g.shape).unbind(0) for rows in (steps, steps + 1))
        dy, d_A, ones = dy.unsqueeze(2).unbind(1), torch.zeros_like(g), torch.ones_like(self.B[0]).mT
        grads = []
        for first in reversed(range(0, len(dy), steps)):
            count = min(steps, len(dy) - first)
            states[0].copy_(starts[first // steps])
            for i in range(count):
                self.step(first + i, decay[i], states[i], states[i + 1])
            for i in reversed(range(count)):
                t = first + i
                g.addcmul_(self.C[t], dy[t])  # g_t = C_t dy_t + dA_{t+1} g_{t+1}
                d_B, d_C = _weighted_sum(self.delta_x[t], g.mT), _weighted_sum(dy[t], states[i + 1].mT)
                d_input = _weighted_sum(self.B[t].mT, g)
                # The decay, spent with this, makes room for the gradient of its exponent Δ_t A.
                d_exponent = torch.mul(g.mul_(decay[i]), states[i], out=decay[i])
                d_A.addcmul_(d_exponent, self.delta[t])
                grads.append((_weighted_sum(ones, d_exponent.mul_(self.A)), d_input, d_B, d_C))
        return [d_A.sum(0), *(torch.cat(of_steps, 1) for of_steps in zip(*reversed(grads), strict=True))]


def _weighted_sum(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Σ_j weights[s, 0, j] rows[s, j, :], [s, 1, :]. For several s at once `bmm` would call other threads."""
    return torch.bmm(weights, rows) if len(rows) == 1 else (weights.mT * rows).sum(1, keepdim=True)


def _time_major(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` [B, I, L] as a contiguous [B, L, I]: the matrices one by one, for which torch has a fast transpose."""
    turned = tensor.to(dtype).mT
    return turned if turned.is_contiguous() else torch.stack([matrix.contiguous() for matrix in turned])


def _tiling(x: torch.Tensor, state_size: int, chunk_size: int | None) -> tuple[list[tuple[slice, slice]], int]:
    """The tiles of x [B, L, I], as slices of sequences and of channels, and how many steps a chunk has."""
    batch, length, channels = x.shape
    width, sequences, elements = channels, batch, _DEVICE_CHUNK_ELEMENTS
    if x.device.type == "cpu":
        width = math.ceil(channels / math.ceil(channels * state_size / _CPU_STEP_ELEMENTS))
        sequences = max(1, min(batch, _CPU_STEP_ELEMENTS // (width * state_size)))
        elements = _CPU_CHUNK_ELEMENTS
    steps = min(length, chunk_size or max(1, elements // (sequences * width * state_size)))
    parts = [slice(first, first + sequences) for first in range(0, batch, sequences)]
    columns = [slice(first, first + width) for first in range(0, channels, width)]
    return [(part, column) for part in parts for column in columns], steps


def _check_shapes(tensors: dict[str, torch.Tensor | None]) -> None:
    """Refuses what would broadcast inside a tile to a wrong result."""
    rows, state_size = tuple(tensors["x"].shape), tensors["A"].shape[-1]
    channels, maps = rows[1:2], (rows[0], state_size, rows[2])
    shapes = {"dt": rows, "A": (*channels, state_size), "B": maps, "C": maps, "D": channels, "z": rows}
    for name, shape in (shapes | {"delta_bias": channels}).items():
        if tensors[name] is not None and tuple(tensors[name].shape) != shape:
            raise ConfigurationError(f"{name!r} has shape {list(tensors[name].shape)}: it must be {list(shape)}")
