# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What every `ssm` command shares: errors end in one line and exit code 1, loading flags are the same everywhere."""

from __future__ import annotations

import os
import sys
from abc import abstractmethod
from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand

from ..errors import OptimumSSMError


class SSMLeafCommand(BaseOptimumCLICommand):
    """A command that does something. Subclasses write `execute`; heavy imports belong inside it."""

    def run(self) -> None:
        """Execute, turning the library's own errors into one line on stderr and exit code 1."""
        try:
            self.execute(self.args)
        except OptimumSSMError as error:
            sys.exit(f"error: {error}")
        except BrokenPipeError:  # the reader of a pipe has seen enough; nothing is left to say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except KeyboardInterrupt:
            sys.exit(f"interrupted; {self.left_behind(self.args)}")

    def left_behind(self, args: Namespace) -> str:
        """What an interrupt says is there, as the end of a sentence."""
        return "nothing was saved"

    @abstractmethod
    def execute(self, args: Namespace) -> None:
        """The command's work."""


def add_loading_flags(parser: ArgumentParser) -> None:
    """Flags that go to `from_pretrained`."""
    group = parser.add_argument_group("loading")
    group.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    group.add_argument("--dtype", help="float32, bfloat16, float16 or auto; default: the checkpoint's")
    group.add_argument("--device-map", help="where to put the model: auto, cuda, cpu, …")
    group.add_argument("--token", help="access token for private repositories")
    group.add_argument("--trust-remote-code", action="store_true", help="run modelling code from the repository")


def loading_kwargs(args: Namespace) -> dict[str, Any]:
    """What the loading flags say, as keyword arguments of `from_pretrained`."""
    names = ("revision", "dtype", "device_map", "token", "trust_remote_code")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def add_perplexity_flags(parser: ArgumentParser) -> None:
    """Flags of the perplexity protocol."""
    group = parser.add_argument_group("perplexity")
    group.add_argument("--window", type=int, default=2048, help="tokens per window (default: 2048)")
    group.add_argument("--stride", type=int, help="tokens between window starts (default: the window)")
    group.add_argument("--max-windows", type=int, help="use only the first so many windows")
    group.add_argument("--eval-batch-size", type=int, default=4, help="windows per forward pass (default: 4)")


def perplexity_kwargs(args: Namespace) -> dict[str, Any]:
    """What the perplexity flags say, as keyword arguments of `measure_perplexity`."""
    return {
        "window": args.window,
        "stride": args.stride,
        "max_windows": args.max_windows,
        "batch_size": args.eval_batch_size,
    }
