# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Block reconstruction: after the masks are set, a few gradient steps bring a block's output back to the dense one's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.ranks import ALONE, Ranks
from ..configuration import SSMPrunerConfig
from ..errors import CalibrationError, ConfigurationError


@dataclass
class Reconstruction:
    """How a block is tuned: Adam on ‖block(x) - dense‖², x the inputs that the pruned blocks before it give.

    Everything in the block is tuned that is still there: kept weights, norms, biases, D, kept A_log entries. Masks stay.

    Args:
        epochs (`int`): passes over the calibration blocks; 0 turns reconstruction off.
        lr (`float`): highest learning rate; it falls to 0 along a cosine.
        batch_size (`int`): calibration blocks per step, of all processes together; with more processes, one of each.
    """

    epochs: int = 0
    lr: float = 5e-4
    batch_size: int = 2

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lr <= 0 or self.batch_size < 1:
            raise ConfigurationError(
                f"reconstruction needs epochs >= 0, lr > 0 and batch_size >= 1, got {self.epochs}, {self.lr} and "
                f"{self.batch_size}"
            )

    @classmethod
    def planned(cls, config: SSMPrunerConfig, default_epochs: int) -> Reconstruction:
        """What a config asks for, with the method's own epochs where it does not say.

        Raises:
            ConfigurationError: parameters are given, but no reconstruction is.
        """
        epochs = default_epochs if config.reconstruction_epochs is None else config.reconstruction_epochs
        if config.reconstruction_kwargs and not epochs:
            raise ConfigurationError(
                f"reconstruction_kwargs={config.reconstruction_kwargs} without reconstruction tune nothing; give "
                "reconstruction_epochs of at least 1"
            )
        return cls(epochs, **config.reconstruction_kwargs)

    def tune(
        self,
        block: nn.Module,
        name: str,
        pairs: Sequence[tuple[Tensor, Tensor]],
        forward: Callable[[Tensor], Tensor],
        restore: Callable[[], None],
        ranks: Ranks = ALONE,
    ) -> tuple[float, float, float]:
        """Tune a block in place.

        Args:
            block (`nn.Module`): the pruned block.
            name (`str`): its name for messages.
            pairs (`Sequence[tuple[Tensor, Tensor]]`): inputs and wished outputs of one step, (batch_size, seq_len,
                hidden) each.
            forward (`Callable`): the block's output for an input.
            restore (`Callable`): sets removed entries back to what stands for removed.
            ranks (`Ranks`): processes that tune the same block, each on its own pairs: gradients are added up.

        Returns:
            `tuple[float, float, float]`: ‖block(x) - dense‖² / ‖dense - x‖² over all samples, before and after, and the
            seconds that it took. A block whose dense output is its input has nothing to be tuned towards: it stays as it
            is, and both are 0.

        Raises:
            CalibrationError: the loss is not finite.
        """
        start = time.perf_counter()
        (scale,) = ranks.sums(sum(float((wish.float() - x.float()).square().sum()) for x, wish in pairs))
        if not scale:
            return 0.0, 0.0, time.perf_counter() - start
        parameters = list(block.parameters())
        flags, dtypes = [p.requires_grad for p in parameters], [p.dtype for p in parameters]
        gradients = [p.grad for p in parameters]  # the user's: neither to be stepped along nor to be lost
        before = self._loss(pairs, forward, ranks) / scale
        saved = [p.detach().clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        block.float()  # steps of the size of the learning rate would be lost in bfloat16
        try:
            self._steps(block, name, pairs, scale, forward, restore, ranks)
        finally:
            for parameter, dtype, flag, gradient in zip(parameters, dtypes, flags, gradients):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(flag)
                parameter.grad = gradient
        restore()
        after = self._loss(pairs, forward, ranks) / scale
        if not after < before:  # never leave a block worse than pruning left it, and what is NaN is worse
            for parameter, value in zip(parameters, saved):
                parameter.copy_(value)
            after = before
        return before, after, time.perf_counter() - start

    def _loss(
        self, pairs: Sequence[tuple[Tensor, Tensor]], forward: Callable[[Tensor], Tensor], ranks: Ranks
    ) -> float:
        return ranks.sums(sum(float((forward(x).float() - wish.float()).square().sum()) for x, wish in pairs))[0]

    def _steps(
        self,
        block: nn.Module,
        name: str,
        pairs: Sequence[tuple[Tensor, Tensor]],
        scale: float,
        forward: Callable[[Tensor], Tensor],
        restore: Callable[[], None],
        ranks: Ranks,
    ) -> None:
        parameters = [parameter.requires_grad_(True) for parameter in block.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.lr, betas=(0.9, 0.95))
        count = max(ranks.gather(len(pairs)))  # some processes may have a pair less than others
        steps, scale = self.epochs * count, scale / count
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = 0.0
            if step % count < len(pairs):
                x, wish = pairs[step % count]
                with torch.enable_grad():
                    loss = (forward(x).float() - wish.float()).square().sum() / scale
                    loss.backward()
            if not ranks.alone:
                _add_up(parameters, ranks)
            if not math.isfinite(ranks.sums(float(loss))[0]):
                raise CalibrationError(f"{name}: block reconstruction diverged; lower its lr of {self.lr:g}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            restore()


def _add_up(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Give every process the gradient of the loss over the pairs of all of them."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        ranks.sum_(parameter.grad)
