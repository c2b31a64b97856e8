# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity per token over windows of a text; every window is computed from its own first token on.

A window never continues from the recurrent cache of the one before: transformers' Mamba-1 restarts the scan at every
multi-token call and gives wrong logits then, without a word.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..calibration.activations import inference_state
from ..calibration.data import load_text, tokenize
from ..calibration.heap import kept_heap
from ..calibration.offload import work_device
from ..calibration.ranks import ALONE, Ranks, current_ranks
from ..calibration.seam import replaced_scan
from ..errors import CalibrationError, ConfigurationError
from ..families import FAMILIES, family_of
from ..passes.progress import progress


LARGEST_LOSS = 709.0  # exp of more than this overflows float64


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with everything that is needed to measure it again.

    Args:
        perplexity (`float`): exp of the mean negative log-likelihood over the predicted tokens.
        dataset (`str`): where the text came from.
        window, stride (`int`): tokens per window and between the starts of two windows.
        windows, tokens (`int`): windows used and tokens predicted in them.
        dtype (`str`): dtype of the model.
    """

    perplexity: float
    dataset: str
    window: int
    stride: int
    windows: int
    tokens: int
    dtype: str

    @property
    def protocol(self) -> str:
        """One line that names the protocol."""
        return (
            f"{self.dataset}, {self.windows} windows of {self.window:,} tokens, stride {self.stride:,}, "
            f"{self.tokens:,} predicted tokens, {self.dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Fields and protocol as JSON-ready values."""
        return {**asdict(self), "protocol": self.protocol}


def evaluate_perplexity(model: nn.Module, tokenizer_or_ids: Any, dataset: Any = "wikitext2", **kwargs: Any) -> float:
    """Perplexity per token of a causal language model; `measure_perplexity` tells the protocol besides.

    Args:
        model (`PreTrainedModel`): a causal language model in memory.
        tokenizer_or_ids: a tokenizer for `dataset`, or the text as token ids, (tokens).
        dataset, **kwargs: as in `measure_perplexity`.
    """
    return measure_perplexity(model, tokenizer_or_ids, dataset, **kwargs).perplexity


def measure_perplexity(
    model: nn.Module,
    tokenizer_or_ids: Any,
    dataset: Any = "wikitext2",
    *,
    dataset_name: str | None = None,
    split: str = "test",
    text_column: str = "text",
    window: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 4,
    alone: bool = False,
) -> Perplexity:
    """Perplexity over the first windows of a text tokenised as one string; a tail shorter than a window is dropped.

    Every window predicts its tokens 2 to `window`; with `stride < window`, windows after the first predict only their
    last `stride` tokens. On supported families the scan is this library's (equal to the stock one within float32
    rounding, several times faster on a CPU).

    Args:
        model (`PreTrainedModel`): the model; its mode and config are left as they are.
        tokenizer_or_ids: a tokenizer for `dataset`, or token ids, (tokens), and then `dataset` only names them.
        dataset: `wikitext2`, a Hub id, a file or a `Dataset`, as in calibration.
        dataset_name, split, text_column (`str`): configuration, split and text column of a Hub dataset.
        window (`int`): tokens per window.
        stride (`int`, *optional*): tokens between window starts, at most `window`; default `window`.
        max_windows (`int`, *optional*): use only so many windows.
        batch_size (`int`): windows per forward pass.
        alone (`bool`): measure in this process only. Otherwise, where several were launched together, all of them must
            call this: they share the windows and get the same figure.

    Raises:
        ConfigurationError: a size is out of range, or the dataset cannot be read.
        CalibrationError: the text is shorter than one window, an id lies beyond the vocabulary, or logits are not finite or
            so wrong that the perplexity overflows.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window or batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise ConfigurationError(
            f"perplexity needs window >= 2, 1 <= stride <= window, batch_size >= 1 and max_windows >= 1; got "
            f"window={window}, stride={stride}, batch_size={batch_size}, max_windows={max_windows}"
        )
    if isinstance(tokenizer_or_ids, (Tensor, list, tuple)) or type(tokenizer_or_ids).__module__ == "numpy":
        ids = torch.as_tensor(tokenizer_or_ids, dtype=torch.long).reshape(-1)
        name = "token ids" if dataset == "wikitext2" else str(dataset)
    else:
        ids = tokenize(load_text(dataset, dataset_name, split, text_column), tokenizer_or_ids)
        name = dataset_label(dataset, split)
    if model.get_output_embeddings() is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no output head; perplexity needs a causal language model"
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(ids) < window:
        raise CalibrationError(f"the text has {len(ids)} tokens, fewer than one window of {window}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(
            f"token id {low if low < 0 else high} lies outside the model's vocabulary of {vocabulary}"
        )
    windows = ids.unfold(0, window, stride)[:max_windows]
    total, tokens = _negative_log_likelihood(model, windows, stride, batch_size, ALONE if alone else current_ranks())
    if not math.isfinite(total):
        raise CalibrationError("the model gives logits that are not finite")
    if total / tokens > LARGEST_LOSS:
        raise CalibrationError(
            f"the mean loss per token is {total / tokens:.4g}: the perplexity is too large for a float"
        )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Perplexity(math.exp(total / tokens), name, window, stride, len(windows), tokens, dtype)


def dataset_label(dataset: Any, split: str) -> str:
    """What a protocol calls a text: a file by its name without the path, a Hub dataset with its split."""
    if not isinstance(dataset, (str, os.PathLike)):
        return type(dataset).__name__
    return os.path.basename(dataset) if os.path.exists(dataset) else f"{dataset} {split}"


def _negative_log_likelihood(
    model: nn.Module, windows: Tensor, stride: int, batch_size: int, ranks: Ranks
) -> tuple[float, int]:
    device = work_device(model.get_input_embeddings())  # offloaded embeddings are themselves on no device
    known = {kind for _, family in FAMILIES.items() for kind in family.model_types}
    supported = getattr(model.config, "model_type", None) in known
    total, tokens = 0.0, 0
    with inference_state(model), kept_heap(), replaced_scan(family_of(model), model) if supported else nullcontext():
        starts = range(0, len(windows), batch_size)[ranks.index :: ranks.count]
        for start in progress(starts, "Perplexity", "batch", ranks):
            batch = windows[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            targets = batch[:, 1:].to(logits.device)
            # of rows, which lie together; with the vocabulary as the middle axis it takes several times as long
            losses = (
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets).double()
            )
            fresh = losses[:, -stride:]
            seen = losses[:1, :-stride] if start == 0 else losses[:0]  # only the first window has no predecessor
            total += float(fresh.sum() + seen.sum())
            tokens += fresh.numel() + seen.numel()
    total, tokens = ranks.sums(total, tokens)
    return total, int(tokens)
