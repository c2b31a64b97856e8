# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Initial values of diagonal state spaces: HiPPO-N eigenvalues and the published draws of S5 (arXiv 2208.04933, App. B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigurationError


C_INITS = ("lecun_normal", "trunc_standard_normal", "complex_normal")
# Standard deviation of a standard normal that is cut off at ±2: draws are divided by it, as flax does.
_TRUNCATED_DEVIATION = 0.87962566103423978


def hippo_normal(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS, by ascending imaginary part.

    S = A + p pᵀ with A the LegS matrix (-(n + 1) on the diagonal, -sqrt((2n + 1)(2k + 1)) below) and p_n = sqrt(n + ½). All
    real parts are -½; the imaginary parts and V come from the Hermitian matrix -iS.

    Returns:
        `tuple[Tensor, Tensor]`: λ (size) and V (size, size), complex128.
    """
    n = torch.arange(size, dtype=torch.float64, device="cpu")
    root = torch.sqrt(2 * n + 1)
    legs = -torch.tril(root[:, None] * root, -1) - torch.diag(n + 1)
    normal = legs + root[:, None] * root / 2
    imaginary, vectors = torch.linalg.eigh(-1j * normal)
    return torch.complex(normal.diagonal().mean().expand(size), imaginary), vectors


def block_hippo(size: int, blocks: int, conjugate_symmetry: bool) -> tuple[Tensor, Tensor]:
    """`blocks` copies of HiPPO-N side by side: λ (P) and V (size, P), complex128.

    With conjugate symmetry the half of every block with negative imaginary parts is kept, P = size / 2; else P = size.

    Raises:
        ConfigurationError: `size` does not split into blocks, or these not into conjugate pairs.
    """
    if size % blocks or (conjugate_symmetry and size // blocks % 2):
        halves = " of an even size" if conjugate_symmetry else ""
        raise ConfigurationError(f"ssm_size_base={size} does not split into num_blocks={blocks} blocks{halves}")
    poles, vectors = hippo_normal(size // blocks)
    if conjugate_symmetry:
        poles, vectors = poles[: len(poles) // 2], vectors[:, : len(poles) // 2]
    return poles.repeat(blocks), torch.block_diag(*[vectors] * blocks)


def draw_input_map(vectors: Tensor, hidden_size: int) -> Tensor:
    """B̃ = Vᴴ B, (P, H): B real, truncated normal of standard deviation 1 / sqrt(rows of V)."""
    size = len(vectors)
    return vectors.mH @ truncated_normal((size, hidden_size), size**-0.5).to(vectors.dtype)


def draw_output_map(vectors: Tensor, hidden_size: int, kind: str) -> Tensor:
    """C̃ = C V, (H, P), or for `"complex_normal"` drawn as it is.

    Raises:
        ConfigurationError: the kind is unknown.
    """
    size, units = vectors.shape
    if kind == "complex_normal":
        return torch.complex(*math.sqrt(0.5) * torch.randn(2, hidden_size, units, dtype=torch.float64, device="cpu"))
    if kind not in C_INITS:
        raise ConfigurationError(f"unknown c_init {kind!r}; allowed: {', '.join(C_INITS)}")
    fan_in = size * hidden_size if kind == "lecun_normal" else size
    return torch.complex(*truncated_normal((2, hidden_size, size), fan_in**-0.5)) @ vectors


def draw_log_steps(shape: tuple[int, ...], shortest: float, longest: float) -> Tensor:
    """log Δ, uniform between the logarithms of the two."""
    share = torch.rand(shape, dtype=torch.float64, device="cpu")
    return math.log(shortest) + share * (math.log(longest) - math.log(shortest))


def truncated_normal(shape: tuple[int, ...], deviation: float) -> Tensor:
    """Normal draws cut off at ±2σ and scaled to the standard deviation asked for, float64."""
    edge = math.erf(2 / math.sqrt(2))
    draw = torch.rand(shape, dtype=torch.float64, device="cpu") * 2 * edge - edge
    return torch.erfinv(draw) * math.sqrt(2) * deviation / _TRUNCATED_DEVIATION
