# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm compare` on the embedded model and text, for machines without optimum: the same flags, other defaults.

    python examples/compare_methods.py                                  # every weight alone, two methods
    python examples/compare_methods.py MODEL --device-map cuda --methods magnitude wanda sparsegpt \\
        --budgets 0.5 0.7 2:4 --components in_proj,x_proj,dt_proj,out_proj --output examples/output/compare
"""

from argparse import ArgumentParser
from pathlib import Path

from transformers.utils import logging

from optimum_ssm import OptimumSSMError
from optimum_ssm.commands.comparing import add_comparison_flags, run_comparison


HERE = Path(__file__).parent
TEXTS = HERE / "assets" / "wikitext-2"
DEFAULTS = {
    "model": str(HERE / "assets" / "mamba-tiny"),
    "output": HERE / "output" / "compare",
    "dataset": str(TEXTS / "calibration.txt"),
    "evaluate": str(TEXTS / "evaluation.txt"),
    "num_samples": 32,
    "seq_len": 512,
    "window": 1024,
    "max_windows": 16,
}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add_comparison_flags(parser)
    parser.add_argument("--device-map", default="cpu", help="where to put the model: cuda, auto, … (default: cpu)")
    for action in parser._actions:
        if action.dest in DEFAULTS:
            action.default, action.required = DEFAULTS[action.dest], False
            action.nargs = "?" if action.dest == "model" else action.nargs
    args = parser.parse_args()
    logging.set_verbosity_error()
    try:
        run_comparison(args, {"dtype": "float32", "device_map": args.device_map})
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
