# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Tuning a pruned language model towards the dense one: cross-entropy mixed with the teacher's distribution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from ..errors import ConfigurationError


IGNORED = -100  # a label without weight, as everywhere in transformers


class DistillationTrainer(Trainer):
    """`Trainer` with a frozen teacher: (1 - alpha) cross-entropy + alpha T² distillation (arXiv 1503.02531).

    Both are means over real tokens, also with gradient accumulation and over several ranks: positions whose label is
    -100 or whose `attention_mask` is 0 have no weight. Evaluation gives the plain cross-entropy. The teacher is set to
    eval mode, moved to the Trainer's device and run without gradients.

    Args:
        *args, **kwargs: as in `Trainer`.
        teacher (`PreTrainedModel`): the dense model, with the student's vocabulary.
        alpha (`float`): share of the distillation, in [0, 1].
        temperature (`float`): T, above 0.

    Raises:
        ConfigurationError: a value is out of range, the vocabularies differ, or a Trainer setting that brings another
            loss, or DataParallel, is on.
    """

    def __init__(
        self, *args: Any, teacher: PreTrainedModel, alpha: float = 0.5, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= alpha <= 1:
            raise ConfigurationError(f"alpha={alpha} must lie in [0, 1]")
        if not temperature > 0:
            raise ConfigurationError(f"temperature={temperature} must be above 0")
        if self.compute_loss_func is not None or self.args.label_smoothing_factor:
            raise ConfigurationError(
                "distillation has its own loss: leave compute_loss_func and label_smoothing_factor out"
            )
        if self.args.n_gpu > 1:
            raise ConfigurationError(
                f"distillation does not run under DataParallel on {self.args.n_gpu} devices: use `accelerate launch`"
            )
        sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, self.model)]
        if sizes[0] != sizes[1]:
            raise ConfigurationError(f"the teacher's vocabulary has {sizes[0]} entries, the student's {sizes[1]}")
        self.alpha, self.temperature = alpha, temperature
        self.teacher = teacher.to(self.args.device).eval()
        # The loss below is a mean over the accumulated batch; the Trainer counts its tokens and divides no further.
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, epoch_iterator: Iterator, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As in `Trainer`, with padding taken out of the labels before they are counted."""
        return super().get_batch_samples(map(_without_padding, epoch_iterator), *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The mixed loss in training, the model's own in evaluation. Arguments as in `Trainer.compute_loss`."""
        inputs = _without_padding(inputs)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad():
            taught = self.teacher(**inputs, use_cache=False).logits if self.alpha else outputs.logits
        loss = distillation_loss(outputs.logits, taught, labels, self.alpha, self.temperature, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is of all ranks, and DDP takes the mean over them
        return (loss, outputs) if return_outputs else loss


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
    tokens: Tensor | int | None = None,
) -> Tensor:
    """(1 - alpha) CE + alpha T² (-Σ_v softmax(z_teacher / T) log_softmax(z_student / T)), mean over the real tokens.

    The second term is the Kullback-Leibler divergence up to the teacher's entropy, which has no gradient.

    Args:
        student, teacher (`Tensor`): logits, (batch, length, vocabulary); computed in float32.
        labels (`Tensor`): int64, (batch, length), the input ids; position t predicts label t + 1. -100: no weight.
        alpha (`float`): share of the second term.
        temperature (`float`): T.
        tokens (`Tensor` or `int`, *optional*): divide by this number instead of the real tokens of these labels.

    Returns:
        `Tensor`: scalar, float32.
    """
    targets = labels[:, 1:].to(student.device)
    real = targets != IGNORED
    ours, theirs = (logits[:, :-1].to(student.device)[real].float() for logits in (student, teacher))
    targets = targets[real]
    total = (1 - alpha) * F.cross_entropy(ours, targets, reduction="sum")
    if alpha:
        soft = F.softmax(theirs / temperature, dim=-1)
        total = total + alpha * temperature**2 * F.cross_entropy(ours / temperature, soft, reduction="sum")
    count = len(targets) if tokens is None else tokens
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def _without_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy of the batch whose labels are -100 wherever no real token is predicted, the first position included."""
    if "labels" not in inputs:
        raise ConfigurationError("distillation needs labels in every batch; use a collator that makes them")
    labels = inputs["labels"].clone()
    if inputs.get("attention_mask") is not None:
        labels[inputs["attention_mask"] == 0] = IGNORED
    labels[:, 0] = IGNORED
    return {**inputs, "labels": labels}
