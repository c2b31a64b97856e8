# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm inspect DIR`: what a checkpoint really holds, counted from its weights."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from .base import SSMLeafCommand, add_loading_flags, loading_kwargs


class InspectCommand(SSMLeafCommand):
    """Show a checkpoint's sparsity by component."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Model and loading flags."""
        parser.add_argument("model", help="Hub id or directory")
        parser.add_argument("--plot", metavar="FILE", help="also draw the removed shares into an image file")
        add_loading_flags(parser)

    def execute(self, args: Namespace) -> None:
        """Load, count, print."""
        from ..evaluation.inspection import inspect_checkpoint

        report = inspect_checkpoint(args.model, **loading_kwargs(args))
        print(report)
        if args.plot is not None:
            report.plot(args.plot)
