# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a model is worth: perplexity, a metric for `evaluate`, and what a checkpoint really holds."""

from importlib import import_module
from typing import Any


_EXPORTS = {
    "Perplexity": "perplexity",
    "evaluate_perplexity": "perplexity",
    "measure_perplexity": "perplexity",
    "SSMPerplexity": "metric",
    "inspect_checkpoint": "inspection",
    "compare": "comparison",
    "Comparison": "comparison_table",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:  # on first use: `evaluate` and `datasets` need not be there for the rest
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
