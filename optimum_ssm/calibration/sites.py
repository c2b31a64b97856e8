# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Hooks on the modules of one block that feed the statistics of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import CalibrationError
from ..families.base import PrunableWeight, Site
from .seam import ScanSeam
from .statistics import Statistic, site_statistic


# Weights of one block that need statistics, each with the names of those.
Needs = Mapping[PrunableWeight, tuple[str, ...]]


class BlockStatistics:
    """All statistics of one block. Weights with the same site share them: a Gram matrix is summed once.

    Args:
        block (`nn.Module`): the block.
        needs (`Needs`): which weights need which statistics.
        seam (`ScanSeam`): where sums over the recurrence come from.
    """

    def __init__(self, block: nn.Module, needs: Needs, seam: ScanSeam):
        self.block, self.needs, self.seam = block, needs, seam
        self._sites: dict[tuple[Site, str], Statistic] = {}
        scan_names: list[str] = []
        for weight, names in needs.items():
            if weight.site.end == "scan":
                scan_names += names
                continue
            parameter = block.get_parameter(weight.parameter)
            for name in names:
                if (weight.site, name) not in self._sites:
                    self._sites[weight.site, name] = site_statistic(name, parameter, parameter.device)
        self._scan_names = tuple(dict.fromkeys(scan_names))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the context is open, every forward of the block adds to the statistics."""
        by_module: dict[tuple[str, str], list[tuple[Site, Statistic]]] = {}
        for (site, _), statistic in self._sites.items():
            by_module.setdefault((site.module, site.end), []).append((site, statistic))
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

    def of(self, weight: PrunableWeight, label: str, tokens: int) -> dict[str, Tensor]:
        """The finished statistics of a weight.

        Args:
            weight (`PrunableWeight`): one of `needs`.
            label (`str`): its name for messages.
            tokens (`int`): tokens that every site must have seen.

        Raises:
            CalibrationError: the site saw another number of tokens, none of its inputs ever fired, or a sum is not
                finite.
        """
        values = {}
        for name in self.needs.get(weight, ()):
            if weight.site.end == "scan":
                seen, value = self._scan_tokens, self._scan_sums.get(name)
            else:
                statistic = self._sites[weight.site, name]
                seen, value = statistic.tokens, statistic.value()
            if seen != tokens:
                raise CalibrationError(f"{label}: its input was seen for {seen} of {tokens} calibration tokens")
            if not value.isfinite().all():
                raise CalibrationError(f"{label}: its calibration inputs are not finite ({name})")
            if weight.site.end != "scan" and not value.any():
                raise CalibrationError(f"{label}: its input is zero for every calibration token ({name})")
            values[name] = value
        return values


def _hook(watched: list[tuple[Site, Statistic]]) -> Any:
    def see(module: nn.Module, args: tuple, output: Any = None) -> None:
        x = args[0] if output is None else output
        for site, statistic in watched:
            statistic.update(x if site.columns is None else x[..., site.columns[0] : site.columns[1]])

    return see
