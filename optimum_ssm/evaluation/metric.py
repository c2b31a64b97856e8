# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity as an `evaluate.Metric` for a model in memory; needs no network.

`evaluate`'s own perplexity metric loads the model again by name, pads, and averages perplexities of single texts, which
is not the number that papers report.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch
from torch import nn

from ..calibration.data import tokenize
from .perplexity import measure_perplexity


class SSMPerplexity(evaluate.Metric):
    """`compute(predictions=texts, model=model, tokenizer=tokenizer, window=1024)`.

    The texts are joined by blank lines and scored as one string in windows, as in `measure_perplexity`.

    Returns from `compute`:
        `dict`: `perplexity` and the protocol's fields (`window`, `stride`, `windows`, `tokens`, `dtype`, `protocol`).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity per token of a causal language model in memory, over windows of the joined texts.",
            citation="",
            inputs_description="predictions: texts to score; model, tokenizer: in memory; window, stride, max_windows.",
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions: list[str], model: nn.Module, tokenizer: Any, **kwargs: Any) -> dict[str, Any]:
        ids: torch.Tensor = tokenize("\n\n".join(predictions), tokenizer)
        return measure_perplexity(model, ids, "texts", alone=True, **kwargs).to_dict()
