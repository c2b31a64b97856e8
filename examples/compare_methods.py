# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Prune one model by several methods and budgets; table (CSV, Markdown) and picture of the perplexities.

    python examples/compare_methods.py --model examples/assets/mamba-tiny --methods magnitude wanda sparsegpt \\
        --budgets 0.5 0.7 2:4 --targets in_proj x_proj dt_proj out_proj --output examples/output/compare
"""

import csv
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from transformers.utils import logging

from optimum_ssm import OptimumSSMError, SSMPruner, SSMPrunerConfig
from optimum_ssm.report import table


ASSETS = Path(__file__).parent / "assets"
FIELDS = ("method", "budget", "a_log_fill", "sparsity", "perplexity", "seconds")


def run(args: Namespace, method: str | None, budget: str, fill: str) -> dict:
    """Load the model, prune it (unless `method` is None), measure it: one row of the table."""
    config = None
    if method is not None:
        name, _, variant = method.partition(":")  # sparsessm:v1 is sparsessm with variant=v1
        config = SSMPrunerConfig(
            method=name,
            sparsity=None if ":" in budget else float(budget),
            pattern=budget if ":" in budget else "unstructured",
            targets=args.targets,
            a_log_fill=fill,
            dataset=args.calibration,
            num_samples=args.num_samples,
            seq_len=args.seq_len,
            method_kwargs={"largest": True} if variant == "largest" else {"variant": variant} if variant else {},
        )
    pruner = SSMPruner.from_pretrained(args.model, config, dtype="float32", device_map=args.device_map)
    start = time.perf_counter()
    report = pruner.prune() if config is not None else pruner.report
    seconds = time.perf_counter() - start if config is not None else 0.0
    perplexity = pruner.evaluate(args.evaluation, window=args.window, max_windows=args.max_windows)
    values = (method or "dense", budget, fill, f"{report.sparsity:.4f}", f"{perplexity:.2f}", f"{seconds:.1f}")
    return dict(zip(FIELDS, values))


def main(args: Namespace) -> None:
    """All runs, one after the other; every row is written as soon as it is known."""
    args.output.mkdir(parents=True, exist_ok=True)
    runs = [(None, "-", "-")]
    runs += [(method, budget, fill) for budget in args.budgets for method in args.methods for fill in args.a_log_fill]
    rows = []
    with open(args.output / "methods.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for method, budget, fill in runs:
            rows.append(run(args, method, budget, fill))
            writer.writerow(rows[-1])
            file.flush()
            print("  ".join(rows[-1].values()), flush=True)
    lines = table(FIELDS, [row.values() for row in rows], right=(3, 4, 5))
    (args.output / "methods.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(rows, args.output / "methods.png")
    print("\n".join(["", *lines, "", f"written to {args.output}"]))


def draw(rows: list[dict], path: Path) -> None:
    """Perplexity over budgets, one line per method, the dense model as a level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130)
    axes = figure.subplots()
    budgets = list(dict.fromkeys(row["budget"] for row in rows[1:]))
    for method, fill in dict.fromkeys((row["method"], row["a_log_fill"]) for row in rows[1:]):
        found = {r["budget"]: float(r["perplexity"]) for r in rows if (r["method"], r["a_log_fill"]) == (method, fill)}
        axes.plot(budgets, [found[budget] for budget in budgets], marker="o", label=f"{method} ({fill})")
    axes.axhline(float(rows[0]["perplexity"]), color="black", linewidth=0.8, linestyle="--", label="dense")
    axes.set_yscale("log")
    axes.set_xlabel("budget")
    axes.set_ylabel("perplexity per token")
    axes.legend(fontsize=8)
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ASSETS / "mamba-tiny"))
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda", "sparsegpt", "sparsessm"])
    parser.add_argument("--budgets", nargs="+", default=["0.5", "2:4"], help="sparsities or N:M patterns")
    parser.add_argument("--targets", nargs="+", help="default: each method's own")
    parser.add_argument("--a-log-fill", nargs="+", default=["memoryless"], help="memoryless, zero, or both")
    parser.add_argument("--calibration", default=str(ASSETS / "wikitext-2" / "calibration.txt"))
    parser.add_argument("--evaluation", default=str(ASSETS / "wikitext-2" / "evaluation.txt"))
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=16)
    parser.add_argument("--device-map", help="where to put the model: cuda, auto, …; default: CPU")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "compare")
    logging.set_verbosity_error()
    try:
        main(parser.parse_args())
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
