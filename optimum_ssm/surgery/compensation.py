# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the output projection can make up for after units are gone, on calibration inputs of the block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..methods._quadratic import conjugate_gradients


DAMPING = 1e-2  # of the mean diagonal of the Gram matrix, as in SparseGPT
STEPS = 100  # of conjugate gradients, where some entries must stay zero


def compensate(
    kind: str,
    block: nn.Module,
    output: str,
    samples: Iterable[tuple[Tensor, Tensor]],
    forward: Callable[[Tensor], Tensor],
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    gone: Tensor | None = None,
) -> None:
    """Change the output projection so that the cut block comes nearer to what the dense one gave.

    With u the inputs of the projection in the cut block, W its weight, y the dense block's contribution to the residual
    stream and r = y - W u (and its bias): `"bias"` adds the mean of r over tokens to the bias, so that the mean output is
    the dense one's (FLAP, arXiv 2312.11983, has the mean of the removed inputs instead: the same where the other inputs
    do not change). `"least_squares"` adds E[r uᵀ] (E[u uᵀ] + λ I)⁻¹ to W, or where entries of W must stay zero the change
    of the others that is best under the same damping.

    Args:
        kind (`str`): `"bias"` or `"least_squares"`.
        block (`nn.Module`): already cut, changed in place. A bias is made where there is none.
        output (`str`): path of the projection inside the block.
        samples (`Iterable[tuple[Tensor, Tensor]]`): inputs and dense outputs of the block, (B, L, hidden) each.
        forward (`Callable`): the block as a function of its input.
        total (`Callable`): adds a sum over samples up over all processes, in place, where others have other samples.
        gone (`Tensor`, *optional*): bool, shape of the cut weight: entries that stay as they are.

    Raises:
        CalibrationError: the Gram matrix cannot be inverted.
    """
    linear = block.get_submodule(output)
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    device, width = linear.weight.device, linear.in_features
    residual_mean = torch.zeros(linear.out_features, dtype=torch.float64, device=device)
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(linear.out_features, width, dtype=torch.float64, device=device)
    tokens = 0
    try:
        for x, dense in samples:
            seen.clear()
            lost = dense.float() - forward(x).float()
            lost, u = lost.reshape(-1, lost.shape[-1]), seen[0].float().reshape(-1, width)
            tokens += len(lost)
            residual_mean += lost.sum(0, dtype=torch.float64)
            if kind == "least_squares":
                gram += u.T @ u
                cross += lost.T @ u
    finally:
        handle.remove()
    tokens = int(total(torch.tensor(tokens, device=device)))
    with torch.no_grad():
        for part in (residual_mean,) if kind == "bias" else (gram, cross):
            total(part)
        if kind == "bias":
            _add_bias(linear, (residual_mean / tokens).float())
        else:
            linear.weight.copy_(
                linear.weight.float() + _solve((gram / tokens).float(), (cross / tokens).float(), gone)
            )


def give_bias(linear: nn.Linear) -> None:
    """A bias of zeros for a projection that has none."""
    if linear.bias is None:
        zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=linear.weight.device)
        linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)


def _add_bias(linear: nn.Linear, change: Tensor) -> None:
    give_bias(linear)
    linear.bias.copy_(linear.bias.float() + change)


def _solve(gram: Tensor, cross: Tensor, gone: Tensor | None) -> Tensor:
    """cross (gram + λ I)⁻¹ by Cholesky, float64; with zeros in `gone` by conjugate gradients towards that."""
    gram, cross = gram.double(), cross.double()
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info) or not factor.isfinite().all():
        raise CalibrationError(
            "the inputs of the output projection have no invertible Gram matrix; nothing was fitted"
        )
    change = torch.cholesky_solve(cross.T, factor).T
    if gone is not None and gone.any():
        start = torch.zeros_like(change)
        change = conjugate_gradients(start, change, gone.to(change.device), damped, STEPS, tolerance=1e-6)
    return change.float()
