# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan for training on a CPU: differentiable, without the state of every step in memory.

The forward pass keeps the state at the start of every chunk of T time steps. The backward pass walks the chunks in
reverse, computes the states of one chunk again (arXiv 2312.00752, Sec. 3.3.2: recomputation) and runs the adjoint
recurrence over it. Chunk buffers are [steps, sequences, state size, channels], as in `selective_scan`. Sequences and
channels are independent, so they are walked in tiles: a step of a tile is one operation too small for torch to share
out among threads, because a barrier per time step costs more than the step.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .scan_sums import check_inputs, compute_dtype


# One time step of a tile on CPU: below 32,768 elements torch runs an elementwise operation in the calling thread.
_CPU_STEP_ELEMENTS = 2**14
# One chunk buffer, by which three are held. Larger ones leave the cache, smaller ones keep more chunk starts.
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
    """Mamba-1 selective scan (arXiv 2312.00752, Eq. 2 and Algorithm 2), differentiable in every tensor."""
    inputs = (x, dt, A, B, C, D, z, delta_bias)
    check_inputs("differentiable_selective_scan", chunk_size)
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        x_rows, delta = (rows.to(dtype).transpose(1, 2).contiguous() for rows in (x, dt))
        if delta_bias is not None:
            delta = delta + delta_bias.to(dtype)
        if delta_softplus:
            delta = F.softplus(delta)
        B, C = (maps.to(dtype).transpose(1, 2).contiguous() for maps in (B, C))
        y, state = _SelectiveScan.apply(delta, x_rows, A.to(dtype).t().contiguous(), B, C, chunk_size)
        if D is not None:
            y = y + x_rows * D.to(dtype)
        if z is not None:
            y = y * F.silu(z.to(dtype).transpose(1, 2).contiguous())
        y, state = y.to(x.dtype).transpose(1, 2), state.transpose(1, 2)
    return (y, state) if return_last_state else y


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, delta, x, A, B, C, chunk_size):
        batch, length, channels = x.shape
        tiles, steps = _tiling(x, A.shape[0], chunk_size)
        y = torch.empty_like(x)
        starts = x.new_empty(math.ceil(length / steps), batch, *A.shape)
        last_state = x.new_zeros(batch, *A.shape)
        for part, columns in tiles:
            chunk = _Chunk(x[part, :1, columns], A[:, columns], steps)
            chunk.states[0].zero_()
            for index, window in enumerate(_windows(length, steps)):
                starts[index, part, :, columns].copy_(chunk.states[0])
                chunk.run(delta[part, window, columns], x[part, window, columns], B[part, window])
                output = _over_states(C[part, window], chunk.after)
                y[part, window, columns].copy_(output.transpose(0, 1))
                chunk.states[0].copy_(chunk.after[-1])
            last_state[part, :, columns].copy_(chunk.states[0])
        ctx.save_for_backward(delta, x, A, B, C, starts)
        ctx.chunk_size = chunk_size
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        delta, x, A, B, C, starts = ctx.saved_tensors
        tiles, steps = _tiling(x, A.shape[0], ctx.chunk_size)
        grads = [torch.zeros_like(t) for t in (delta, x, A, B, C)]
        with torch.autocast(x.device.type, enabled=False):
            for part, columns in tiles:
                chunk = _Chunk(x[part, :1, columns], A[:, columns], steps)
                adjoint = torch.empty_like(chunk.decay)
                carry = grad_last[part, :, columns].clone()
                dA = x.new_zeros(chunk.A.shape)
                for index, window in reversed(list(enumerate(_windows(x.shape[1], steps)))):
                    d, u, dy = delta[part, window, columns], x[part, window, columns], grad_y[part, window, columns]
                    b, c = B[part, window], C[part, window]
                    chunk.states[0].copy_(starts[index, part, :, columns])
                    chunk.run(d, u, b)
                    dd, du, db, dc = chunk.backward(
                        d.transpose(0, 1),
                        u.transpose(0, 1),
                        b.transpose(0, 1),
                        c.transpose(0, 1),
                        dy.transpose(0, 1),
                        adjoint,
                        carry,
                        dA,
                    )
                    grads[0][part, window, columns].copy_(dd.transpose(0, 1))
                    grads[1][part, window, columns].copy_(du.transpose(0, 1))
                    grads[3][part, window].add_(db.transpose(0, 1))
                    grads[4][part, window].add_(dc.transpose(0, 1))
                grads[2][:, columns].add_(dA)
        return *grads, None


VARIANT = {"dA": "step", "dD": "n"}


class _Chunk:
    def __init__(self, like, A, steps):
        self.A = A.contiguous()
        shape = (like.shape[0], *A.shape)
        self.decay = like.new_empty(steps, *shape)
        self.states = like.new_empty(steps + 1, *shape)
        self.decay_rows, self.state_rows = self.decay.unbind(0), self.states.unbind(0)

    def run(self, delta, x, B):
        count = delta.shape[1]
        delta, B = delta.transpose(0, 1), B.transpose(0, 1)
        self.after = self.states[1 : count + 1]
        torch.mul(delta.unsqueeze(2), self.A, out=self.decay[:count]).exp_()
        torch.mul((delta * x.transpose(0, 1)).unsqueeze(2), B.unsqueeze(3), out=self.after)
        for step in range(count):
            self.state_rows[step + 1].addcmul_(self.decay_rows[step], self.state_rows[step])

    def backward(self, delta, x, B, C, dy, adjoint, carry, dA):
        count = delta.shape[0]
        decay, states = self.decay[:count], self.states
        g = adjoint[:count]
        torch.mul(C.unsqueeze(3), dy.unsqueeze(2), out=g)
        rows = g.unbind(0)
        rows[-1].add_(carry)
        for step in range(count - 2, -1, -1):
            rows[step].addcmul_(self.decay_rows[step + 1], rows[step + 1])
        torch.mul(rows[0], self.decay_rows[0], out=carry)
        dC = _over_channels(self.after, dy)
        dB = _over_channels(g, delta * x)
        dinput = _over_states(B.transpose(0, 1), g)
        w = g.mul_(states[:count]).mul_(decay)
        if VARIANT["dA"] == "step":
            for step in range(count):
                for s in range(w.shape[1]):
                    dA.addcmul_(w[step, s], delta[step, s])
        elif VARIANT["dA"] == "mv":
            torch.mul(w, delta.unsqueeze(2), out=decay)
            dA.view(-1).addmv_(decay.view(-1, dA.numel()).t(), dA.new_ones(decay.shape[0] * decay.shape[1]))
        if VARIANT["dD"] == "n":
            dD = x * dinput
            for n in range(w.shape[2]):
                dD.addcmul_(w[:, :, n], self.A[n])
        elif VARIANT["dD"] == "mm":
            w.mul_(self.A)
            dD = (
                torch.bmm(w.new_ones(1, 1, 1).expand(w.shape[0] * w.shape[1], 1, w.shape[2]), w.flatten(0, 1))
                .view(x.shape)
                .addcmul_(x, dinput)
            )
        elif VARIANT["dD"] == "sum":
            w.mul_(self.A)
            dD = w.sum(2).addcmul_(x, dinput)
        return dD, delta * dinput, dB, dC


def _over_states(maps, states):
    maps = maps.transpose(0, 1).reshape(-1, 1, maps.shape[2])
    return torch.bmm(maps, states.flatten(0, 1)).view(states.shape[0], states.shape[1], states.shape[3])


def _over_channels(states, rows):
    return torch.bmm(states.flatten(0, 1), rows.reshape(-1, rows.shape[2], 1)).view(states.shape[:3])


def _windows(length, steps):
    return [slice(start, min(start + steps, length)) for start in range(0, length, steps)]


def _tiling(x, state_size, chunk_size):
    batch, length, channels = x.shape
    on_cpu = x.device.type == "cpu"
    columns = max(1, min(channels, _CPU_STEP_ELEMENTS // state_size)) if on_cpu else channels
    sequences = max(1, min(batch, _CPU_STEP_ELEMENTS // (columns * state_size))) if on_cpu else batch
    if chunk_size is None:
        chunk_size = max(
            1, (_CPU_CHUNK_ELEMENTS if on_cpu else _DEVICE_CHUNK_ELEMENTS) // (sequences * columns * state_size)
        )
    tiles = [
        (slice(first, first + sequences), slice(left, left + columns))
        for first in range(0, batch, sequences)
        for left in range(0, channels, columns)
    ]
    return tiles, max(1, min(length, chunk_size))
