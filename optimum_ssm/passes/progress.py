# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How far a pass is: a bar over blocks, in the main process and on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from accelerate.utils import tqdm
from torch import nn

from ..calibration.ranks import Ranks
from .outcome import BlockOutcome


def progress(items: Iterable[Any], text: str, unit: str, ranks: Ranks) -> Any:
    """`items` under a bar with a count, a rate and the time left; quiet elsewhere than on the main process's terminal."""
    quiet = not ranks.main or not sys.stderr.isatty()
    return tqdm(items, desc=text, unit=unit, disable=quiet, main_process_only=False)


class BlockProgress:
    """A bar over the blocks of a pass that also tells what became of them.

    Args:
        blocks (`list`): the blocks.
        text (`str`): what is done.
        model (`nn.Module`): the model.
        ranks (`Ranks`): the processes.
    """

    def __init__(self, blocks: list, text: str, model: nn.Module, ranks: Ranks):
        self.bar, self.model = progress(blocks, text, "block", ranks), model
        self._entries = 0 if self.bar.disable else _entries(model)
        self._masked = 0

    def __iter__(self) -> Any:
        return iter(self.bar)

    def tell(self, outcome: BlockOutcome) -> None:
        """Show the relative output error of the block just finished, the sparsity of the whole model so far (entries that
        this pass has masked or cut), and memory: the most that CUDA has held, else what the process holds."""
        if self.bar.disable:
            return
        self._masked += sum(int(done.mask.count_nonzero()) for done in outcome.outcomes if hasattr(done, "mask"))
        gone = self._masked + self._entries - _entries(self.model)
        self.bar.set_postfix(
            block_error="-" if outcome.error is None else f"{outcome.error:.2e}",
            sparsity=f"{gone / self._entries:.1%}",
            memory=f"{_memory(self.model) / 1e9:.2f} GB",
        )


def _entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _memory(model: nn.Module) -> int:
    """Most bytes on the model's GPUs, or the process's resident bytes."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return psutil.Process().memory_info().rss
