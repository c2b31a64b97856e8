# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm compare MODEL`: which component can be pruned how far, by which method."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .base import SSMLeafCommand, add_loading_flags, loading_kwargs
from .comparing import add_comparison_flags, run_comparison


class CompareCommand(SSMLeafCommand):
    """Fill a table method x budget x component with perplexities and pruning times."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Flags of the table and of loading."""
        add_comparison_flags(parser)
        add_loading_flags(parser)

    def execute(self, args: Namespace) -> None:
        """Load, compare, write; a directory that holds finished cells is continued."""
        run_comparison(args, loading_kwargs(args))
