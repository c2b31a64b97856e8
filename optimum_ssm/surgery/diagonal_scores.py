# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a state of a diagonal linear time-invariant system is worth, and which states of a model stay. Pure functions.

A state i has decay λ̄_i, input row B̄_i and output column C_i. `gain` is ‖C_i‖² ‖B̄_i‖². Everything is float64; every score is a
squared norm, higher means keep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..sparsity.allocations.last import last_scores
from ..sparsity.allocations.units import highest
from ..sparsity.selection import round_half_up, split_evenly


METHODS = ("last", "aire", "magnitude", "random")
ALLOCATIONS = ("last", "uniform", "global")
BIDIRECTIONAL = ("mean", "energy", "reference")
# |λ̄| from which a state counts as one that does not decay: its norm is infinite, whatever the closed form says.
UNSTABLE = 1 - 1e-6
_REFERENCE_EPS = 1e-8  # what the released code of LAST adds to (1 - |λ̄|)²


def hinf_energy(decay: Tensor, gain: Tensor, reference: bool = False) -> Tensor:
    """Squared H∞ norm of one mode, gain / (1 - |λ̄|)² (LAST, arXiv 2411.02824, Sec. 4.1): the peak of its response.

    Args:
        decay (`Tensor`): λ̄, complex.
        gain (`Tensor`): ‖C_i‖² ‖B̄_i‖², the shape of `decay`.
        reference (`bool`): add 1e-8 to (1 - |λ̄|)², as the released code does.

    Returns:
        `Tensor`: float64; infinite where |λ̄| >= 1 - 1e-6.
    """
    size = decay.to(torch.complex128).abs()
    energy = gain.double() / ((1 - size).square() + (_REFERENCE_EPS if reference else 0))
    return energy.masked_fill(size >= UNSTABLE, torch.inf)


def h2_energy(decay: Tensor, gain: Tensor) -> Tensor:
    """Squared H2 norm of one mode, gain / (1 - |λ̄|²) = Σ_t ‖C_i λ̄_i^t B̄_i‖² (AIRE-Prune, arXiv 2602.00534): its energy.

    Arguments and result as in `hinf_energy`.
    """
    size = decay.to(torch.complex128).abs()
    return (gain.double() / (1 - size.square())).masked_fill(size >= UNSTABLE, torch.inf)


def output_gain(norms: list[Tensor], bidirectional: str = "mean") -> Tensor:
    """What stands for ‖C_i‖² where there is one output map per direction.

    `"mean"`: ((‖C1‖ + ‖C2‖) / 2)². `"energy"`: ‖C1‖² + ‖C2‖². `"reference"`: (‖C1‖ + ‖C2‖) / 4, what the released code of LAST
    computes, to the first power of C. One map alone gives ‖C‖².

    Args:
        norms (`list[Tensor]`): ‖C_i‖ of one or two maps.
        bidirectional (`str`): the form.

    Raises:
        ConfigurationError: the form is unknown.
    """
    if bidirectional not in BIDIRECTIONAL:
        raise ConfigurationError(f"unknown bidirectional {bidirectional!r}; allowed: {', '.join(BIDIRECTIONAL)}")
    if len(norms) == 1:
        return norms[0].double().square()
    first, second = (norm.double() for norm in norms)
    if bidirectional == "reference":
        return (first + second) / 4
    if bidirectional == "energy":
        return first.square() + second.square()
    return ((first + second) / 2).square()


def energies(method: str, decay: Tensor, gain: Tensor, reference: bool, generator: torch.Generator) -> Tensor:
    """Scores of the states of one layer by the method's name. Unstable states are infinite for every method.

    Args:
        method (`str`): `"last"`, `"aire"`, `"magnitude"` (the gain alone) or `"random"`.
        decay, gain (`Tensor`): as in `hinf_energy`.
        reference (`bool`): as in `hinf_energy`.
        generator (`torch.Generator`): of the random scores.

    Raises:
        ConfigurationError: the method is unknown.
    """
    if method == "last":
        return hinf_energy(decay, gain, reference)
    if method == "aire":
        return h2_energy(decay, gain)
    if method == "random":
        scores = torch.rand(gain.shape, generator=generator, dtype=torch.float64).to(gain.device)
    elif method == "magnitude":
        scores = gain.double()
    else:
        raise ConfigurationError(f"unknown method {method!r}; allowed: {', '.join(METHODS)}")
    return scores.masked_fill(decay.abs() >= UNSTABLE, torch.inf)


def kept_counts(scores: list[Tensor], ratio: float, allocation: str, reference: bool = False) -> list[int]:
    """How many of its best states every layer keeps: n - round(ratio · n) of the n states of the model.

    Every layer keeps one state at least and all of its states of infinite score, also where that is more than the budget.

    Args:
        scores (`list[Tensor]`): per layer, (states) in any order.
        ratio (`float`): share of all states to remove, from 0 to 1.
        allocation (`str`): `"last"`: the globally largest s_(k) = e_(k) / Σ_{j<=k} e_(j), e descending within a layer
            (arXiv 2411.02824, Sec. 4.2), infinite ones left out of the sums. `"global"`: the largest scores. `"uniform"`: the
            same share of every layer.
        reference (`bool`): keep floor((1 - ratio) · n), the released code's count.

    Raises:
        ConfigurationError: the ratio or the allocation is not allowed.
    """
    if not 0 <= ratio <= 1:
        raise ConfigurationError(f"ratio={ratio:g} must be from 0 to 1")
    if allocation not in ALLOCATIONS:
        raise ConfigurationError(f"unknown allocation {allocation!r}; allowed: {', '.join(ALLOCATIONS)}")
    ordered = [score.detach().cpu().double().flatten().sort(descending=True).values for score in scores]
    least = [max(1, int(score.isinf().sum())) for score in ordered]
    sizes = [len(score) for score in ordered]
    wished = (
        math.floor((1 - ratio) * sum(sizes) + 1e-9) if reference else sum(sizes) - round_half_up(ratio * sum(sizes))
    )
    keep = max(wished, sum(least))
    if allocation == "uniform":
        return _at_least(split_evenly(keep, sizes), least)
    if allocation == "last":
        ordered = [torch.cat([s[s.isinf()], last_scores(s[~s.isinf()])]) for s in ordered]
    return highest(ordered, keep)


def kept_units(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` highest scores of every row of (…, n), ascending; ties to the lower index."""
    order = scores.detach().cpu().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(-1).values


def _at_least(counts: list[int], least: list[int]) -> list[int]:
    """The counts raised to their minima, the surplus taken one by one where most is left above the minimum."""
    total, counts = sum(counts), [max(pair) for pair in zip(counts, least)]
    while sum(counts) > total:
        richest = max(range(len(counts)), key=lambda i: (counts[i] - least[i], i))
        counts[richest] -= 1
    return counts
