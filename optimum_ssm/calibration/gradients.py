# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of the loss gradient, taken by backward passes through the whole dense model before a pass begins.

| name | value | shape |
|---|---|---|
| `grad_abs` | mean over batches of the absolute value of ∂L/∂W, L the mean next-token loss of a batch | as the weight |
| `fisher` | mean over sequences of (∂L/∂W)², L the mean next-token loss of a sequence: the empirical Fisher's diagonal | as the weight |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..passes.progress import progress
from .ranks import ALONE, Ranks


GRADIENT_STATISTICS = ("grad_abs", "fisher")


def gradient_statistics(
    model: nn.Module, wanted: Mapping[str, tuple[str, ...]], ids: Tensor, batch_size: int, ranks: Ranks = ALONE
) -> dict[str, dict[str, Tensor]]:
    """`GRADIENT_STATISTICS` of the named parameters.

    Holds one float64 sum and one gradient per named parameter, and the activations of one batch.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode; `requires_grad` flags and gradients are as before
            at the end.
        wanted (`Mapping[str, tuple[str, ...]]`): qualified names of parameters, with the statistics of each.
        ids (`Tensor`): int64, (samples, seq_len).
        batch_size (`int`): samples per backward pass; `fisher` takes one at a time.
        ranks (`Ranks`): processes that share the batches out; a batch is the same one on one process and on several.

    Returns:
        `dict`: parameter name to statistic name to value.

    Raises:
        CalibrationError: a gradient is missing or not finite; the parameter is named.
    """
    found: dict[str, dict[str, Tensor]] = {name: {} for name in wanted}
    for statistic in GRADIENT_STATISTICS:
        names = [name for name, statistics in wanted.items() if statistic in statistics]
        if names:
            sums = _gradients(model, names, ids.split(1 if statistic == "fisher" else batch_size), statistic, ranks)
            for name, value in sums.items():
                found[name][statistic] = value
    return found


def _gradients(
    model: nn.Module, names: list[str], batches: tuple[Tensor, ...], statistic: str, ranks: Ranks
) -> dict[str, Tensor]:
    """Mean over batches of the absolute or the squared gradient."""
    power = torch.abs if statistic == "grad_abs" else torch.square
    wanted = {name: model.get_parameter(name) for name in names}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    sums = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in wanted.items()}
    device = model.get_input_embeddings().weight.device
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)
        for batch in progress(batches[ranks.index :: ranks.count], "Gradients", "batch", ranks):
            batch = batch.to(device)
            with torch.enable_grad():
                loss = _loss(model, batch)
                gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            for name, gradient in zip(wanted, gradients):
                if gradient is None:
                    raise CalibrationError(f"{name}: the loss does not depend on it")
                sums[name] += power(gradient.float()) / len(batches)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    for name, value in sums.items():
        ranks.sum_(value)
        if not value.isfinite().all():
            raise CalibrationError(f"{name}: its gradient is not finite")
    return {name: value.float() for name, value in sums.items()}


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    try:
        return model(input_ids=batch, labels=batch, use_cache=False).loss
    except (TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{type(model).__name__} gives no next-token loss; gradients need a causal model"
        ) from error
