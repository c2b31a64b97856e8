# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""SparseSSM: optimal brain surgeon for A_log, aggregated over time, and SparseGPT for the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigurationError
from ..registry import unknown
from ..sparsity.pattern import Pattern
from ..sparsity.selection import Selection, lowest_of_each
from . import METHODS, register_method
from .base import Statistics, WeightMethod


VARIANTS = ("c2", "v1", "v2", "l2")
VOTING_STEPS = 32  # time steps whose votes are counted together
TIME_WEIGHTS = ("power", "discount", "linear", "window", "uniform")


@register_method("sparsessm")
@dataclass
class SparseSSM(WeightMethod):
    """Saliency of A_log from the hidden state over time; every other weight goes to `solver`.

    With h_{t-1} the state before step t, dA_t its decay, s the calibration sequences and k the budget:

    | `variant` | an A_log entry is kept when this is large | source |
    |---|---|---|
    | `l2` | A_log² Σ_{s,t} h²_{t-1} | Theorem 1 |
    | `v1` | minus the steps t at which it is among the k lowest of A_log² Σ_s h²_{t-1} | Algorithm 1 |
    | `v2` | Σ_t w_t (Σ_s dA_t)² Σ_s h²_{t-1} | the code released later |
    | `c2` | Σ_{s,t} C_t² (dA_t h_{t-1})² | ours: the exact squared change of the scan's output when this entry alone becomes memoryless |

    `l2` and `v1` estimate the damage of A_log -> 0 and fit `a_log_fill="zero"`; `v2` and `c2` that of dA -> 0 and fit
    `"memoryless"`. In Mamba-2, A_log is one number per head and only `c2` is defined there.

    Args:
        variant (`str`): one of the above.
        time_weight (`str`): w_t of `v2`, sum 1: `"power"` (t+1)^-time_power, `"discount"` time_discount^t, `"linear"`
            L-t, `"window"` the first quarter, `"uniform"`. Default `None`: `"power"`, with N:M `"window"`.
        time_power (`float`): exponent of `"power"`.
        time_discount (`float`): base of `"discount"`.
        solver (`str`): method for the linear and convolution weights.
        solver_kwargs (`dict`): parameters of the solver.
    """

    summary: ClassVar[str] = (
        "time-aggregated saliency for A_log, SparseGPT with sensitivity allocation for projections"
    )
    source: ClassVar[str] = "Tuo and Wang, arXiv 2506.09613, Theorem 1, Algorithm 1, Sec. 3.4; `c2` is this library's"
    default_targets: ClassVar[tuple[str, ...]] = ("A_log", "in_proj", "x_proj", "dt_proj", "out_proj")
    default_allocation: ClassVar[str] = "sensitivity"
    updates_weights: ClassVar[bool] = True

    variant: str = "c2"
    time_weight: str | None = None
    time_power: float = 1.0
    time_discount: float = 0.9
    solver: str = "sparsegpt"
    solver_kwargs: dict | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("variant", VARIANTS), ("time_weight", TIME_WEIGHTS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigurationError(unknown(f"sparsessm {name}", value, list(allowed)))
        if self.solver == "sparsessm":
            raise ConfigurationError("sparsessm cannot be its own solver; name a method for the projections")
        self._solver = METHODS.build(self.solver, self.solver_kwargs or {}, "solver_kwargs")

    def statistics(self, kind: str) -> tuple[str, ...]:
        if kind != "a_log":
            return self._solver.statistics(kind)
        return {
            "c2": ("decay_error",),
            "l2": ("state_prev_total",),
            "v1": ("state_prev",),
            "v2": ("state_prev", "decay_sum"),
        }[self.variant]

    def fill(self, kind: str) -> str | None:
        if kind != "a_log":
            return None
        return "zero" if self.variant in ("l2", "v1") else "memoryless"

    def check(self, pattern: Pattern, scope: str | None) -> None:
        self._solver.check(pattern, scope)

    def score(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> Tensor:
        if kind != "a_log":
            return self._solver.score(weight, statistics, kind, selection)
        if self.variant == "c2":
            return statistics["decay_error"]
        if self.variant == "l2":
            return weight.square() * statistics["state_prev_total"]
        if self.variant == "v1":
            return self._vote(weight, statistics["state_prev"], selection)
        weights = self._time_weights(len(statistics["state_prev"]), selection).to(weight.device)
        total = torch.zeros_like(weight)
        for w, decay, state in zip(weights, statistics["decay_sum"], statistics["state_prev"]):
            total.addcmul_(
                decay.square().mul_(state), w
            )  # a step at a time: all of them at once would be copied whole
        return total

    def prune(self, weight: Tensor, statistics: Statistics, kind: str, selection: Selection) -> tuple[Tensor, Tensor]:
        if kind != "a_log":
            return self._solver.prune(weight, statistics, kind, selection)
        return super().prune(weight, statistics, kind, selection)

    def _vote(self, weight: Tensor, state_prev: Tensor, selection: Selection) -> Tensor:
        """Frequency voting (Algorithm 1). Step 0 has no state before it and casts no vote.

        Entries with equal votes are told apart by their saliency summed over time, scaled into [0, 1).
        """
        votes = torch.zeros_like(weight, dtype=torch.float64)  # must hold a count and a fraction at once
        saliency = torch.zeros_like(votes)
        squared = weight.square()
        for steps in state_prev[1:].split(VOTING_STEPS):
            scores = squared * steps
            votes += self._lowest(scores, selection).sum(0)
            saliency += scores.sum(0, dtype=torch.float64)
        return saliency / (saliency.max() * 1.000001).clamp_min(torch.finfo(saliency.dtype).tiny) - votes

    def _lowest(self, scores: Tensor, selection: Selection) -> Tensor:
        """The entries that each of some steps would remove: (steps, I, N) scores to bools."""
        if selection.pattern.is_n_m:  # groups lie within a channel, whatever the step
            return selection.mask(scores.flatten(0, 1)).view_as(scores)
        if selection.scope == "row":
            return torch.stack([selection.mask(step) for step in scores])
        return lowest_of_each(scores.flatten(1), selection.count).view_as(scores)

    def _time_weights(self, length: int, selection: Selection) -> Tensor:
        t = torch.arange(length, dtype=torch.float32)
        mode = self.time_weight or ("window" if selection.pattern.is_n_m else "power")
        weights = {
            "power": (t + 1) ** -self.time_power,
            "discount": self.time_discount**t,
            "linear": length - t,
            "window": (t < max(1, length // 4)).float(),
            "uniform": torch.ones_like(t),
        }[mode]
        return weights / weights.sum()
