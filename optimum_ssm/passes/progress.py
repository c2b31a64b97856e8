# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How far a pass is: a bar over blocks, in the main process and on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import psutil
import torch
from accelerate.utils import tqdm
from torch import Tensor, nn

from ..calibration.ranks import Ranks
from .outcome import BlockOutcome


def progress(items: Iterable[Any], text: str, unit: str, ranks: Ranks) -> Any:
    """`items` under a bar with a count, a rate and the time left; quiet elsewhere than on the main process's terminal."""
    quiet = not ranks.main or not sys.stderr.isatty()
    return tqdm(items, desc=text, unit=unit, disable=quiet, main_process_only=False)


class BlockProgress:
    """A bar over the blocks of a pass that also tells what became of them.

    Args:
        blocks (`list[tuple[str, nn.Module]]`): names and blocks, from the model's first one on.
        text (`str`): what is done.
        model (`nn.Module`): the model.
        ranks (`Ranks`): the processes.
        removed (`Mapping[str, Tensor]`, *optional*): parameter name to bool mask of what earlier passes removed.
        entries (`int`, *optional*): of the model before its first pass, where earlier ones may have cut some.
    """

    def __init__(
        self,
        blocks: list[tuple[str, nn.Module]],
        text: str,
        model: nn.Module,
        ranks: Ranks,
        removed: Mapping[str, Tensor] | None = None,
        entries: int | None = None,
    ):
        self.bar = progress(blocks, text, "block", ranks)
        self.blocks, self.model, self.removed = blocks, model, removed or {}
        self._entries, self._masked = entries, {}
        if not self.bar.disable:
            self._entries = _entries(model) if entries is None else entries
            self._masked = {name: int(mask.count_nonzero()) for name, mask in self.removed.items()}

    def __iter__(self) -> Any:
        return iter(self.bar)

    def tell(self, outcome: BlockOutcome) -> None:
        """Show the relative output error of the block just finished, the sparsity of the whole model so far (entries that
        this pass and earlier ones have masked or cut), and memory: the most that CUDA has held, else what the process
        holds."""
        if self.bar.disable:
            return
        self._count(outcome)
        gone = sum(self._masked.values()) + self._entries - _entries(self.model)
        self.bar.set_postfix(
            block_error="-" if outcome.error is None else f"{outcome.error:.2e}",
            sparsity=f"{gone / self._entries:.1%}",
            memory=f"{_memory(self.model) / 1e9:.2f} GB",
        )

    def _count(self, outcome: BlockOutcome) -> None:
        """Masked entries of the block: of this pass or of an earlier one, where they were not cut since."""
        name, block = self.blocks[outcome.index]
        masks = [done for done in outcome.outcomes if hasattr(done, "mask")]
        for local, _ in block.named_parameters():
            parameter = f"{name}.{local}"
            own = [done for done in masks if done.target.parameter == parameter]
            earlier = self.removed.get(parameter)
            for done in outcome.outcomes:
                earlier = done.sliced(local, earlier)
            if earlier is None:  # segments of a weight share no rows
                self._masked[parameter] = sum(int(done.mask.count_nonzero()) for done in own)
                continue
            whole = {parameter: earlier.clone()}
            for done in own:
                done.mark(whole)
            self._masked[parameter] = int(whole[parameter].count_nonzero())


def _entries(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _memory(model: nn.Module) -> int:
    """Most bytes on the model's GPUs, or the process's resident bytes."""
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    if devices:
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return psutil.Process().memory_info().rss
