# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Prune a small Mamba forecaster on ETTh1 gradually while it trains, and compare with magnitude pruning at once.

    python examples/prune_forecaster.py --data ETTh1.csv            # some minutes on a CPU

The file is `ETT-small/ETTh1.csv` of https://github.com/zhouhaoyi/ETDataset (CC BY-ND 4.0). Split, scaling and metrics
are the usual ones: 12, 4 and 4 months for training, validation and test, scaled by the training months; 96 hours predict
the next 96; mean squared and mean absolute error over all channels of all test windows, in scaled units.
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import MambaConfig, MambaModel, MambaPreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from optimum_ssm import CheckpointError, ConfigurationError, OptimumSSMError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration.seam import replaced_scan
from optimum_ssm.families import family_of
from optimum_ssm.report import table
from optimum_ssm.training import GradualPruningCallback


MONTH = 30 * 24  # rows
PATCH, STRIDE = 16, 8  # hours


class MambaForecaster(MambaPreTrainedModel):
    """Every channel by itself: patches of its past go through Mamba, one linear map gives its future.

    The past's mean and deviation are taken out before and put back after (reversible instance normalisation).
    """

    def __init__(self, config: MambaConfig) -> None:
        super().__init__(config)
        patches = (config.past - PATCH) // STRIDE + 1
        self.embed = nn.Linear(PATCH, config.hidden_size)
        self.backbone = MambaModel(config)
        self.backbone.embeddings.requires_grad_(False)  # numbers come in, no tokens
        self.head = nn.Linear(patches * config.hidden_size, config.horizon)
        self.dropout = nn.Dropout(0.2)
        self.post_init()

    def forward(self, past: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Forecast (batch, horizon, channels) of `past` (batch, hours, channels); with `labels` also the loss."""
        mean, deviation = past.mean(1, keepdim=True), past.std(1, keepdim=True) + 1e-5
        series = ((past - mean) / deviation).transpose(1, 2).flatten(0, 1)
        hidden = self.embed(series.unfold(1, PATCH, STRIDE))
        hidden = self.backbone(inputs_embeds=hidden, use_cache=False).last_hidden_state
        future = self.head(self.dropout(hidden.flatten(1))).unflatten(0, (len(past), -1)).transpose(1, 2)
        future = future * deviation + mean
        if labels is None:
            return {"logits": future}
        return {"loss": nn.functional.mse_loss(future, labels), "logits": future}


class Windows(Dataset):
    """All windows of a series (hours, channels), each split into past and future."""

    def __init__(self, series: Tensor, past: int, horizon: int) -> None:
        self.series, self.past, self.horizon = series, past, horizon

    def __len__(self) -> int:
        return len(self.series) - self.past - self.horizon + 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        middle = index + self.past
        return {"past": self.series[index:middle], "labels": self.series[middle : middle + self.horizon]}


def load(args: Namespace) -> tuple[Windows, Windows, Windows]:
    """Training, validation and test windows; the pasts of the last two reach back into the months before."""
    try:
        rows = np.loadtxt(args.data, delimiter=",", skiprows=1, usecols=range(1, 8), max_rows=20 * MONTH)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--data {args.data} is not ETTh1.csv: {error}") from error
    if len(rows) < 20 * MONTH:
        raise ConfigurationError(f"--data {args.data} has {len(rows)} rows, fewer than 20 months of {MONTH}")
    train = rows[: 12 * MONTH]
    scaled = torch.tensor((rows - train.mean(0)) / train.std(0), dtype=torch.float32)
    parts = (0, 12), (12, 16), (16, 20)
    return tuple(Windows(scaled[max(0, a * MONTH - args.past) : b * MONTH], args.past, args.horizon) for a, b in parts)


@torch.no_grad()
def errors(model: MambaForecaster, windows: Windows) -> tuple[float, float]:
    """Mean squared and mean absolute error over all windows."""
    model.eval()
    squared = absolute = 0.0
    with replaced_scan(family_of(model), model):
        for batch in torch.utils.data.DataLoader(windows, 128):
            past, future = batch["past"].to(model.device), batch["labels"].to(model.device)
            difference = (model(past)["logits"] - future).double()
            squared += float(difference.square().sum())
            absolute += float(difference.abs().sum())
    count = len(windows) * windows.horizon * windows.series.shape[1]
    return squared / count, absolute / count


def train(
    model: MambaForecaster, data: Windows, steps: int, rate: float, args: Namespace, *callbacks: TrainerCallback
) -> None:
    """`steps` optimiser steps on the training windows."""
    settings = TrainingArguments(
        output_dir=str(Path(__file__).parent / "output" / "forecaster"),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=args.batch_size,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=args.quiet,
        use_cpu=args.device == "cpu",
        bf16=args.bf16,
        seed=args.seed,
    )
    with replaced_scan(family_of(model), model):
        Trainer(model=model, args=settings, train_dataset=data, callbacks=list(callbacks)).train()


def prune(dense: MambaForecaster, data: Windows, sparsity: float, way: str, args: Namespace) -> MambaForecaster:
    """A pruned copy of the dense forecaster: by magnitude at once, that and training, or gradually in training."""
    model = copy.deepcopy(dense)
    pruner = SSMPruner(model)
    if way == "gradual":
        config = SSMPrunerConfig(method="gradient_magnitude", sparsity=sparsity)
        steps = {
            "begin_step": 5,
            "end_step": max(6, int(args.tune_steps * args.end)),
            "update_every": args.update_every,
        }
        gradual = GradualPruningCallback(pruner, config, **steps)
        train(model, data, args.tune_steps, args.tune_rate, args, gradual)
        gradual.finish()
    else:
        pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=sparsity))
        if way == "one-shot + training":
            train(model, data, args.tune_steps, args.tune_rate, args, pruner.sparsity_callback())
    share, total = pruner.report.sparsity, pruner.report.parameters
    print(f"{way} at {sparsity:g}: {share:.1%} of all {total:,} parameters removed; {counted(pruner)}", flush=True)
    return model


def counted(pruner: SSMPruner) -> str:
    """The zeros that are in the weights now, which must be those of the masks and as many as the sparsity promises.

    Raises:
        CheckpointError: they are not.
    """
    rows = [row for row in pruner.report.rows if row.methods]
    size, promised = sum(row.elements for row in rows), sum(row.pruned for row in rows)
    zeros = sum(int((pruner.model.get_parameter(row.name) == 0).sum()) for row in rows)
    same = all(torch.equal(pruner.model.get_parameter(row.name).cpu() == 0, pruner.masks[row.name]) for row in rows)
    wanted = pruner.report.passes[-1].config["sparsity"]
    if zeros != promised or not same or abs(zeros - wanted * size) > len(rows):
        raise CheckpointError(f"{zeros} of {size} target entries are zero, {promised} are masked")
    return f"{zeros:,} of the targets' {size:,} entries are zero, as promised"


def main(args: Namespace) -> None:
    """Dense training, then every way of pruning at every sparsity; one row each."""
    torch.manual_seed(args.seed)
    training, validation, test = load(args)
    config = MambaConfig(
        vocab_size=1, hidden_size=args.hidden, num_hidden_layers=args.layers, past=args.past, horizon=args.horizon
    )
    dense = MambaForecaster(config).to(args.device)
    train(dense, training, args.steps, args.rate, args)
    rows = [("dense", "-", *errors(dense, validation), *errors(dense, test))]
    tuned = copy.deepcopy(dense)
    train(tuned, training, args.tune_steps, args.tune_rate, args)
    rows.append(("dense, trained as long", "-", *errors(tuned, validation), *errors(tuned, test)))
    for sparsity in args.sparsities:
        for way in ("one-shot", "one-shot + training", "gradual"):
            model = prune(dense, training, sparsity, way, args)
            rows.append((way, f"{sparsity:g}", *errors(model, validation), *errors(model, test)))
    head = ("model", "sparsity", "validation MSE", "validation MAE", "test MSE", "test MAE")
    body = [(*row[:2], *(f"{value:.4f}" for value in row[2:])) for row in rows]
    print("\n".join(["", *table(head, body, right=(1, 2, 3, 4, 5))]))
    if args.output is not None:
        model.save_pretrained(args.output)  # the last one; MambaForecaster.from_pretrained loads it
        print(f"\nthe last model is saved in {args.output}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("ETTh1.csv"), help="path of ETTh1.csv")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7], help="of Mamba's projections")
    parser.add_argument("--past", type=int, default=96, help="hours that are seen")
    parser.add_argument("--horizon", type=int, default=96, help="hours that are predicted")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600, help="training of the dense model")
    parser.add_argument("--tune-steps", type=int, default=300, help="training while or after pruning")
    parser.add_argument("--end", type=float, default=1 / 3, help="share of --tune-steps at which gradual pruning ends")
    parser.add_argument("--update-every", type=int, default=15, help="steps between two updates of gradual masks")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tune-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=32, help="windows, each of 7 series")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--output", type=Path, help="directory for the last model")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    try:
        main(arguments)
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
