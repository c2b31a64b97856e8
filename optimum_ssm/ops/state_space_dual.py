# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 scan, with sums over time taken in the same pass: in torch by chunks of matrix products.

On a GPU with Triton it is one kernel instead (`triton_state_space_dual.py`). In torch no single state inside a chunk
is ever formed, also not for the sums: they need only the squared norms of the states over the head dim, and these
follow a scalar recursion that is itself a lower-triangular matrix product (`_Chunk.add_sums`).

"state_energy" is the state energy of GHOST (arXiv 2602.11408): the squared change of y when one state is removed.
"decay_error" is the Mamba-2 form of what SparseSSM (arXiv 2506.09613) asks of A_log: the squared change of y when one
state of a head becomes memoryless, summed over the states of the head.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..errors import ConfigurationError
from .backend import use_triton
from .scan_sums import ScanSum, allocate, check_inputs, check_sums, compute_dtype


SCAN_SUMS: dict[str, ScanSum] = {
    "decay_error": ScanSum(("heads",), "sum over s, t, p, n of C_{t,g(h),n}^2 (dA_{t,h} h_{t-1,h,p,n})^2"),
    "state_energy": ScanSum(("heads", "state_size"), "sum over s, t, p of (C_{t,g(h),n} h_{t,h,p,n})^2"),
}

# exp of it is 0 also in float64. Without the bound a memoryless head (A = -exp(38) and beyond) would make the
# cumulative sums infinite and their differences NaN.
_MIN_LOG_DECAY = -1e3


def allocate_sums(
    names: Iterable[str],
    *,
    heads: int,
    state_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Zeroed accumulators for `state_space_dual`.

    Args:
        names: keys of `SCAN_SUMS`, which gives their meaning.
        heads, state_size: H and N.
        device: where the scan will run.
        dtype: float32 or float64.

    Returns:
        A tensor of shape [H] ("decay_error") or [H, N] ("state_energy") for every name.

    Raises:
        ConfigurationError: unknown name, or a dtype in which sums lose precision.
    """
    return allocate(SCAN_SUMS, names, {"heads": heads, "state_size": state_size}, device, dtype)


def state_space_dual(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: torch.Tensor | None = None,
    sums: dict[str, torch.Tensor] | None = None,
    return_final_states: bool = False,
    chunk_size: int = 64,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2 scan by state space duality (arXiv 2405.21060, Section 6, block decomposition) with sums over time.

    With Δ = dt + dt_bias, through softplus if asked, clamped to `dt_limit`; g(h) the group of head h:
    h_t = exp(Δ_{t,h} A_h) h_{t-1} + Δ_{t,h} B_{t,g(h),n} x_{t,h,p},
    y_{t,h,p} = Σ_n C_{t,g(h),n} h_{t,h,p,n} + D_h x_{t,h,p}.

    Args:
        x: scan input after convolution and SiLU, [B, L, H, P].
        dt: time step before bias and softplus, [B, L, H].
        A: negative decay rate -exp(A_log), [H].
        B, C: input and output maps, [B, L, G, N]; G divides H.
        D: skip connection, [H].
        dt_bias: added to dt, [H].
        dt_softplus: whether Δ goes through softplus.
        dt_limit: smallest and largest Δ.
        initial_states: h_{-1}, [B, H, P, N]; zero by default.
        sums: accumulators by name (`SCAN_SUMS`, `allocate_sums`), ADDED TO in place, float32 or float64. They are exact to
            float32 but for bfloat16 inputs in Triton, whose products round: over 2,048 tokens some 1e-4 of a sum
            (`triton_chunk_sums.py`).
        return_final_states: also return h_{L-1}.
        chunk_size: time steps per matrix product in torch. Results do not depend on it but for rounding.
        backend: "torch", "triton" or "auto" (`backend.use_triton`), by default what the environment variable
            OPTIMUM_SSM_SCAN says or "auto". They differ by rounding.

    Returns:
        y, [B, L, H, P]; with `return_final_states` also the state [B, H, P, N]. Both and all arithmetic are float32
        (float64 where x is float64), as in transformers' `mamba2_chunk_scan`.

    Raises:
        ConfigurationError: a sum that is unknown, of wrong shape, dtype or device; chunk_size < 1; H not divisible
            by G; an unknown backend, or "triton" where it cannot run.
        CalibrationError: an input requires grad and grad mode is on; the scan works in place.
    """
    tensors = {"D": D, "dt_bias": dt_bias, "initial_states": initial_states}
    check_inputs("state_space_dual", chunk_size, x=x, dt=dt, A=A, B=B, C=C, **tensors)
    heads, (groups, state_size) = x.shape[2], B.shape[2:]
    if heads % groups:
        raise ConfigurationError(f"{heads} heads cannot share {groups} groups of B and C: G must divide H")
    if backend == "native":  # named in the environment, it is for the scans that have it
        raise ConfigurationError("backend is 'native', which only Mamba's scan has: allowed are auto, torch, triton")
    sums = sums or {}
    check_sums(sums, SCAN_SUMS, {"heads": heads, "state_size": state_size}, x.device)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        delta = _time_step(dt.to(compute_dtype(x)), dt_bias, dt_softplus, dt_limit)
        if use_triton(x, state_size, backend):
            from .triton_state_space_dual import scan

            y, states = scan(x, delta, A, B, C, D, initial_states, sums)
        else:
            y, states = _scan(x, delta, A, B, C, D, initial_states, sums, chunk_size)
    return (y, states) if return_final_states else y


def _scan(
    x: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_states: torch.Tensor | None,
    sums: dict[str, torch.Tensor],
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, L, H, P] and the final state [B, H, P, N]; arguments as in `state_space_dual`, delta = Δ."""
    batch, length, heads, head_dim = x.shape
    dtype = delta.dtype
    y = x.new_empty(x.shape, dtype=dtype)
    if initial_states is None:
        states = x.new_zeros(batch, heads, head_dim, B.shape[3], dtype=dtype)
    else:
        states = initial_states.to(x.device, dtype)
    for start in range(0, length, chunk_size):
        window = slice(start, start + chunk_size)
        chunk = _Chunk(x[:, window].to(dtype), delta[:, window], A, B[:, window].to(dtype), C[:, window].to(dtype))
        chunk.output(states, D, y[:, window])
        if sums:
            chunk.add_sums(states, sums)
        states = chunk.advance(states)
    return y, states


def _time_step(
    dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool, limit: tuple[float, float]
) -> torch.Tensor:
    """Δ, [B, L, H]."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    if softplus:
        dt = F.softplus(dt)
    return dt.clamp(min=limit[0], max=limit[1])


class _Chunk:
    """T time steps of every sequence and head. The E = H / G heads of a group read the same B and C, so products with
    them run over E·P or E·T rows at once instead of on copies of B and C for every head."""

    def __init__(self, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> None:
        # The inputs usually are views of a [B, channels, L] convolution output, whose rows run along time.
        self.raw = x.contiguous()
        self.batch, self.steps, self.heads, self.head_dim = x.shape
        self.groups, self.state_size = B.shape[2:]
        self.x = self.raw * dt.unsqueeze(-1)  # [B, T, H, P]
        self.B, self.C = B.transpose(1, 2).contiguous(), C.transpose(1, 2).contiguous()  # [B, G, T, N]
        log_decay = (dt * A.to(dt.dtype)).clamp_(min=_MIN_LOG_DECAY).transpose(1, 2)
        # Differences of cumulative sums cancel: float64 keeps them exact enough, at the cost of H numbers per token.
        total = log_decay.double().cumsum(-1)  # [B, H, T]
        # decay[t, s] = dA_{s+1} ... dA_t for s <= t. Above the diagonal exp overflows to inf, which tril drops.
        self.decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dt.dtype).exp_().tril_()  # [B, H, T, T]
        self.decay_from_start = total.exp_().to(dt.dtype)  # [B, H, T]: from the state before the chunk to step t

    def output(self, states: torch.Tensor, D: torch.Tensor | None, y: torch.Tensor) -> None:
        """Writes y [B, T, H, P]: what the chunk's own inputs and the state before it (`states`) contribute."""
        scores = (self.C @ self.B.transpose(-1, -2)).unsqueeze(2)  # [B, G, 1, T, T]
        weights = (self._by_group(self.decay) * scores).flatten(1, 2)
        inside = weights @ self.x.transpose(1, 2)  # [B, H, T, P]
        before = self.C @ self._group_rows(states).transpose(-1, -2)  # [B, G, T, E·P]
        before = before.view(self.batch, self.groups, self.steps, -1, self.head_dim).transpose(1, 2).flatten(2, 3)
        torch.mul(before, self.decay_from_start.transpose(1, 2).unsqueeze(-1), out=y)
        y.add_(inside.transpose(1, 2))
        if D is not None:
            y.addcmul_(self.raw, D.to(y.dtype).unsqueeze(-1))

    def advance(self, states: torch.Tensor) -> torch.Tensor:
        """The state after the chunk, from the one before it, [B, H, P, N]."""
        decayed = self.x * self.decay[:, :, -1].transpose(1, 2).unsqueeze(-1)  # every input as it stands at the end
        rows = decayed.view(self.batch, self.steps, self.groups, -1).permute(0, 2, 3, 1)  # [B, G, E·P, T]
        added = (rows @ self.B).view(states.shape)
        return added.addcmul_(states, self.decay_from_start[:, :, -1, None, None])

    def add_sums(self, states: torch.Tensor, sums: dict[str, torch.Tensor]) -> None:
        """Adds the chunk to `sums`; `states` is the state before it.

        With q_t[n] = Σ_p h_{t,p,n}² and x~ = Δ x, the recurrence squared gives (derived here, per head)
            q_t = dA_t² q_{t-1} + s_t,  s_t[n] = B_{t,n} (2 dA_t x~_t·h_{t-1}[:, n] + B_{t,n} |x~_t|²),
            dA_t x~_t·h_{t-1}[:, n] = Σ_{r<t} decay(t, r) (x~_t·x~_r) B_{r,n} + decay_from_start(t) x~_t·h_start[:, n],
        and, solved, dA_t² q_{t-1} = Σ_{r<t} decay(t, r)² s_r + decay_from_start(t)² q_start. This last quantity is
        what is computed: it keeps its relative accuracy where dA_t is tiny, which q_t - s_t would not.
        """
        x = self.x.transpose(1, 2)  # [B, H, T, P]
        weights = (x @ x.transpose(-1, -2)).mul_(self.decay)
        weights = weights.add_(weights.tril(-1))  # 2 below the diagonal, 1 on it
        source = (self._group_rows(weights) @ self.B).view(self.batch, self.heads, self.steps, self.state_size)
        source += (x * (2 * self.decay_from_start).unsqueeze(-1)) @ states
        source = self._by_group(source).mul_(self.B.unsqueeze(2)).flatten(1, 2)
        before = self.decay.square().tril_(-1) @ source
        before.addcmul_(self.decay_from_start.square().unsqueeze(-1), states.square().sum(2, keepdim=True))
        # Rounding can leave the norm of a state that has nearly cancelled slightly negative.
        before.clamp_(min=0)
        squares = self.C.square().unsqueeze(2)
        if "state_energy" in sums:
            energy = self._by_group(source.add_(before).clamp_(min=0)).mul_(squares)
            sums["state_energy"] += energy.flatten(1, 2).sum((0, 2))
        if "decay_error" in sums:
            error = self._by_group(before).mul_(squares)
            sums["decay_error"] += error.flatten(1, 2).sum((0, 2, 3))

    def _by_group(self, values: torch.Tensor) -> torch.Tensor:
        """[B, H, ...] as [B, G, E, ...]."""
        return values.unflatten(1, (self.groups, -1))

    def _group_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[B, H, R, K] as [B, G, E·R, K]: the rows of all heads of a group under each other."""
        return self._by_group(values).flatten(2, 3)
