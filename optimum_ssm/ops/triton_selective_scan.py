# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan with sums over time as one Triton kernel: what `selective_scan` runs on a GPU.

One program walks the time steps of BLOCK_S sequences for BLOCK_D channels and all states. The state and the sums stay in
registers; each input is read once, y is written once. BLOCK_S is 1, but for sums that are kept for every time step: L I N
numbers are read and written once for all sequences of a program.

Time runs in groups of T steps, whose tiles [T, BLOCK_S, BLOCK_D] are loaded while the group before is computed. Decays, drives
and states of a group are [T, BLOCK_N, BLOCK_S, BLOCK_D] tiles with all T steps of an entry in one thread: "take step k out of
the tile" and "put step k into it" are then register names and cost nothing.

Cost for B sequences of L steps, I channels, N states: per state and step one exponential, which costs a GPU as much as
8 multiply-adds, and 6 other operations, 9 with "decay_error" and "state_energy"; compiled for sm_90 at N = 16 that is
15 and 20 instructions, loads and reductions included. In bytes: x, Δ, z read and y written once. At N = 16 and 4 bytes
an element, memory (16 B I L bytes at 4.3e12 per second), the exponentials and the operations (at 33e12 per second) of
an H200 each take about 4e-12 B I L seconds: no second pass and no transposed copy of an input would be free. B and C,
which are N / I as large as x, are copied to rows over n.

Sums over time are kept per sequence and added up by torch: without atomic additions, equal inputs give equal bits.
"""

import math

import torch
import triton
import triton.language as tl

from .backend import check_operands, on_device_of
from .recurrence import Inputs


_OVER_TIME = ("decay_error", "state_energy", "state_prev_total")
_TIME_INDEXED = ("state_prev", "decay_sum")
# exp(x) = 2^(x log2 e). Memoryless entries (A = -exp(88)) must not become -inf, which times Δ = 0 is NaN.
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_A = tl.constexpr(-3.0e38)


def scan(inputs: Inputs, sums: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, I, L] in x's dtype and the last state [B, I, N] in float32; adds to `sums`.

    Arguments are as in `selective_scan`, which has checked `sums`. Arithmetic is float32 whatever the dtypes.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x.
    """
    x, state_size = inputs.x, inputs.A.shape[1]
    batch, channels, length = x.shape
    rows, maps = x.shape, (batch, state_size, length)
    shapes = {"dt": rows, "z": rows, "B": maps, "C": maps, "A": (channels, state_size)}
    shapes |= {"D": (channels,), "delta_bias": (channels,)}
    check_operands(x, {name: (getattr(inputs, name), shape) for name, shape in shapes.items()})
    y = x.new_empty(batch, length, channels)
    state = x.new_empty(batch, state_size, channels, dtype=torch.float32)
    partial = {name: torch.empty_like(state) for name in _OVER_TIME if name in sums}
    if "gate_energy" in sums:
        partial["gate_energy"] = state.new_empty(batch, channels)
    B, C = (maps.transpose(1, 2).to(torch.float32).contiguous() for maps in (inputs.B, inputs.C))
    per_sequence = {"x": x, "dt": inputs.dt, "B": B, "C": C, "z": inputs.z, "y": y, "last_state": state, **partial}
    shared = {name: sums[name] for name in _TIME_INDEXED if name in sums}
    for name in ("A", "D", "delta_bias"):
        tensor = getattr(inputs, name)
        shared[name] = None if tensor is None else tensor.contiguous()
    # What is kept for every time step is added to where it lies, by one program for some channels: one after the other.
    sizes = block_sizes(state_size, bool(shared.keys() & set(_TIME_INDEXED)))
    together = batch if sizes["BLOCK_S"] == 1 else sizes["BLOCK_S"]
    with on_device_of(x):
        for first in range(0, batch, together):
            part = slice(first, first + together)
            own = {name: None if tensor is None else tensor[part] for name, tensor in per_sequence.items()}
            _launch(own | shared, inputs.delta_softplus, sizes)
    for name, values in partial.items():
        total = values.sum(0)
        sums[name].add_(total if name == "gate_energy" else total.t())
    return y.transpose(1, 2), state.transpose(1, 2)


def block_sizes(state_size: int, time_indexed: bool = False) -> dict[str, int]:
    """T, the sizes of a program's part and the number of warps. A thread holds 32 elements of a tile of all of them: more
    would spill, fewer leave the tiles of x and Δ and their softplus a larger share of the work. With sums of every time step,
    which threads have to add up over sequences, longer groups gain nothing, and 16 elements are enough."""
    states = triton.next_power_of_2(state_size)
    if time_indexed:
        sizes = {"T": 1, "BLOCK_N": states, "BLOCK_S": 8, "BLOCK_D": min(16, max(4, 128 // states))}
        return sizes | {"num_warps": min(8, max(1, math.prod(sizes.values()) // 512))}
    sizes = {"T": 8 if states < 256 else 4, "BLOCK_N": states, "BLOCK_S": 1, "BLOCK_D": min(32, max(8, 128 // states))}
    return sizes | {"num_warps": max(1, math.prod(sizes.values()) // 1024)}


def _launch(tensors: dict[str, torch.Tensor | None], softplus: bool, sizes: dict[str, int]) -> None:
    x, A = tensors["x"], tensors["A"]
    batch, channels, length = x.shape
    strides = {}
    for name in ("x", "dt", "z"):
        values = (0, 0, 0) if tensors[name] is None else tensors[name].stride()
        strides |= zip((f"{name}_batch", f"{name}_channel", f"{name}_step"), values, strict=True)
    for name in _TIME_INDEXED:
        values = (0, 0, 0) if name not in tensors else tensors[name].stride()
        strides |= zip((f"{name}_step", f"{name}_channel", f"{name}_n"), values, strict=True)
    absent = dict.fromkeys((*_OVER_TIME, *_TIME_INDEXED, "gate_energy"))
    _scan_kernel[(triton.cdiv(channels, sizes["BLOCK_D"]), triton.cdiv(batch, sizes["BLOCK_S"]))](
        **absent | tensors,
        **strides,
        sequences=batch,
        channels=channels,
        state_size=A.shape[1],
        length=length,
        SOFTPLUS=softplus,
        **sizes,
    )


@triton.jit
def _softplus(value):
    # max(v, 0) + log(1 + exp(-|v|)), the logarithm as 2 atanh(u / (2 + u)): its series ends below float32 rounding, as
    # its argument is at most 1/3. The plain logarithm of 1 + u would lose small time steps to rounding.
    small = tl.exp(-tl.abs(value))
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = square / 15.0 + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.maximum(value, 0.0) + 2.0 * ratio * series


@triton.jit
def _scan_kernel(
    # [B, I, L] with any strides; z may be None
    x,
    dt,
    z,
    # [I, N]; [B, L, N] float32; [I] or None. All contiguous, as are the outputs
    A,
    B,
    C,
    D,
    delta_bias,
    # [B, L, I]; [B, N, I]
    y,
    last_state,
    # [B, N, I], gate_energy [B, I]: written; [L, I, N] with any strides: added to. None where not asked for
    decay_error,
    state_energy,
    state_prev_total,
    gate_energy,
    state_prev,
    decay_sum,
    sequences,
    channels,
    state_size,
    length,
    x_batch,
    x_channel,
    x_step,
    dt_batch,
    dt_channel,
    dt_step,
    z_batch,
    z_channel,
    z_step,
    state_prev_step,
    state_prev_channel,
    state_prev_n,
    decay_sum_step,
    decay_sum_channel,
    decay_sum_n,
    SOFTPLUS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = (tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    wide_channel = channel.to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    t = tl.arange(0, T)
    in_sequences = sequence < sequences
    in_channels = channel < channels
    in_states = n < state_size
    in_state = in_states[:, None] & in_channels[None, :]
    in_rows = in_sequences[:, None] & in_channels[None, :]
    in_maps = in_states[:, None] & in_sequences[None, :]

    rates = tl.load(A + channel[None, :] * state_size + n[:, None], mask=in_state, other=0.0).to(tl.float32)
    rates = rates * _LOG2_E
    rates = tl.where(rates < _MIN_A, _MIN_A, rates)[None, :, None, :]  # not tl.maximum, which would hide a NaN
    if D is not None:
        skip = tl.load(D + channel, mask=in_channels, other=0.0).to(tl.float32)
    if delta_bias is not None:
        bias = tl.load(delta_bias + channel, mask=in_channels, other=0.0).to(tl.float32)

    x_rows = sequence[:, None] * x_batch + wide_channel[None, :] * x_channel
    dt_rows = sequence[:, None] * dt_batch + wide_channel[None, :] * dt_channel
    x_tile = x + x_rows[None, :, :] + t[:, None, None] * x_step
    dt_tile = dt + dt_rows[None, :, :] + t[:, None, None] * dt_step
    map_rows = n[:, None] + sequence[None, :] * length * state_size
    B_tile = B + map_rows[None, :, :] + t[:, None, None] * state_size
    C_tile = C + map_rows[None, :, :] + t[:, None, None] * state_size
    y_tile = y + (sequence * length * channels)[None, :, None] + t[:, None, None] * channels + channel[None, None, :]
    if z is not None:
        z_rows = sequence[:, None] * z_batch + wide_channel[None, :] * z_channel
        z_tile = z + z_rows[None, :, :] + t[:, None, None] * z_step
    if state_prev is not None:
        state_prev_offsets = wide_channel[None, :] * state_prev_channel + n[:, None] * state_prev_n
    if decay_sum is not None:
        decay_sum_offsets = wide_channel[None, :] * decay_sum_channel + n[:, None] * decay_sum_n

    in_first = (t < length)[:, None, None]
    next_x = tl.load(x_tile, mask=in_first & in_rows[None, :, :], other=0.0)
    next_dt = tl.load(dt_tile, mask=in_first & in_rows[None, :, :], other=0.0)
    next_B = tl.load(B_tile, mask=in_first & in_maps[None, :, :], other=0.0)
    next_C = tl.load(C_tile, mask=in_first & in_maps[None, :, :], other=0.0)
    if z is not None:
        next_z = tl.load(z_tile, mask=in_first & in_rows[None, :, :], other=0.0)

    state = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_D), tl.float32)
    if decay_error is not None:
        decay_error_sum = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_D), tl.float32)
    if state_energy is not None:
        state_energy_sum = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_D), tl.float32)
    if state_prev_total is not None:
        state_prev_sum = tl.zeros((BLOCK_N, BLOCK_S, BLOCK_D), tl.float32)
    if gate_energy is not None:
        gate_sum = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)

    for start in range(0, length, T):
        x_now = next_x.to(tl.float32)
        delta = next_dt.to(tl.float32)
        B_now = next_B[:, :, :, None]
        C_now = next_C[:, :, :, None]
        if z is not None:
            gate = next_z.to(tl.float32)
        # The next group is asked for before this one is computed, which takes about as long as memory does.
        in_next = (start + T + t < length)[:, None, None]
        x_tile += T * x_step
        dt_tile += T * dt_step
        B_tile += T * state_size
        C_tile += T * state_size
        next_x = tl.load(x_tile, mask=in_next & in_rows[None, :, :], other=0.0)
        next_dt = tl.load(dt_tile, mask=in_next & in_rows[None, :, :], other=0.0)
        next_B = tl.load(B_tile, mask=in_next & in_maps[None, :, :], other=0.0)
        next_C = tl.load(C_tile, mask=in_next & in_maps[None, :, :], other=0.0)
        if z is not None:
            z_tile += T * z_step
            next_z = tl.load(z_tile, mask=in_next & in_rows[None, :, :], other=0.0)
        in_time = start + t < length
        # h_t² counts as the square before step t + 1, if there is one; before step 0 it is 0.
        is_before = start + t + 1 < length
        if state_prev is not None:
            squares_tile = state_prev + state_prev_offsets[None, :, :] + (t[:, None, None] + 1) * state_prev_step
            squares_mask = is_before[:, None, None] & in_state[None, :, :]
            squares = tl.load(squares_tile, mask=squares_mask, other=0.0)
            state_prev += T * state_prev_step
        if decay_sum is not None:
            decays_tile = decay_sum + decay_sum_offsets[None, :, :] + t[:, None, None] * decay_sum_step
            decays_mask = in_time[:, None, None] & in_state[None, :, :]
            decays = tl.load(decays_tile, mask=decays_mask, other=0.0)
            decay_sum += T * decay_sum_step

        if delta_bias is not None:
            delta += bias[None, None, :]
        if SOFTPLUS:
            delta = _softplus(delta)
        # Beyond the end a step of 0 leaves the state as it is, and C = 0 keeps it out of the sums.
        delta = tl.where(in_time[:, None, None], delta, 0.0)
        decay = tl.exp2(delta[:, None, :, :] * rates)
        drive = (delta * x_now)[:, None, :, :] * B_now
        decayed = tl.zeros((T, BLOCK_N, BLOCK_S, BLOCK_D), tl.float32)  # dA_t h_{t-1}
        states = tl.zeros((T, BLOCK_N, BLOCK_S, BLOCK_D), tl.float32)  # h_t
        for k in tl.static_range(T):
            this_step = (t == k)[:, None, None, None]
            carried = tl.sum(tl.where(this_step, decay, 0.0), 0) * state
            state = carried + tl.sum(tl.where(this_step, drive, 0.0), 0)
            decayed = tl.where(this_step, carried[None, :, :, :], decayed)
            states = tl.where(this_step, state[None, :, :, :], states)

        read = C_now * states
        output = tl.sum(read, 1)
        if D is not None:
            output += x_now * skip[None, None, :]
        if z is not None:
            gate = gate * tl.sigmoid(gate)
            output *= gate
            if gate_energy is not None:
                gate_sum += tl.sum(gate * gate, 0)
        tl.store(y_tile, output.to(y.dtype.element_ty), mask=in_time[:, None, None] & in_rows[None, :, :])
        y_tile += T * channels

        if state_energy is not None:
            state_energy_sum += tl.sum(read * read, 0)
        if decay_error is not None:
            lost = C_now * decayed
            decay_error_sum += tl.sum(lost * lost, 0)
        if state_prev_total is not None:
            state_prev_sum += tl.sum(tl.where(is_before[:, None, None, None], states * states, 0.0), 0)
        if state_prev is not None:
            squares += tl.sum(states * states, 2).to(squares.dtype)
            tl.store(squares_tile, squares, mask=squares_mask)
        if decay_sum is not None:
            decays += tl.sum(tl.where(in_sequences[None, None, :, None], decay, 0.0), 2).to(decays.dtype)
            tl.store(decays_tile, decays, mask=decays_mask)

    offsets = (sequence[None, :, None] * state_size + n[:, None, None]) * channels + channel[None, None, :]
    in_sums = in_maps[:, :, None] & in_channels[None, None, :]
    tl.store(last_state + offsets, state, mask=in_sums)
    if decay_error is not None:
        tl.store(decay_error + offsets, decay_error_sum, mask=in_sums)
    if state_energy is not None:
        tl.store(state_energy + offsets, state_energy_sum, mask=in_sums)
    if state_prev_total is not None:
        tl.store(state_prev_total + offsets, state_prev_sum, mask=in_sums)
    if gate_energy is not None:
        tl.store(gate_energy + sequence[:, None] * channels + channel[None, :], gate_sum, mask=in_rows)
