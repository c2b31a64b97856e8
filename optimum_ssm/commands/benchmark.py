# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm benchmark DENSE PRUNED`: sizes, memory and speed of checkpoints that take turns in one run."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .base import SSMLeafCommand


class BenchmarkCommand(SSMLeafCommand):
    """Compare a dense checkpoint with pruned ones."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Checkpoints, sizes of the runs, and where the results go."""
        parser.add_argument("dense", help="Hub id or directory that the others are compared with")
        parser.add_argument("pruned", nargs="+", help="Hub ids or directories")
        parser.add_argument("-o", "--output", metavar="DIR", help="new directory for the table, JSON, CSV and picture")
        group = parser.add_argument_group("measurement")
        group.add_argument(
            "--batch-sizes",
            type=int,
            nargs="+",
            default=[1, 16, 128],
            metavar="N",
            help="sequences per run (default: 1 16 128)",
        )
        group.add_argument("--prompt-length", type=int, default=2048, help="tokens to prefill (default: 2048)")
        group.add_argument("--new-tokens", type=int, default=128, help="tokens to decode (default: 128)")
        group.add_argument("--repeats", type=int, default=5, help="counted runs after a warm-up (default: 5)")
        group.add_argument(
            "--phases",
            nargs="+",
            default=["prefill", "decode"],
            metavar="PHASE",
            help="prefill, decode or both (default)",
        )
        group.add_argument(
            "--scan",
            default="auto",
            metavar="SCAN",
            help="scan of the prefill: library, transformers or auto (mamba_ssm's kernel on CUDA where it is installed, "
            "else the library's); default: auto",
        )
        group.add_argument("--no-cuda-graph", action="store_true", help="launch decode steps kernel by kernel on CUDA")
        group = parser.add_argument_group("loading")
        group.add_argument("--dtype", help="float32, bfloat16, float16 or auto; default: the checkpoint's")
        group.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
        group.add_argument("--token", help="access token for private repositories")
        group.add_argument("--trust-remote-code", action="store_true", help="run modelling code from the repositories")

    def execute(self, args: Namespace) -> None:
        """Refuse an output directory that is taken, measure, print, write."""
        from ..evaluation.benchmark import benchmark
        from ..hub.directory import check_free, whole_directory

        if args.output is not None:
            check_free(Path(args.output), overwrite=None)
        loading = {
            name: getattr(args, name) for name in ("dtype", "token", "trust_remote_code") if getattr(args, name)
        }
        report = benchmark(
            [args.dense, *args.pruned],
            args.batch_sizes,
            args.prompt_length,
            args.new_tokens,
            args.repeats,
            phases=args.phases,
            scan=args.scan,
            cuda_graph=not args.no_cuda_graph,
            device=args.device,
            progress=lambda line: print(line, file=sys.stderr, flush=True),
            **loading,
        )
        print(report)
        if args.output is not None:
            with whole_directory(args.output) as folder:
                report.write(folder)
            print(f"saved to {args.output}")
