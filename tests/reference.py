# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba and Mamba-2 step by step in float64, from the papers' recurrences: the truth that other tests compare with.

Nothing here is shared with the package. Every quantity that a statistic is made of is kept in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


Trace = dict[str, Any]


def trace(model: nn.Module, ids: Tensor) -> tuple[list[Trace], Tensor]:
    """What happens in every block of `model` on `ids` (B, L), and the logits (B, L, vocabulary).

    Of every block: `in_proj`, `x_proj`, `dt_proj`, `out_proj` (B, L, in), the inputs of these weights; `conv1d`
    (B, L, C, K), the windows that its taps see, oldest first; `decay`, `before`, `after`, `readout` (L, B, I or H, ...),
    the decays dA_t, the states h_{t-1} and h_t, and C_t, all broadcast to the shape of the state; `gate` (B, L, I), z;
    `step` (L, B, I or H), `B`, `C` (L, B, G, N), the step and the maps of the recurrence; `output`.
    """
    base = model.base_model
    hidden = base.embeddings.weight.detach().double()[ids]
    blocks = []
    for block in base.layers:
        eps = block.norm.variance_epsilon
        normed = _rms_norm(hidden, block.norm.weight.detach().double(), eps)
        step = _mamba if block.mixer.A_log.dim() == 2 else _mamba2
        seen = step(block.mixer, normed)
        hidden = seen["output"] = hidden + seen["mixed"]
        blocks.append(seen)
    final = _rms_norm(hidden, base.norm_f.weight.detach().double(), base.norm_f.variance_epsilon)
    return blocks, final @ base.embeddings.weight.detach().double().T


def second_moment(x: Tensor) -> Tensor:
    """(1/T) Σ_t x_t x_tᵀ of inputs (..., in), token by token."""
    rows = x.reshape(-1, x.shape[-1])
    return sum(torch.outer(row, row) for row in rows) / len(rows)


def window_moment(windows: Tensor) -> Tensor:
    """(1/T) Σ_t w_t w_tᵀ per channel, of windows (B, L, C, K)."""
    flat = windows.reshape(-1, *windows.shape[2:])
    return torch.stack([second_moment(flat[:, channel]) for channel in range(flat.shape[1])])


def relative_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """tr((W-W') Q (W-W')ᵀ) / tr(W Q Wᵀ) in float64."""
    weight, pruned, gram = weight.double(), pruned.double(), gram.double()
    lost = weight - pruned
    return float(torch.trace(lost @ gram @ lost.T) / torch.trace(weight @ gram @ weight.T))


def _rms_norm(x: Tensor, weight: Tensor, eps: float, group: int | None = None) -> Tensor:
    parts = x.unflatten(-1, (-1, group or x.shape[-1]))
    return weight * (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)


def _windows(x: Tensor, taps: int) -> Tensor:
    """(B, L, C) to (B, L, C, K): at every step the last K inputs, zeros before the first."""
    seen = torch.zeros(*x.shape, taps, dtype=x.dtype)
    for t in range(x.shape[1]):
        for k in range(taps):
            if t - taps + 1 + k >= 0:
                seen[:, t, :, k] = x[:, t - taps + 1 + k]
    return seen


def _convolved(mixer: nn.Module, windows: Tensor) -> Tensor:
    bias = 0.0 if mixer.conv1d.bias is None else mixer.conv1d.bias.detach().double()
    return F.silu((windows * mixer.conv1d.weight.detach().double()[:, 0]).sum(-1) + bias)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    y = x @ module.weight.detach().double().T
    return y if module.bias is None else y + module.bias.detach().double()


def _recur(decay: Tensor, drive: Tensor, readout: Tensor) -> tuple[Trace, Tensor]:
    """h_t = dA_t h_{t-1} + drive_t over (L, B, …, N); returns the trace and y_t = Σ_n C_t h_t as (L, B, …)."""
    before, after = [], []
    state = torch.zeros_like(drive[0])
    for t in range(len(drive)):
        before.append(state)
        state = decay[t] * state + drive[t]
        after.append(state)
    before, after = torch.stack(before), torch.stack(after)
    seen = {"decay": decay.expand_as(after), "before": before, "after": after, "readout": readout.expand_as(after)}
    return seen, (readout * after).sum(-1)


def _mamba(mixer: nn.Module, x: Tensor) -> Trace:
    weights = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}
    inner, states = mixer.A_log.shape
    rank = mixer.dt_proj.weight.shape[1]
    inputs = {"in_proj": x}
    main, gate = _linear(mixer.in_proj, x).split(inner, dim=-1)
    inputs["conv1d"] = _windows(main, mixer.conv1d.weight.shape[-1])
    main = inputs["x_proj"] = _convolved(mixer, inputs["conv1d"])
    inputs["dt_proj"], B, C = (main @ weights["x_proj.weight"].T).split([rank, states, states], dim=-1)
    delta = F.softplus(inputs["dt_proj"] @ weights["dt_proj.weight"].T + weights["dt_proj.bias"])
    main, delta, B, C = (value.transpose(0, 1) for value in (main, delta, B, C))  # time first
    decay = torch.exp(-torch.exp(weights["A_log"]) * delta[..., None])
    drive = (delta * main)[..., None] * B[:, :, None]
    seen, y = _recur(decay, drive, C[:, :, None])
    y = (y + weights["D"] * main).transpose(0, 1)
    inputs["out_proj"] = y * F.silu(gate)
    seen |= {"gate": gate, "step": delta, "B": B[:, :, None], "C": C[:, :, None]}
    return {**inputs, **seen, "mixed": _linear(mixer.out_proj, inputs["out_proj"])}


def _mamba2(mixer: nn.Module, x: Tensor) -> Trace:
    weights = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}
    heads, dim, groups, states = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    inner = heads * dim
    inputs = {"in_proj": x}
    gate, mixed, dt = _linear(mixer.in_proj, x).split([inner, inner + 2 * groups * states, heads], dim=-1)
    inputs["conv1d"] = _windows(mixed, mixer.conv1d.weight.shape[-1])
    main, B, C = _convolved(mixer, inputs["conv1d"]).split([inner, groups * states, groups * states], dim=-1)
    main = main.unflatten(-1, (heads, dim)).transpose(0, 1)
    B, C = (value.unflatten(-1, (groups, states)).transpose(0, 1) for value in (B, C))
    maps = {"B": B, "C": C}
    of_head = [head * groups // heads for head in range(heads)]
    B, C = B[:, :, of_head], C[:, :, of_head]
    delta = F.softplus(dt + weights["dt_bias"]).clamp(*mixer.time_step_limit).transpose(0, 1)
    decay = torch.exp(-torch.exp(weights["A_log"]) * delta)[..., None, None]
    drive = (delta[..., None] * main)[..., None] * B[..., None, :]
    seen, y = _recur(decay, drive, C[..., None, :])
    y = (y + weights["D"][:, None] * main).transpose(0, 1).flatten(-2)
    group = getattr(mixer.norm, "group_size", inner)
    inputs["out_proj"] = _rms_norm(y * F.silu(gate), weights["norm.weight"], mixer.norm.variance_epsilon, group)
    seen |= {"gate": gate, "step": delta, **maps}
    return {**inputs, **seen, "mixed": _linear(mixer.out_proj, inputs["out_proj"])}
