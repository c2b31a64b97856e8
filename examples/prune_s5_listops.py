# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Train S5 on ListOps, prune its states in several ways without retraining, and print the accuracies.

    python examples/prune_s5_listops.py                          # short expressions, five to ten minutes on one CPU core
    python examples/prune_s5_listops.py --published --device cuda    # the setting of the paper: hours on a GPU

Expressions are generated; `--data` takes a local file instead, one per line with its label before or after it, separated by
a tab. Accuracies are on held-out expressions; ± is one standard error of the paired difference to the dense model.
"""

from __future__ import annotations

import copy
import random
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from optimum_ssm import ConfigurationError, OptimumSSMError
from optimum_ssm.evaluation import listops
from optimum_ssm.models.s5 import S5Config, S5ForSequenceClassification
from optimum_ssm.models.s5_tasks import S5_TASKS, parameter_groups
from optimum_ssm.report import table
from optimum_ssm.surgery.diagonal import prune_diagonal


PUBLISHED = {"train": 96_000, "test": 10_000, "min_length": 500, "max_length": 2000, "layers": 8, "hidden": 128}
PUBLISHED |= {"epochs": 40, "batch_size": 50, "pad_to": 2048}
WAYS = {
    "LAST": {"method": "last"},
    "AIRE": {"method": "aire"},
    "H∞ uniform": {"method": "last", "allocation": "uniform"},
    "H∞ global": {"method": "last", "allocation": "global"},
    "magnitude": {"method": "magnitude"},
}
Items = list[tuple[list[int], int]]


def read(path: Path) -> list[tuple[str, int]]:
    """Expressions and labels of a file; a line without a label, such as a header, is left out."""
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            parts = line.split("\t")
            label = next((part for part in (parts[0], parts[-1]) if len(part) == 1 and part.isdigit()), None)
            if label is not None and len(parts) == 2:
                found.append((listops.normalise(parts[1] if parts[0] == label else parts[0]), int(label)))
    except OSError as error:
        raise ConfigurationError(f"--data {path} cannot be read: {error}") from error
    return found


def load(args: Namespace) -> tuple[Items, Items]:
    """Training and test items, which share no expression."""
    wanted = args.train + args.test
    if args.data is None:
        found = listops.generate(wanted, args.seed, min_length=args.min_length, max_length=args.max_length)
    else:
        found = [item for item in dict(read(args.data)).items() if len(item[0].split()) < args.max_length]
        random.Random(args.seed).shuffle(found)
        if len(found) < wanted:
            raise ConfigurationError(f"--data {args.data} has {len(found)} distinct expressions, fewer than {wanted}")
    items = [(listops.encode(text), label) for text, label in found[:wanted]]
    return items[: args.train], items[args.train :]


def batches(items: Items, args: Namespace, shuffle: random.Random | None = None) -> list[tuple[Tensor, Tensor]]:
    """Padded ids and labels. Batches hold expressions of similar lengths, unless all are padded to one length."""
    order = list(range(len(items)))
    if shuffle:
        shuffle.shuffle(order)
    if not args.pad_to:
        span = 50 * args.batch_size
        order = [
            i for k in range(0, len(order), span) for i in sorted(order[k : k + span], key=lambda i: len(items[i][0]))
        ]
    groups = [order[k : k + args.batch_size] for k in range(0, len(order), args.batch_size)]
    if shuffle:
        shuffle.shuffle(groups)
    found = []
    for group in groups:
        longest = max(len(items[i][0]) for i in group)
        ids = torch.zeros(len(group), max(args.pad_to, longest), dtype=torch.long)
        for row, i in enumerate(group):
            ids[row, : len(items[i][0])] = torch.tensor(items[i][0])
        found.append((ids, torch.tensor([items[i][1] for i in group])))
    return found


def train(model: S5ForSequenceClassification, items: Items, args: Namespace) -> None:
    """AdamW in the published groups, one epoch of warm-up, then cosine."""
    task = S5_TASKS["listops"]
    groups = parameter_groups(model, args.rate, task.lr_factor, task.weight_decay, task.groups, task.dt_global)
    optimiser = torch.optim.AdamW(groups)
    per_epoch = -(-len(items) // args.batch_size)
    schedule = get_cosine_schedule_with_warmup(optimiser, task.warmup * per_epoch, args.epochs * per_epoch)
    shuffle, started = random.Random(args.seed), time.monotonic()
    model.train()
    for epoch in range(args.epochs):
        total = 0.0
        for ids, labels in batches(items, args, shuffle):
            loss = model(ids.to(model.device), labels=labels.to(model.device)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(labels)
        print(f"epoch {epoch + 1}: loss {total / len(items):.3f}, {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def correct(model: S5ForSequenceClassification, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """1 for every item that is classified correctly, else 0."""
    model.eval()
    hits = [model(ids.to(model.device)).logits.argmax(-1).cpu() == labels for ids, labels in data]
    return torch.cat(hits).double()


def row(name: str, hits: list[Tensor], dense: Tensor) -> list[str]:
    """One cell per ratio: accuracy and the paired difference to the dense model in points."""
    cells = []
    for found in hits:
        change = 100 * (found - dense)
        error = float(change.std()) / len(change) ** 0.5
        cells.append(f"{100 * float(found.mean()):.2f} ({float(change.mean()):+.2f} ± {error:.2f})")
    return [name, *cells]


def main(args: Namespace) -> None:
    """Dense training, then every way at every ratio."""
    torch.manual_seed(args.seed)
    training, test = load(args)
    fields = S5_TASKS["listops"].config | {"num_hidden_layers": args.layers, "hidden_size": args.hidden}
    fields |= {"ssm_size_base": args.ssm_size, "num_blocks": args.blocks, "mask_padding": not args.pad_to}
    model = S5ForSequenceClassification(S5Config(**fields)).to(args.device)
    train(model, training, args)
    data = batches(test, args)
    dense = correct(model, data)
    counts = [0] * 10
    for _, label in test:
        counts[label] += 1
    print(
        f"dense {100 * float(dense.mean()):.2f} % of {len(test)}, most frequent class {100 * max(counts) / len(test):.2f} %"
    )
    hits: dict[str, list[Tensor]] = {name: [] for name in (*WAYS, "random")}
    last = model
    for ratio in args.ratios:
        for name, way in WAYS.items():
            pruned = copy.deepcopy(model)
            report = prune_diagonal(pruned, ratio, **way)
            hits[name].append(correct(pruned, data))
            last = pruned if name == "LAST" else last
            print(
                f"{ratio:g} {name}: {report.kept} of {report.states} states, {[r.kept for r in report.rows]}",
                flush=True,
            )
        draws = []
        for seed in range(args.draws):
            pruned = copy.deepcopy(model)
            prune_diagonal(pruned, ratio, "random", seed=seed)
            draws.append(correct(pruned, data))
        hits["random"].append(torch.stack(draws).mean(0))
    body = [row(name, found, dense) for name, found in hits.items()]
    head = ("accuracy in %", *(f"{100 * ratio:g} % of states" for ratio in args.ratios))
    print("\n".join(["", *table(head, body, right=tuple(range(1, len(head))))]))
    if args.output is not None:
        last.save_pretrained(args.output)
        print(f"\nthe last model that LAST cut is saved in {args.output}")


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", action="store_true", help="lengths, sizes and training of the publication")
    parser.add_argument("--data", type=Path, help="local file of expressions and labels; default: generated")
    parser.add_argument("--train", type=int, default=20_000, help="expressions to train on")
    parser.add_argument("--test", type=int, default=10_000, help="held-out expressions")
    parser.add_argument("--min-length", type=int, default=10, help="tokens of generated expressions are more")
    parser.add_argument("--max-length", type=int, default=60, help="tokens of expressions are fewer")
    parser.add_argument(
        "--pad-to", type=int, default=0, help="pad all to this length, unmasked, as published; 0: masked"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--ssm-size", type=int, default=32, help="eigenvalues per layer, two to a state")
    parser.add_argument("--blocks", type=int, default=4, help="HiPPO blocks per layer")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rate", type=float, default=S5_TASKS["listops"].ssm_lr, help="of the state space parameters")
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[0.0, 0.1, 0.3, 0.5, 0.7], help="of states to remove"
    )
    parser.add_argument("--draws", type=int, default=3, help="random choices to average over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="directory for the last model that LAST cut")
    if parser.parse_known_args()[0].published:
        parser.set_defaults(**PUBLISHED, ssm_size=16, blocks=8)
    try:
        main(parser.parse_args())
    except OptimumSSMError as error:
        parser.exit(1, f"error: {error}\n")
