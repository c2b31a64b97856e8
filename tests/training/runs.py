# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Short training runs of tiny models on random token ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments


class RandomTokens(Dataset):
    """Rows of random ids that are also their labels."""

    def __init__(self, rows: int = 64, length: int = 12, vocabulary: int = 64) -> None:
        draw = torch.Generator().manual_seed(7)
        self.ids = torch.randint(0, vocabulary, (rows, length), generator=draw)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Six steps on the CPU with every trap on: weight decay, accumulation, a large learning rate."""
    values = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**values, **changes})


def train(
    model: PreTrainedModel,
    folder: Path,
    callbacks: Iterable[TrainerCallback] = (),
    resume: Path | None = None,
    trainer: type[Trainer] = Trainer,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    """The Trainer after its run."""
    runner = trainer(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=RandomTokens(),
        callbacks=list(callbacks),
        **(options or {}),
    )
    runner.train(resume_from_checkpoint=None if resume is None else str(resume))
    return runner
