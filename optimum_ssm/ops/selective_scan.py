# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan in torch, with sums over time taken in the same pass.

Time runs in chunks. A chunk holds its decays and its states as two reused buffers of shape
[steps, batch, state size, channels]: channels last, so that every elementwise operation runs over long contiguous
rows, and small enough for the cache. The whole trajectory is never held, only a chunk of it.

The sums serve SparseSSM (arXiv 2506.09613, Theorem 1 and Algorithm 1: "state_prev", "state_prev_total", "decay_sum"),
the exact squared change of y when one A_log entry becomes memoryless ("decay_error") and the squared change of y when
one state of one channel is removed, the state energy of GHOST (arXiv 2602.11408: "state_energy").
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ConfigurationError
from .scan_sums import ScanSum, allocate, check_inputs, check_sums, compute_dtype


_STATE = ("channels", "state_size")
SCAN_SUMS: dict[str, ScanSum] = {
    "decay_error": ScanSum(_STATE, "sum over s, t of C_{t,n}^2 (dA_{t,c,n} h_{t-1,c,n})^2"),
    "state_energy": ScanSum(_STATE, "sum over s, t of (C_{t,n} h_{t,c,n})^2"),
    "state_prev_total": ScanSum(_STATE, "sum over s, t of h_{t-1,c,n}^2"),
    "state_prev": ScanSum(("length", *_STATE), "for every t: sum over s of h_{t-1,c,n}^2"),
    "decay_sum": ScanSum(("length", *_STATE), "for every t: sum over s of dA_{t,c,n}"),
    "gate_energy": ScanSum(("channels",), "sum over s, t of silu(z_{t,c})^2"),
}

# Elements of one chunk buffer, measured on CPU: larger ones leave the cache, smaller ones pay for more calls. An
# accelerator has no such cache to respect and is starved by small chunks.
_CPU_CHUNK_ELEMENTS = 2**21
_DEVICE_CHUNK_ELEMENTS = 2**25
# One time step of one batch slice on CPU. Sequences are independent, so a large batch is walked in slices.
_CPU_STEP_ELEMENTS = 2**17
# Steps of a chunk are read from [..., L] rows: 16 floats are one cache line.
_STEP_MULTIPLE = 16


def allocate_sums(
    names: Iterable[str],
    *,
    channels: int,
    state_size: int,
    length: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Zeroed accumulators for `selective_scan`.

    Args:
        names: keys of `SCAN_SUMS`, which gives their meaning.
        channels, state_size, length: I, N and L. Only "state_prev" and "decay_sum" depend on L.
        device: where the scan will run.
        dtype: float32 or float64.

    Returns:
        A tensor of shape [I, N], [L, I, N] or [I] for every name. The time-indexed ones are dense but laid out as the
        scan computes them (channels last in memory), which makes adding to them several times faster.

    Raises:
        ConfigurationError: unknown name, or a dtype in which sums lose precision.
    """
    sizes = {"channels": channels, "state_size": state_size, "length": length}
    sums = allocate(SCAN_SUMS, names, sizes, device, dtype)
    for name in ("state_prev", "decay_sum"):
        if name in sums:
            sums[name] = sums[name].view(length, state_size, channels).transpose(1, 2)
    return sums


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    *,
    sums: dict[str, torch.Tensor] | None = None,
    return_last_state: bool = False,
    chunk_size: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-1 selective scan (arXiv 2312.00752, Eq. 2 and Algorithm 2) with sums over time.

    With Δ = dt + delta_bias, through softplus if asked, h_{-1} = 0 and dA_{t,c,n} = exp(Δ_{t,c} A_{c,n}):
    h_t = dA_t h_{t-1} + Δ_{t,c} B_{t,n} x_{t,c}, and y_{t,c} = (Σ_n C_{t,n} h_{t,c,n} + D_c x_{t,c}) silu(z_{t,c}).

    Args:
        x: scan input after convolution and SiLU, [B, I, L].
        dt: time step before bias and softplus, [B, I, L].
        A: negative state matrix -exp(A_log), [I, N].
        B, C: input and output maps, [B, N, L].
        D: skip connection, [I].
        z: gate, [B, I, L].
        delta_bias: added to dt, [I].
        delta_softplus: whether Δ goes through softplus.
        sums: accumulators by name (`SCAN_SUMS`, `allocate_sums`), ADDED TO in place, float32 or float64.
        return_last_state: also return h_{L-1}.
        chunk_size: time steps held at once, by default from B·I·N. It changes results by rounding only.

    Returns:
        y, [B, I, L] in x's dtype (a transposed view of a contiguous [B, L, I]); with `return_last_state` also the
        state [B, I, N]. State and arithmetic are float32 (float64 where x is float64), whatever the other dtypes.

    Raises:
        ConfigurationError: a sum that is unknown, of wrong shape, dtype or device; "gate_energy" without z;
            chunk_size < 1.
        CalibrationError: an input requires grad and grad mode is on; the scan works in place.
    """
    check_inputs("selective_scan", chunk_size, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    sums = sums or {}
    sizes = {"channels": x.shape[1], "state_size": A.shape[1], "length": x.shape[2]}
    check_sums(sums, SCAN_SUMS, sizes, x.device)
    if "gate_energy" in sums and z is None:
        raise ConfigurationError("sum 'gate_energy' needs the gate: pass z or leave the sum out")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        y, state = _scan(_Inputs(x, dt, A, B, C, D, z, delta_bias, delta_softplus), sums, chunk_size)
    return (y, state) if return_last_state else y


@dataclass(frozen=True)
class _Inputs:
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


def _scan(inputs: _Inputs, sums: dict[str, torch.Tensor], chunk_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, I, L] and the last state [B, I, N]."""
    x, state_size = inputs.x, inputs.A.shape[1]
    batch, channels, length = x.shape
    sequences, steps = _tiling(x, state_size, chunk_size)
    y = x.new_empty(batch, length, channels)
    state = x.new_empty(batch, state_size, channels, dtype=compute_dtype(x))
    for first in range(0, batch, sequences):
        part = slice(first, first + sequences)
        _BatchSlice(inputs, part).run(y[part], state[part], sums, steps)
    return y.transpose(1, 2), state.transpose(1, 2)


def _tiling(x: torch.Tensor, state_size: int, chunk_size: int | None) -> tuple[int, int]:
    """How many sequences run together, and how many time steps a chunk has."""
    batch, channels, length = x.shape
    step = max(1, channels * state_size)
    on_cpu = x.device.type == "cpu"
    sequences = max(1, min(batch, _CPU_STEP_ELEMENTS // step)) if on_cpu else max(1, batch)
    if chunk_size is None:
        elements = _CPU_CHUNK_ELEMENTS if on_cpu else _DEVICE_CHUNK_ELEMENTS
        chunk_size = math.ceil(elements / (sequences * step * _STEP_MULTIPLE)) * _STEP_MULTIPLE
    return sequences, max(1, min(length, chunk_size))


class _BatchSlice:
    """b sequences that run together: their inputs, the small ones already in the layout of the buffers."""

    def __init__(self, inputs: _Inputs, part: slice) -> None:
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
        """Fills y [b, L, I] and last_state [b, N, I] and adds to `sums`, `steps` time steps at once."""
        (batch, channels, length), state_size = self.x.shape, self.A.shape[0]
        decay = self.A.new_empty(steps, batch, state_size, channels)
        # Row 0 carries the state over from the last chunk, row k + 1 is the state after step k: so the states before
        # and after every step are two views of one buffer.
        states = self.A.new_empty(steps + 1, batch, state_size, channels)
        states[0].zero_()
        decay_rows, state_rows = decay.unbind(0), states.unbind(0)
        totals = _SliceSums(sums, states[0], steps)
        for start in range(0, length, steps):
            window = slice(start, min(start + steps, length))
            count = window.stop - window.start
            x = _time_first(self.x[:, :, window], self.A.dtype)
            B, C = self.B[window], self.C[window]
            delta = self._delta(window)
            torch.mul(delta.unsqueeze(2), self.A, out=decay[:count]).exp_()
            torch.mul((delta * x).unsqueeze(2), B.unsqueeze(3), out=states[1 : count + 1])
            for step in range(count):
                state_rows[step + 1].addcmul_(decay_rows[step], state_rows[step])
            y[:, window].copy_(self._output(window, x, states[1 : count + 1], C, totals).transpose(0, 1))
            totals.add(window, decay[:count], states[: count + 1], C.unsqueeze(3))
            state_rows[0].copy_(state_rows[count])
        totals.close()
        last_state.copy_(states[0])

    def _output(
        self, window: slice, x: torch.Tensor, states: torch.Tensor, C: torch.Tensor, totals: "_SliceSums"
    ) -> torch.Tensor:
        """y of the steps of `window`, [steps, b, I]."""
        output = torch.bmm(C.flatten(0, 1).unsqueeze(1), states.flatten(0, 1)).view(x.shape)
        if self.D is not None:
            output.addcmul_(x, self.D)
        if self.z is not None:
            gate = F.silu(_time_first(self.z[:, :, window], self.A.dtype))
            output.mul_(gate)
            totals.add_gate(gate)
        return output

    def _delta(self, window: slice) -> torch.Tensor:
        """Δ of the steps of `window`, [steps, b, I]."""
        delta = _time_first(self.dt[:, :, window], self.A.dtype)
        if self.delta_bias is not None:
            delta = delta + self.delta_bias
        return F.softplus(delta) if self.delta_softplus else delta


class _SliceSums:
    """The sums of one batch slice. Those over time are taken in the scan's dtype over one call and only then added to
    the caller's tensors, so that float64 accumulators lose nothing over many calls."""

    _OVER_TIME = ("decay_error", "state_energy", "state_prev_total")

    def __init__(self, sums: dict[str, torch.Tensor], state: torch.Tensor, steps: int) -> None:
        self.sums = sums
        self.shape = state.shape
        self.partial = {name: state.new_zeros(state.numel()) for name in self._OVER_TIME if name in sums}
        if "gate_energy" in sums:
            self.partial["gate_energy"] = state.new_zeros(self.shape[0] * self.shape[2])
        self.ones = state.new_ones(steps)

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
