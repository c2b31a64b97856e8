# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Flags and work of `ssm compare`, without optimum's command classes, so that a script can use them too."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import ConfigurationError


def add_comparison_flags(parser: ArgumentParser) -> None:
    """What to compare, on which texts, where to."""
    parser.add_argument("model", help="Hub id or directory of a dense model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory for CSV, Markdown and picture")
    parser.add_argument("--overwrite", action="store_true", help="forget the rows that the directory holds")
    group = parser.add_argument_group("cells")
    group.add_argument(
        "--methods",
        nargs="+",
        default=["magnitude", "sparsessm:allocation=uniform"],
        metavar="METHOD",
        help="methods, with options after a colon: sparsessm:v1, magnitude:largest, sparsegpt:allocation=owl,scope=row "
        "(default: magnitude, and sparsessm with uniform ratios, which is SparseGPT on the projections)",
    )
    group.add_argument(
        "--budgets", nargs="+", default=["0.5", "0.7"], help="sparsities and N:M patterns (default: 0.5 0.7)"
    )
    group.add_argument(
        "--components",
        nargs="+",
        metavar="NAME",
        help="target names or globs, each pruned alone; a comma joins several; all: the method's own targets "
        "(default: every prunable weight of the model, and all)",
    )
    group.add_argument(
        "--a-log-fill",
        nargs="+",
        default=["matching"],
        help="memoryless, zero, or matching: the one whose damage the method estimates (default: matching)",
    )
    group = parser.add_argument_group("calibration")
    group.add_argument("--dataset", default="wikitext2", help="text: wikitext2, c4, a Hub id or a file")
    group.add_argument("--dataset-name", help="configuration name of a Hub dataset")
    group.add_argument("--dataset-split", help="split of a Hub dataset (default: train)")
    group.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
    group.add_argument("--num-samples", type=int, default=128, help="calibration blocks (default: 128)")
    group.add_argument("--seq-len", type=int, default=2048, help="tokens in a block (default: 2048)")
    group.add_argument("--batch-size", type=int, default=8, help="blocks per forward pass (default: 8)")
    group.add_argument("--seed", type=int, default=0, help="seed of the blocks (default: 0)")
    group = parser.add_argument_group("perplexity")
    group.add_argument("--evaluate", default="wikitext2", metavar="DATASET", help="text to measure on")
    group.add_argument("--split", default="test", help="its split, of a Hub dataset (default: test)")
    group.add_argument("--window", type=int, default=2048, help="tokens per window (default: 2048)")
    group.add_argument("--stride", type=int, help="tokens between window starts (default: the window)")
    group.add_argument("--max-windows", type=int, help="use only the first so many windows")
    group.add_argument("--eval-batch-size", type=int, default=4, help="windows per forward pass (default: 4)")


def run_comparison(args: Namespace, loading: dict) -> None:
    """Load the model, fill the table, write and print it.

    Args:
        args (`Namespace`): from the flags of `add_comparison_flags`.
        loading (`dict`): keyword arguments of `from_pretrained`.
    """
    from ..evaluation.comparison import compare
    from ..hub.comparison_files import ComparisonFiles
    from ..pruner import SSMPruner

    files = ComparisonFiles(args.output, args.overwrite)
    pruner = SSMPruner.from_pretrained(args.model, **loading)
    if pruner.report.pruned:
        raise ConfigurationError(f"{args.model} is pruned already; a comparison starts from a dense model")
    fields = (
        "dataset",
        "dataset_name",
        "dataset_split",
        "text_column",
        "num_samples",
        "seq_len",
        "batch_size",
        "seed",
    )
    protocol = {
        "dataset": args.evaluate,
        "split": args.split,
        "text_column": args.text_column,
        "window": args.window,
        "stride": args.stride,
        "max_windows": args.max_windows,
        "batch_size": args.eval_batch_size,
    }
    try:
        comparison = compare(
            pruner.model,
            pruner.tokenizer,
            args.methods,
            args.budgets,
            args.components,
            a_log_fill=args.a_log_fill,
            calibration={name: getattr(args, name) for name in fields},
            evaluation=protocol,
            known=files.known,
            on_row=files.write,
        )
    except KeyboardInterrupt:
        sys.exit(f"interrupted; finished cells are in {args.output}, and the same command goes on with the others")
    written = files.finish(comparison)
    print(comparison.to_markdown())
    print(f"written to {', '.join(map(str, written))}")
