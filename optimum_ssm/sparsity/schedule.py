# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How much is removed at which step of a training run. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError
from ..registry import unknown


# Power of the part of the way that is still ahead; one-shot has no way to go.
SHAPES = {"cubic": 3, "linear": 1, "one-shot": None}


@dataclass(frozen=True)
class SparsitySchedule:
    """Sparsity over optimiser steps: s_t = s_f + (s_0 - s_f) (1 - (t - t0) / (T - t0))^p, clamped outside [t0, T].

    Cubic (p = 3) is the automated gradual pruning of Zhu and Gupta (arXiv 1710.01878, Eq. 1), used on state-space
    models by arXiv 2505.08299: much goes early, while the model can recover, and little late. Linear has p = 1; one-shot
    jumps to s_f at t0.

    Args:
        final (`float`): s_f, in [0, 1).
        end_step (`int`): T, the first step with the final sparsity; at least 1.
        begin_step (`int`): t0, the last step with the initial sparsity; below `end_step`.
        initial (`float`): s_0, in [0, final].
        update_every (`int`): steps between two updates of the masks, counted from `begin_step`; `end_step` is one too.
        shape (`str`): `"cubic"`, `"linear"` or `"one-shot"`.

    Raises:
        ConfigurationError: a field has the wrong type, lies out of range or contradicts another one.
    """

    final: float
    end_step: int
    begin_step: int = 0
    initial: float = 0.0
    update_every: int = 10
    shape: str = "cubic"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigurationError(unknown("schedule shape", self.shape, list(SHAPES)))
        for name in ("end_step", "begin_step", "update_every"):
            _require(name, getattr(self, name), (int,), "an integer")
        for name in ("final", "initial"):
            _require(name, getattr(self, name), (int, float), "a number")
        if not 0 <= self.final < 1:
            raise ConfigurationError(f"final={self.final} of the schedule must lie in [0, 1)")
        if not 0 <= self.initial <= self.final:
            raise ConfigurationError(
                f"initial={self.initial} of the schedule must lie in [0, final={self.final}]: nothing comes back"
            )
        if self.end_step < 1:
            raise ConfigurationError(f"end_step={self.end_step} of the schedule must be at least 1")
        if not 0 <= self.begin_step < self.end_step:
            raise ConfigurationError(
                f"begin_step={self.begin_step} of the schedule must lie in [0, end_step={self.end_step})"
            )
        if self.update_every < 1:
            raise ConfigurationError(f"update_every={self.update_every} of the schedule must be at least 1")

    def sparsity(self, step: int) -> float:
        """The share that is to be removed once `step` optimiser steps are done."""
        power = SHAPES[self.shape]
        if step >= self.end_step or (power is None and step >= self.begin_step):
            return self.final  # not by the formula: the promise at the end is exact
        if step <= self.begin_step:
            return self.initial
        ahead = 1 - (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.final + (self.initial - self.final) * ahead**power

    def updates(self, step: int) -> bool:
        """Whether the masks change after `step` optimiser steps."""
        if not self.begin_step <= step <= self.end_step:
            return False
        return step == self.end_step or (step - self.begin_step) % self.update_every == 0


def _require(name: str, value: Any, kinds: tuple[type, ...], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ConfigurationError(f"{name}={value!r} of the schedule must be {wanted}, got {type(value).__name__}")
