# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The pattern of a mask as the config spells it. Knows no tensors, so that the command line stays light."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigurationError


@dataclass(frozen=True)
class Pattern:
    """Unstructured or structured (`keep` = `group` = 0), or N:M: at most `keep` non-zeros among `group` consecutive input weights.

    N counts what is kept. Wanda's and SparseGPT's `prune_n` counts what is removed: the same for 2:4, not for 1:4.
    """

    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`"unstructured"`, `"structured"` or `"N:M"` to a pattern.

        Raises:
            ConfigurationError: any other text, or N:M without 0 < N < M.
        """
        if text in ("unstructured", "structured"):
            return cls()
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            raise ConfigurationError(
                f"unknown pattern {text!r}. Allowed: 'unstructured', 'structured' or 'N:M' such as '2:4'"
            )
        keep, group = map(int, match.groups())
        if not 0 < keep < group:
            raise ConfigurationError(f"pattern {text!r} keeps {keep} of {group}; N:M needs 0 < N < M, such as '2:4'")
        return cls(keep, group)

    @property
    def is_n_m(self) -> bool:
        """Whether the pattern is N:M."""
        return self.group > 0

    @property
    def sparsity(self) -> float:
        """Share of weights that N:M removes; 0 for unstructured, where the config's sparsity decides."""
        return 1 - self.keep / self.group if self.is_n_m else 0.0

    def fits(self, columns: int) -> bool:
        """Whether rows of `columns` weights split into whole groups."""
        return not self.is_n_m or columns % self.group == 0
