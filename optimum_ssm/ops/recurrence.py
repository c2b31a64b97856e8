# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 recurrence of some sequences, in chunks of time: what `selective_scan` runs.

A chunk holds its decays and its states as two reused buffers of shape [steps, batch, state size, channels]: channels
last, so that every elementwise operation runs over long contiguous rows. Inputs and outputs, which have no state
dimension, are turned to [steps, batch, channels] in larger blocks of whole chunks.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .scan_sums import compute_dtype


# Steps of a block at least. Its rows are read from [..., L] tensors along whole cache lines of 16 floats.
_BLOCK_STEPS = 64


@dataclass(frozen=True)
class Inputs:
    """The arguments of `selective_scan`, as they came."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    delta_bias: torch.Tensor | None
    delta_softplus: bool


class BatchSlice:
    """b sequences that run together: their inputs, the small ones already in the layout of the buffers."""

    def __init__(self, inputs: Inputs, part: slice) -> None:
        dtype = compute_dtype(inputs.x)
        self.x, self.dt = inputs.x[part], inputs.dt[part]
        self.z = None if inputs.z is None else inputs.z[part]
        self.A = inputs.A.to(dtype).t().contiguous()  # [N, I]
        self.B = inputs.B[part].to(dtype).permute(2, 0, 1).contiguous()  # [L, b, N]
        self.C = inputs.C[part].to(dtype).permute(2, 0, 1).contiguous()
        self.D = None if inputs.D is None else inputs.D.to(dtype)
        self.delta_bias = None if inputs.delta_bias is None else inputs.delta_bias.to(dtype)
        self.delta_softplus = inputs.delta_softplus

    def run(self, y: torch.Tensor, last_state: torch.Tensor, sums: dict[str, torch.Tensor], steps: int) -> None:
        """Fills y [b, L, I] and last_state [b, N, I] and adds to `sums`, by chunks of `steps` time steps."""
        length = self.x.shape[2]
        self.decay = self.A.new_empty(steps, *last_state.shape)
        # Row 0 carries the state over from the last chunk, row k + 1 is the state after step k: so the states before
        # and after every step are two views of one buffer.
        self.states = self.A.new_empty(steps + 1, *last_state.shape)
        self.states[0].zero_()
        self.decay_rows, self.state_rows = self.decay.unbind(0), self.states.unbind(0)
        block = steps * math.ceil(_BLOCK_STEPS / steps)
        self.totals = SliceSums(sums, last_state, block)
        for start in range(0, length, block):
            window = slice(start, min(start + block, length))
            y[:, window].copy_(self._block(window, steps).transpose(0, 1))
        self.totals.close()
        last_state.copy_(self.states[0])

    def _block(self, window: slice, steps: int) -> torch.Tensor:
        """Advances over the steps of `window` and returns their y, [T, b, I]."""
        x = _time_first(self.x[:, :, window], self.A.dtype)
        delta = self._delta(window)
        added = delta * x
        output = added.new_empty(added.shape)
        for first in range(0, len(x), steps):
            part = slice(first, first + steps)
            step = slice(window.start + first, min(window.start + first + steps, window.stop))
            self._chunk(step, delta[part], added[part], output[part])
        if self.D is not None:
            output.addcmul_(x, self.D)
        if self.z is not None:
            gate = F.silu(_time_first(self.z[:, :, window], self.A.dtype))
            output.mul_(gate)
            self.totals.add_gate(gate)
        return output

    def _chunk(self, window: slice, delta: torch.Tensor, added: torch.Tensor, output: torch.Tensor) -> None:
        """Advances over the steps of `window`; writes Σ_n C h to output. delta = Δ, added = Δ x, all [steps, b, I]."""
        count = len(delta)
        decay, after = self.decay[:count], self.states[1 : count + 1]
        B, C = self.B[window], self.C[window]
        torch.mul(delta.unsqueeze(2), self.A, out=decay).exp_()
        torch.mul(added.unsqueeze(2), B.unsqueeze(3), out=after)
        for step in range(count):
            self.state_rows[step + 1].addcmul_(self.decay_rows[step], self.state_rows[step])
        torch.bmm(C.flatten(0, 1).unsqueeze(1), after.flatten(0, 1), out=output.flatten(0, 1).unsqueeze(1))
        self.totals.add(window, decay, self.states[: count + 1], C.unsqueeze(3))
        self.state_rows[0].copy_(self.state_rows[count])

    def _delta(self, window: slice) -> torch.Tensor:
        """Δ of the steps of `window`, [T, b, I]."""
        delta = _time_first(self.dt[:, :, window], self.A.dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias
        return F.softplus(delta) if self.delta_softplus else delta


class SliceSums:
    """The sums of one batch slice. Those over time are taken in the scan's dtype over one call and only then added to
    the caller's tensors, so that float64 accumulators lose nothing over many calls."""

    _OVER_TIME = ("decay_error", "state_energy", "state_prev_total")

    def __init__(self, sums: dict[str, torch.Tensor], state: torch.Tensor, most_steps: int) -> None:
        self.sums = sums
        self.shape = state.shape
        self.partial = {name: state.new_zeros(state.numel()) for name in self._OVER_TIME if name in sums}
        if "gate_energy" in sums:
            self.partial["gate_energy"] = state.new_zeros(self.shape[0] * self.shape[2])
        self.ones = state.new_ones(most_steps)

    def add(self, window: slice, decay: torch.Tensor, states: torch.Tensor, C: torch.Tensor) -> None:
        """Adds a chunk: decay [steps, b, N, I] (overwritten), states [steps + 1, b, N, I], C [steps, b, N, 1]."""
        sums, before, after = self.sums, states[:-1], states[1:]
        if "decay_sum" in sums:
            self._add_per_step("decay_sum", window, decay)
        if "decay_error" in sums:
            self._add_squares("decay_error", decay.mul_(before).mul_(C))
        # From here on the decays are spent and their buffer is scratch.
        if "state_energy" in sums:
            self._add_squares("state_energy", torch.mul(after, C, out=decay))
        if "state_prev_total" in sums or "state_prev" in sums:
            squares = torch.mul(before, before, out=decay)
            if "state_prev" in sums:
                self._add_per_step("state_prev", window, squares)
            if "state_prev_total" in sums:
                self._add("state_prev_total", squares)

    def add_gate(self, gate: torch.Tensor) -> None:
        """Adds silu(z) of a chunk, [steps, b, I], which is overwritten."""
        if "gate_energy" in self.sums:
            self._add_squares("gate_energy", gate)

    def close(self) -> None:
        """Adds the partial sums to the caller's tensors."""
        batch, state_size, channels = self.shape
        for name, partial in self.partial.items():
            if name == "gate_energy":
                self.sums[name].add_(partial.view(batch, channels).sum(0))
            else:
                self.sums[name].add_(partial.view(batch, state_size, channels).sum(0).t())

    def _add_squares(self, name: str, values: torch.Tensor) -> None:
        self._add(name, values.mul_(values))

    def _add(self, name: str, values: torch.Tensor) -> None:
        # A sum over the leading dimension as a matrix-vector product is several times faster on CPU than torch.sum.
        self.partial[name].addmv_(values.flatten(1).t(), self.ones[: len(values)])

    def _add_per_step(self, name: str, window: slice, values: torch.Tensor) -> None:
        over_batch = values[:, 0] if self.shape[0] == 1 else values.sum(1)
        self.sums[name][window].add_(over_batch.transpose(1, 2))


def _time_first(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`rows` [b, I, steps], usually a window of [b, I, L], as [steps, b, I] with contiguous channels: maybe a view."""
    turned = rows.permute(2, 0, 1)
    if turned.stride(2) == 1:
        return turned.to(dtype)
    if rows.device.type != "cpu":
        return turned.to(dtype).contiguous()
    # Two copies, along the cache lines and then inside the cache: 2 to 5 times faster than one strided copy.
    result = rows.new_empty(rows.shape[2], *rows.shape[:2], dtype=dtype)
    for index, sequence in enumerate(rows):
        result[:, index].copy_(sequence.to(dtype).contiguous().t())
    return result
