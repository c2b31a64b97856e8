# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The gated RMSNorm between Mamba-2's scan and its output projection, in one kernel on a GPU.

transformers' module is eight operations on float32 copies of the activations: at the size of a published model they take
longer than the products before and after them.
"""

import torch

from .backend import use_triton


# Channels of a group, which one program holds in registers; the largest published model has 8,192.
MOST_CHANNELS = 16384


def can_normalise(x: torch.Tensor, gate: torch.Tensor | None, group_size: int) -> bool:
    """Whether `gated_norm` can run and is worth it: on a GPU (or in Triton's interpreter), without autograd, on [B, L, I]
    with neighbouring channels side by side, and where the environment variable OPTIMUM_SSM_SCAN asks for no other backend."""
    if gate is None or torch.is_grad_enabled() or not x.numel() or group_size > MOST_CHANNELS:
        return False
    rows = x.dim() == gate.dim() == 3 and x.stride(2) == gate.stride(2) == 1
    return rows and use_triton(x, 0)


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int, eps: float) -> torch.Tensor:
    """y = weight u / sqrt(mean(u^2) + eps) with u = x SiLU(gate), the mean over every `group_size` channels (arXiv 2405.21060,
    Section 7; transformers' `MambaRMSNormGated`).

    Args:
        x: scan output, [B, L, I] with stride 1 over I.
        gate: of the same shape, with stride 1 over I.
        weight: [I].
        group_size: channels that are normalised together; divides I.
        eps: added to the mean.

    Returns:
        y, [B, L, I] in gate's dtype, which is the projection's: rounded once. Arithmetic is float32.

    Raises:
        ConfigurationError: a tensor of wrong shape or on another device than x, or channels that do not divide into groups.
    """
    from .triton_gated_norm import normalise

    return normalise(x, gate, weight, group_size, eps)
