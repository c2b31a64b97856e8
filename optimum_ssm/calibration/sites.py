# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Hooks on the modules of one block that feed the statistics of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import CalibrationError
from ..families.base import Site
from .ranks import Ranks
from .seam import ScanSeam
from .statistics import Statistic, site_statistic
from .timing import phase


@dataclass(frozen=True)
class Need:
    """One statistic that someone needs.

    Args:
        site (`Site`): where it is seen.
        statistic (`str`): its name.
        taps (`int`): width of the convolution, for `conv_gram`.
    """

    site: Site
    statistic: str
    taps: int = 0


class BlockStatistics:
    """All statistics of one block. Who needs the same one at the same site shares it: a Gram matrix is summed once.

    Args:
        block (`nn.Module`): the block.
        needs (`Iterable[Need]`): what is needed.
        seam (`ScanSeam`): where sums over the recurrence come from.
    """

    def __init__(self, block: nn.Module, needs: Iterable[Need], seam: ScanSeam):
        self.block, self.seam = block, seam
        self.needs = list(dict.fromkeys(needs))
        self._sites = {
            need: site_statistic(need.statistic, need.taps) for need in self.needs if need.site.end != "scan"
        }
        self._finished: dict[Need, Tensor] = {}
        self._scan_names = tuple(dict.fromkeys(need.statistic for need in self.needs if need.site.end == "scan"))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the context is open, every forward of the block adds to the statistics."""
        by_module: dict[tuple[str, str], list[tuple[Site, Statistic]]] = {}
        for need, statistic in self._sites.items():
            by_module.setdefault((need.site.module, need.site.end), []).append((need.site, statistic))
        handles = []
        self.seam.start(self._scan_names)
        try:
            for (name, end), watched in by_module.items():
                module = self.block.get_submodule(name)
                register = module.register_forward_pre_hook if end == "input" else module.register_forward_hook
                handles.append(register(_hook(watched)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._scan_sums, self._scan_tokens = self.seam.sums, self.seam.tokens
            self.seam.start(())

    def reduce(self, ranks: Ranks) -> None:
        """Add up what all processes saw; afterwards each holds the same sums and counts.

        Raises:
            CalibrationError: some of the processes saw a site and others did not.
        """
        if ranks.alone or not self.needs:
            return
        statistics = list(self._sites.values())
        counts = [statistic.tokens for statistic in statistics] + [self._scan_tokens]
        seen = ranks.gather(counts)
        if any((count > 0) != (other > 0) for counts in seen for count, other in zip(counts, seen[0])):
            raise CalibrationError("the processes do not see the same inputs; give all of them the same model")
        *tokens, self._scan_tokens = [sum(column) for column in zip(*seen)]
        for statistic, total in zip(statistics, tokens):
            statistic.tokens = total
            if statistic.sum is not None:
                ranks.sum_(statistic.sum)
        for name in self._scan_names:
            if name in self._scan_sums:
                ranks.sum_(self._scan_sums[name])

    def of(self, need: Need, label: str, tokens: int) -> Tensor:
        """A finished statistic.

        Args:
            need (`Need`): one of `needs`.
            label (`str`): whose it is, for messages.
            tokens (`int`): tokens that the site must have seen.

        Raises:
            CalibrationError: the site saw another number of tokens, none of its inputs ever fired, or a sum is not
                finite.
        """
        statistic = self._sites.get(need)
        seen = self._scan_tokens if statistic is None else statistic.tokens
        if seen == tokens and need in self._finished:
            return self._finished[need]
        if statistic is None:
            value = self._scan_sums.get(need.statistic)
            value = None if value is None else value.float()
        else:
            value = statistic.value() if statistic.tokens else None
        if seen != tokens or value is None:
            raise CalibrationError(f"{label}: its input was seen for {seen} of {tokens} calibration tokens")
        if not value.isfinite().all():
            raise CalibrationError(f"{label}: its calibration inputs are not finite ({need.statistic})")
        if statistic is not None and not value.any():
            raise CalibrationError(f"{label}: its input is zero for every calibration token ({need.statistic})")
        self._finished[need] = value  # segments of a weight are given one tensor, and share what is derived from it
        return value


def _hook(watched: list[tuple[Site, Statistic]]) -> Any:
    def see(module: nn.Module, args: tuple, output: Any = None) -> None:
        x = args[0] if output is None else output
        with phase("statistics"):
            for site, statistic in watched:
                statistic.update(x if site.columns is None else x[..., site.columns[0] : site.columns[1]])

    return see
