# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan for training: differentiable, fast on a CPU, without the states of all steps in memory.

The forward pass keeps the state at the start of every chunk of time steps. The backward pass walks the chunks in
reverse, computes the states of a chunk again (arXiv 2312.00752, Sec. 3.3.2: recomputation) and runs the adjoint
recurrence over them. Buffers are [steps, sequences, state size, channels], as in `selective_scan`. Sequences and
channels are independent and are walked in tiles, so small that torch runs a step of a tile in the calling thread:
where cores are shared, waiting for other threads at every time step takes many times longer than the step.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx, once_differentiable

from ..errors import ConfigurationError
from .scan_sums import check_inputs, compute_dtype
from .selective_scan import selective_scan


# One time step of a tile on CPU. Torch shares out an elementwise operation among threads from 32,768 elements on.
_CPU_STEP_ELEMENTS = 2**14
# One chunk of a tile; backward holds three such buffers. Measured on CPU: larger ones leave the cache, smaller ones keep
# more chunk starts and pay for more calls. An accelerator is starved by small chunks.
_CPU_CHUNK_ELEMENTS = 2**18
_DEVICE_CHUNK_ELEMENTS = 2**25


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
    """Mamba-1 selective scan (arXiv 2312.00752, Eq. 2 and Algorithm 2), once differentiable in all its tensors.

    The recurrence is that of `selective_scan`, which runs instead where nothing asks for a gradient. Until backward,
    O(ceil(L/T)·B·I·N + B·I·L) elements are kept, T being the steps of a chunk. Both passes add buffers of T steps of
    one tile. No tensor has B·I·L·N elements, unless one chunk holds everything.

    Args:
        x: scan input after convolution and SiLU, [B, I, L].
        dt: time step before bias and softplus, [B, I, L].
        A: negative state matrix -exp(A_log), [I, N].
        B, C: input and output maps, [B, N, L].
        D: skip connection, [I].
        z: gate, [B, I, L].
        delta_bias: added to dt, [I].
        delta_softplus: whether Δ goes through softplus.
        return_last_state: also return h_{L-1}, through which gradients flow as well.
        chunk_size: T, by default from B·I·N. It changes results by rounding only.

    Returns:
        y, [B, I, L] in x's dtype (a transposed view of a contiguous [B, L, I]); with `return_last_state` also the
        state [B, I, N]. State, arithmetic and gradients are float32 (float64 where x is float64), whatever the other
        dtypes; every gradient then takes the dtype of its input.

    Raises:
        ConfigurationError: a tensor whose shape does not fit x and A; chunk_size < 1.
        RuntimeError: in a second backward pass through the gradients: they are not differentiable.
    """
    check_inputs("differentiable_selective_scan", chunk_size)
    inputs = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    _check_shapes(inputs)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in inputs.values()):
        options = {"return_last_state": return_last_state, "chunk_size": chunk_size}
        return selective_scan(**inputs, delta_softplus=delta_softplus, **options)
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows, delta, B, C = (_time_major(tensor, dtype) for tensor in (x, dt, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        y, state = _SelectiveScan.apply(delta, rows, A.to(dtype).t().contiguous(), B, C, chunk_size)
        if D is not None:
            y = y + rows * D.to(dtype)
        if z is not None:
            y = y * F.silu(_time_major(z, dtype))
        y = y.to(x.dtype).transpose(1, 2)
    return (y, state.transpose(1, 2)) if return_last_state else y


class _SelectiveScan(torch.autograd.Function):
    """y without skip and gate [B, L, I] and the last state [B, N, I], of Δ, x [B, L, I], A [N, I], B, C [B, L, N]."""

    @staticmethod
    def forward(ctx: FunctionCtx, *args: torch.Tensor | int | None) -> tuple[torch.Tensor, torch.Tensor]:
        *inputs, chunk_size = args
        _, x, A, _, _ = inputs
        ctx.tiles, ctx.steps = _tiling(x, len(A), chunk_size)
        y, last_state = torch.empty_like(x), x.new_empty(len(x), *A.shape)
        starts = x.new_empty(math.ceil(x.shape[1] / ctx.steps), *last_state.shape)
        for part, columns in ctx.tiles:
            tile = _Tile(*inputs, part, columns)
            state = torch.zeros_like(last_state[part, :, columns])
            decay, outputs = torch.empty_like(state), []
            for t, C in enumerate(tile.C):
                if t % ctx.steps == 0:
                    starts[t // ctx.steps, part, :, columns] = state
                tile.step(t, decay, state, state)
                outputs.append(_sum_over_states(C, state))
            y[part, :, columns] = torch.cat(outputs, 1)
            last_state[part, :, columns] = state
        ctx.save_for_backward(*inputs, starts)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: torch.Tensor, grad_state: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, starts = ctx.saved_tensors
        grad_y = grad_y.contiguous()
        d_delta, d_x, d_A, d_B, d_C = (torch.zeros_like(tensor) for tensor in inputs)
        with torch.autocast(grad_y.device.type, enabled=False):
            for part, columns in ctx.tiles:
                tile = _Tile(*inputs, part, columns)
                adjoint = grad_state[part, :, columns].clone()
                grads = tile.backward(starts[:, part, :, columns], grad_y[part, :, columns], adjoint, ctx.steps)
                d_delta[part, :, columns], d_x[part, :, columns] = grads[:2]
                d_A[:, columns] += grads[2]
                d_B[part] += grads[3]
                d_C[part] += grads[4]
        return d_delta, d_x, d_A, d_B, d_C, None


class _Tile:
    """k channels of s sequences: Δ and x [s, L, k], A [N, k], and for every step Δ, Δx [s, 1, k], B, C [s, N, 1]."""

    def __init__(self, delta, x, A, B, C, part: slice, columns: slice) -> None:
        self.all_delta, self.x, self.A = delta[part, :, columns], x[part, :, columns], A[:, columns].contiguous()
        self.delta, self.input = _per_step(self.all_delta, 2), _per_step(self.all_delta * self.x, 2)
        self.B, self.C = _per_step(B[part], 3), _per_step(C[part], 3)

    def step(self, t: int, decay: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Fills `decay` with dA_t and `after` with the state after step t, all of them [s, N, k]."""
        torch.mul(self.delta[t], self.A, out=decay).exp_()
        torch.mul(decay, before, out=after).addcmul_(self.input[t], self.B[t])

    def backward(
        self, starts: torch.Tensor, grad_y: torch.Tensor, adjoint: torch.Tensor, steps: int
    ) -> tuple[torch.Tensor, ...]:
        """The gradients of Δ and x [s, L, k], A [N, k], B and C [s, L, N].

        Args:
            starts: the states before every chunk, [chunks, s, N, k].
            grad_y: the gradient of y, [s, L, k].
            adjoint: the gradient of the last state, [s, N, k], overwritten.
            steps: the steps of a chunk.
        """
        dy = _per_step(grad_y, 2)
        decays, states = starts.new_empty(steps, *adjoint.shape), starts.new_empty(steps + 1, *adjoint.shape)
        decays, states = decays.unbind(0), states.unbind(0)
        d_A, ones = torch.zeros_like(adjoint), torch.ones_like(self.B[0])
        d_delta, d_input, d_B, d_C = [], [], [], []
        for index, window in reversed(list(enumerate(_windows(len(dy), steps)))):
            states[0].copy_(starts[index])
            for t in range(window.start, window.stop):
                row = t - window.start
                self.step(t, decays[row], states[row], states[row + 1])
            for t in range(window.stop - 1, window.start - 1, -1):
                row = t - window.start
                adjoint.addcmul_(self.C[t], dy[t])
                d_C.append(_sum_over_channels(states[row + 1], dy[t]))
                d_B.append(_sum_over_channels(adjoint, self.input[t]))
                d_input.append(_sum_over_states(self.B[t], adjoint))
                adjoint.mul_(decays[row])
                # The decay is spent: its buffer takes the gradient of its exponent Δ A.
                exponent = torch.mul(adjoint, states[row], out=decays[row])
                d_A.addcmul_(exponent, self.delta[t])
                d_delta.append(_sum_over_states(ones, exponent.mul_(self.A)))
        d_delta, d_input, d_B, d_C = (torch.cat(rows[::-1], 1) for rows in (d_delta, d_input, d_B, d_C))
        return d_delta.addcmul_(self.x, d_input), d_input.mul_(self.all_delta), d_A.sum(0), d_B, d_C


def _per_step(tensor: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
    return tensor.unsqueeze(dim).unbind(1)


def _sum_over_states(maps: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Σ_n maps[s, n, 0] states[s, n, k], [s, 1, k]."""
    if len(states) == 1:
        return torch.bmm(maps.transpose(1, 2), states)
    return (maps * states).sum(1, keepdim=True)


def _sum_over_channels(states: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Σ_k states[s, n, k] row[s, 0, k], [s, 1, N]."""
    if len(states) == 1:
        return torch.bmm(row, states.transpose(1, 2))
    return (states * row).sum(2).unsqueeze(1)


def _time_major(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` [B, I, L] as a contiguous [B, L, I], the tensor itself where it is a view of that."""
    turned = tensor.to(dtype).transpose(1, 2)
    if turned.is_contiguous() or tensor.device.type != "cpu":
        return turned.contiguous()
    # Torch has a fast transposed copy for matrices only: this is twice as fast as `contiguous`.
    return torch.stack([matrix.contiguous() for matrix in turned.unbind(0)])


def _tiling(x: torch.Tensor, state_size: int, chunk_size: int | None) -> tuple[list[tuple[slice, slice]], int]:
    """The tiles of x [B, L, I], as slices of sequences and of channels, and how many time steps a chunk has."""
    batch, length, channels = x.shape
    columns, sequences, elements = channels, batch, _DEVICE_CHUNK_ELEMENTS
    if x.device.type == "cpu":
        elements = _CPU_CHUNK_ELEMENTS
        columns = _even_share(channels, _CPU_STEP_ELEMENTS // state_size)
        sequences = _even_share(batch, _CPU_STEP_ELEMENTS // (columns * state_size))
    if chunk_size is None:
        chunk_size = max(1, elements // (sequences * columns * state_size))
    tiles = [(part, column) for part in _windows(batch, sequences) for column in _windows(channels, columns)]
    return tiles, min(length, chunk_size)


def _even_share(total: int, most: int) -> int:
    """The size of the parts when `total` is cut into as few even parts as possible of not more than `most`."""
    return math.ceil(total / math.ceil(total / max(1, most)))


def _windows(length: int, steps: int) -> list[slice]:
    return [slice(start, min(start + steps, length)) for start in range(0, length, steps)]


def _check_shapes(inputs: dict[str, torch.Tensor | None]) -> None:
    """Refuses what would broadcast within a tile to a wrong result."""
    (batch, channels, length), state_size = inputs["x"].shape, inputs["A"].shape[-1]
    rows, maps, per_channel = (batch, channels, length), (batch, state_size, length), (channels,)
    shapes = {"dt": rows, "z": rows, "A": (channels, state_size), "B": maps, "C": maps}
    for name, tensor in inputs.items():
        shape = shapes.get(name, per_channel)
        if name != "x" and tensor is not None and tuple(tensor.shape) != shape:
            raise ConfigurationError(f"{name!r} has shape {list(tensor.shape)}: it must be {list(shape)}")
