# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Runs that end before they should. `test_resume.py` starts this file, lets each of them go on, and compares."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from optimum_ssm import CheckpointError, SSMPruner, SSMPrunerConfig
from optimum_ssm.hub import shards
from optimum_ssm.passes.resume import Shards
from tests.conftest import VOCABULARY, tiny_model


LAYERS = 4
LENGTH = 12
WEIGHTS = {
    "method": "sparsessm",
    "sparsity": 0.5,
    "targets": ["in_proj", "out_proj", "A_log"],
}  # plans its ratios first
UNITS = {"method": "state_energy", "sparsity": 0.5, "uniform_sizes": False, "multiple_of": 2, "compensation": "bias"}
RUNS = {  # name: (family, passes)
    "weights": ("mamba", [WEIGHTS]),
    "units": ("mamba2", [UNITS, {"method": "wanda", "sparsity": 0.5, "targets": ["in_proj"]}]),
    "states": ("mamba", [{"method": "state_energy", "sparsity": 0.5},
                         {"method": "wanda", "sparsity": 0.5, "targets": ["in_proj"]}]),
    "gradients": ("mamba", [{"method": "gradient_magnitude", "sparsity": 0.5, "sequential": False,
                             "targets": ["re:.*layers.[123].mixer.(in|out)_proj"], "reconstruction_epochs": 1}]),
    "groups": ("mamba2", [{"method": "merge", "sparsity": 0.5, "compensation": "least_squares"}]),
    "search": ("mamba", [{"method": "block_drop", "sparsity": 0.5},
                         {"method": "wanda", "sparsity": 0.5, "targets": ["in_proj"]}]),
}  # fmt: skip


def pruner_of(run: str, folder: Path | str | None, seed: int = 0, ids_seed: int = 5, **changes: object) -> SSMPruner:
    """The model of a run with its recipe, which keeps its blocks in `folder`."""
    family, passes = RUNS[run]
    ids = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(ids_seed))
    common = {"dataset": ids, "seq_len": LENGTH, "batch_size": 2, "resume_from": folder, **changes}
    recipe = [SSMPrunerConfig(**{**entry, **common}) for entry in passes]
    return SSMPruner(tiny_model(family, seed, num_hidden_layers=LAYERS), pruning_config=recipe)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_block(count: int) -> Callable[[], None]:
    """Killed when so many blocks, over all passes, are whole on the disk."""

    def arm() -> None:
        keep, kept = Shards.keep, []

        def counted(*args: object) -> None:
            keep(*args)
            kept.append(args)
            if len(kept) == count:
                kill()

        Shards.keep = counted

    return arm


def within_write(name: str, share: float) -> Callable[[], None]:
    """Killed when so much of a piece is written; with a share of 1, before it has its name."""

    def arm() -> None:
        replace = os.replace

        def cut(half: Path, whole: Path) -> None:
            if whole.stem == name:
                os.truncate(half, int(share * half.stat().st_size))
                kill()
            replace(half, whole)

        shards.os.replace = cut

    return arm


def full_disk() -> None:
    """From the third block on, the kernel refuses to write more than 4 kB into a file."""
    keep, kept = Shards.keep, []

    def limited(*args: object) -> None:
        kept.append(args)
        if len(kept) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        keep(*args)

    Shards.keep = limited


# folder: (run, what goes wrong, blocks of the last pass that are whole then)
FAULTS = {
    "first": ("weights", after_block(1), 1),
    "last": ("weights", after_block(LAYERS), LAYERS),
    "middle": ("weights", within_write("pass-1-block-0002", 0.5), 2),
    "plan": ("weights", within_write("pass-1-plan", 0.5), 0),
    "unnamed": ("gradients", within_write("pass-1-block-0003", 1.0), 3),
    "units": ("units", after_block(2), 2),
    "states": ("states", after_block(LAYERS + 1), 1),
    "second-pass": ("units", after_block(LAYERS + 2), 2),
    "groups": ("groups", after_block(3), 3),
    "full": ("weights", full_disk, 2),
}
# the same in a search for blocks to drop: (run, what goes wrong, pieces that are whole then)
SEARCHES = {
    "second-round": ("search", within_write("pass-1-round-0001", 0.5), ["pass-1-round-0000"]),
    "after-search": ("search", after_block(1),
                     ["pass-1-round-0000", "pass-1-round-0001", "pass-2-block-0000", "pass-2-plan"]),
}  # fmt: skip


def main(root: Path) -> None:
    """One child for each fault; what it ended by goes to stdout."""
    for name, (run, arm, _) in {**FAULTS, **SEARCHES}.items():
        child = os.fork()
        if child == 0:
            arm()
            try:
                pruner_of(run, root / name).prune()
            except CheckpointError as error:
                print(f"{name}: {error}", flush=True)
                os._exit(3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        halves = sorted(path.name for path in (root / name).glob(f"*{shards.HALF}"))
        print(f"{name} left {halves}")
        print(
            f"{name} ended by {-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)}", flush=True
        )


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    main(Path(sys.argv[1]))
