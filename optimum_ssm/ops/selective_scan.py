# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 selective scan, with sums over time taken in the same pass.

On a GPU with Triton it is one kernel (`triton_selective_scan.py`), on a CPU with a C compiler one function in C
(`native_selective_scan.py`). In torch time runs in chunks (`recurrence.py`): the states of a chunk are held together,
those of the sequence never.

The sums serve SparseSSM (arXiv 2506.09613, Theorem 1 and Algorithm 1: "state_prev", "state_prev_total", "decay_sum"),
the exact squared change of y when one A_log entry becomes memoryless ("decay_error") and the squared change of y when
one state of one channel is removed, the state energy of GHOST (arXiv 2602.11408: "state_energy").
"""

from collections.abc import Iterable

import torch

from ..errors import ConfigurationError
from .backend import scan_backend
from .recurrence import BatchSlice, Inputs
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

# Elements of one chunk buffer. On CPU they are counted per thread: a thread's share of both buffers stays in its own
# cache. An accelerator is starved by small chunks.
_CPU_CHUNK_ELEMENTS = 2**17
_DEVICE_CHUNK_ELEMENTS = 2**25
# One time step of one batch slice on CPU. Sequences are independent, so a large batch is walked in slices.
_CPU_STEP_ELEMENTS = 2**16


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
    backend: str | None = None,
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
        chunk_size: time steps that torch holds at once, by default from B·I·N. It changes results by rounding only.
        backend: "torch", "triton", "native" or "auto" (`backend.scan_backend`), by default what the environment
            variable OPTIMUM_SSM_SCAN says or "auto". They differ by rounding.

    Returns:
        y, [B, I, L] in x's dtype (a transposed view of a contiguous [B, L, I]); with `return_last_state` also the
        state [B, I, N]. State and arithmetic are float32 (float64 where x is float64), whatever the other dtypes.

    Raises:
        ConfigurationError: a sum that is unknown, of wrong shape, dtype or device; "gate_energy" without z;
            chunk_size < 1; an unknown backend, or "triton" or "native" where it cannot run.
        CalibrationError: an input requires grad and grad mode is on; the scan works in place.
    """
    check_inputs("selective_scan", chunk_size, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    sums = sums or {}
    sizes = {"channels": x.shape[1], "state_size": A.shape[1], "length": x.shape[2]}
    check_sums(sums, SCAN_SUMS, sizes, x.device)
    if "gate_energy" in sums and z is None:
        raise ConfigurationError("sum 'gate_energy' needs the gate: pass z or leave the sum out")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        inputs = Inputs(x, dt, A, B, C, D, z, delta_bias, delta_softplus)
        chosen = scan_backend(x, A.shape[1], backend)
        if chosen == "torch":
            y, state = _scan(inputs, sums, chunk_size)
        else:
            if chosen == "triton":
                from .triton_selective_scan import scan
            else:
                from .native_selective_scan import scan
            y, state = scan(inputs, sums)
    return (y, state) if return_last_state else y


def _scan(inputs: Inputs, sums: dict[str, torch.Tensor], chunk_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, I, L] and the last state [B, I, N]."""
    x, state_size = inputs.x, inputs.A.shape[1]
    batch, channels, length = x.shape
    sequences, steps = _tiling(x, state_size, chunk_size)
    y = x.new_empty(batch, length, channels)
    state = x.new_empty(batch, state_size, channels, dtype=compute_dtype(x))
    for first in range(0, batch, sequences):
        part = slice(first, first + sequences)
        BatchSlice(inputs, part).run(y[part], state[part], sums, steps)
    return y.transpose(1, 2), state.transpose(1, 2)


def _tiling(x: torch.Tensor, state_size: int, chunk_size: int | None) -> tuple[int, int]:
    """How many sequences run together, and how many time steps a chunk has."""
    batch, channels, length = x.shape
    step = max(1, channels * state_size)
    sequences, elements = max(1, batch), _DEVICE_CHUNK_ELEMENTS
    if x.device.type == "cpu":
        sequences = max(1, min(batch, _CPU_STEP_ELEMENTS // step))
        elements = _CPU_CHUNK_ELEMENTS * torch.get_num_threads()
    steps = elements // (sequences * step) if chunk_size is None else chunk_size
    return sequences, max(1, min(length, steps))
