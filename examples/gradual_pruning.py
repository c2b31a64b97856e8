# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Prune a language model step by step while it trains, save it, and compare with pruning at once on the same text.

    python examples/gradual_pruning.py                                  # the embedded model, some minutes on a CPU
    python examples/gradual_pruning.py --compare --distill 0.5          # with one-shot pruning and a dense teacher
    python examples/gradual_pruning.py --compare --compare_methods sparsegpt best    # with these at once, too
    python examples/gradual_pruning.py --model state-spaces/mamba-130m-hf --train_text wikitext2 \\
        --eval_text wikitext2 --max_steps 2000 --bf16 --per_device_train_batch_size 16 --seq_len 1024

Every option of transformers' `TrainingArguments` works too. With `--save_strategy steps`, `--resume` goes on from the last
checkpoint in `--output_dir`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint
from transformers.utils import logging

from optimum_ssm import CheckpointError, ConfigurationError, OptimumSSMError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration.data import load_text, tokenize
from optimum_ssm.calibration.seam import replaced_scan
from optimum_ssm.sparsity.selection import round_half_up
from optimum_ssm.training import DistillationTrainer, GradualPruningCallback


HERE = Path(__file__).parent
TEXTS = HERE / "assets" / "wikitext-2"
DEFAULTS = {
    "output_dir": str(HERE / "output" / "gradual" / "checkpoints"),
    "max_steps": 300,
    "learning_rate": 1e-3,
    "warmup_steps": 20,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "weight_decay": 0.01,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass
class Options:
    """What this example takes besides the Trainer's own arguments."""

    model: str = field(default=str(HERE / "assets" / "mamba-tiny"), metadata={"help": "Hub id or directory"})
    train_text: str = field(default=str(TEXTS / "calibration.txt"), metadata={"help": "a .txt file, or wikitext2"})
    eval_text: str = field(default=str(TEXTS / "evaluation.txt"), metadata={"help": "a .txt file, or wikitext2"})
    seq_len: int = field(default=256, metadata={"help": "tokens in a training row"})
    window: int = field(default=1024, metadata={"help": "tokens in a window of the perplexity"})
    max_windows: int = field(default=16, metadata={"help": "windows of the perplexity"})
    sparsity: float = field(default=0.7, metadata={"help": "final share of the targets to remove"})
    method: str = field(default="gradient_magnitude", metadata={"help": "gradient_magnitude or magnitude"})
    targets: list[str] | None = field(default=None, metadata={"help": "weights to prune; default: the method's own"})
    shape: str = field(default="cubic", metadata={"help": "cubic, linear or one-shot"})
    begin_step: int = field(default=10, metadata={"help": "last step of the dense model"})
    end_step: int | None = field(default=None, metadata={"help": "first step at the final sparsity; default: a third"})
    update_every: int = field(default=15, metadata={"help": "steps between two updates of the masks"})
    distill: float = field(default=0.0, metadata={"help": "weight of the dense teacher in the loss, 0 to 1"})
    compare: bool = field(default=False, metadata={"help": "also prune at once, without and with the same training"})
    compare_methods: list[str] = field(
        default_factory=list,
        metadata={"help": "other methods to compare with, at once, without and with the training"},
    )
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})
    sparse_dir: str = field(default=str(HERE / "output" / "gradual" / "sparse"), metadata={"help": "where to save"})


class Rows(Dataset):
    """A text as rows of `length` token ids without overlap, which are also their labels."""

    def __init__(self, ids: Tensor, length: int) -> None:
        self.rows = ids[: len(ids) // length * length].view(-1, length)
        if not len(self.rows):
            raise ConfigurationError(f"the training text has {len(ids)} tokens, fewer than one row of {length}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def load(options: Options, args: TrainingArguments) -> SSMPruner:
    """The dense model in float32 (the Trainer's bf16 is autocast over it) on the Trainer's device."""
    pruner = SSMPruner.from_pretrained(options.model, dtype="float32")
    pruner.model.to(args.device)
    return pruner


def prune_in_training(
    pruner: SSMPruner, data: Rows, options: Options, args: TrainingArguments, shape: str
) -> GradualPruningCallback:
    """Prune along a schedule while training; the pruner knows the result."""
    end = options.end_step or max(args.max_steps // 3, options.begin_step + 1)
    config = SSMPrunerConfig(method=options.method, sparsity=options.sparsity, targets=options.targets)
    schedule = {"begin_step": options.begin_step, "end_step": end, "update_every": options.update_every}
    gradual = GradualPruningCallback(pruner, config, **schedule, shape=shape)
    train(pruner, data, options, args, gradual)
    gradual.finish()
    return gradual


def train(
    pruner: SSMPruner, data: Rows, options: Options, args: TrainingArguments, *callbacks: TrainerCallback
) -> None:
    """The training that all ways of pruning share."""
    common = {"model": pruner.model, "args": args, "train_dataset": data, "callbacks": list(callbacks)}
    if options.distill:
        teacher = load(options, args).model
        trainer = DistillationTrainer(**common, teacher=teacher, alpha=options.distill)
    else:
        trainer = Trainer(**common)
    last = get_last_checkpoint(args.output_dir) if options.resume and Path(args.output_dir).is_dir() else None
    last = None if args.save_strategy == SaveStrategy.NO else last  # checkpoints are those of the gradual run alone
    with replaced_scan(pruner.family, pruner.model):  # many times faster than transformers' own without a kernel
        trainer.train(resume_from_checkpoint=last)


def one_shot(options: Options, args: TrainingArguments, method: str) -> SSMPruner:
    """A method at once, calibrated on the same text, without training."""
    config = SSMPrunerConfig(
        method=method,
        sparsity=options.sparsity,
        targets=options.targets,
        scope="global" if method == options.method else None,
        dataset=options.train_text,
        num_samples=128,
        seq_len=options.seq_len,
    )
    pruner = load(options, args)
    pruner.prune(config)
    return pruner


def check_saved(options: Options, gradual: GradualPruningCallback) -> str:
    """Count the removed entries in the files that were saved.

    Raises:
        CheckpointError: they are not those that the masks say, or not as many as the sparsity promises.
    """
    masks, size = gradual.pruner.masks, gradual.threshold.size
    promised = round_half_up(options.sparsity * size)
    saved = AutoModelForCausalLM.from_pretrained(options.sparse_dir, dtype="float32")
    found = 0
    for name, mask in masks.items():
        fill = gradual.plan.fill("a_log") if name.endswith("A_log") else 0.0
        removed = saved.get_parameter(name).detach() == fill
        if not torch.equal(removed, mask):
            raise CheckpointError(f"{name} in {options.sparse_dir} holds {removed.sum()} zeros, its mask {mask.sum()}")
        found += int(removed.sum())
    if found != promised:
        raise CheckpointError(f"{options.sparse_dir} lacks {found} of {size} entries, {promised} were promised")
    return f"counted in the saved files: {found:,} of the targets' {size:,} entries are gone, as promised"


def main(options: Options, args: TrainingArguments) -> None:
    """Dense perplexity, gradual pruning, report, checkpoint, and what is to be compared with it."""
    if args.max_steps < 1:
        raise ConfigurationError("the schedule is one of steps: give --max_steps instead of epochs")
    found: dict[str, float] = {}

    def measure(name: str, pruner: SSMPruner) -> None:
        found[name] = pruner.evaluate(options.eval_text, window=options.window, max_windows=options.max_windows)
        if args.process_index == 0:
            print(f"{name}: perplexity {found[name]:.2f}", flush=True)

    pruner = load(options, args)
    data = Rows(tokenize(load_text(options.train_text), pruner.tokenizer), options.seq_len)
    measure("dense", pruner)
    quiet = copy.copy(args)
    quiet.save_strategy = SaveStrategy.NO
    if options.compare:
        other = load(options, args)
        train(other, data, options, quiet)
        measure("dense, then the same training", other)
        measure("one-shot, not trained", one_shot(options, args, options.method))
        other = load(options, args)
        prune_in_training(other, data, options, quiet, "one-shot")
        measure("one-shot, then the same training", other)
    for method in options.compare_methods:
        other = one_shot(options, args, method)
        measure(f"{method} at once, not trained", other)
        train(other, data, options, quiet, other.sparsity_callback())
        measure(f"{method} at once, then the training", other)
    gradual = prune_in_training(pruner, data, options, args, options.shape)
    measure(f"gradual ({options.shape})", pruner)
    pruner.save_pretrained(options.sparse_dir, overwrite=True)  # on all processes: one writes, the others wait
    if args.process_index == 0:
        print(f"\n{pruner.report}\n")
        print(f"perplexity, {options.sparsity:.0%} of the targets removed, {pruner.report.sparsity:.1%} of the model:")
        print("\n".join(f"  {name:40}{value:10.2f}" for name, value in found.items()))
        print(f"saved in {options.sparse_dir}")
        print(check_saved(options, gradual))


if __name__ == "__main__":
    parser = HfArgumentParser((Options, TrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    options, args = parser.parse_args_into_dataclasses()
    logging.set_verbosity_error()
    torch.manual_seed(args.seed)
    try:
        main(options, args)
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
