# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""One rank of the two that `test_gradual.py` starts."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from optimum_ssm import PruningReport, SSMPruner, SSMPrunerConfig
from optimum_ssm.sparsity.selection import round_half_up
from optimum_ssm.training import GradualPruningCallback
from tests.conftest import tiny_model
from tests.training.runs import train


class FirstGradient(TrainerCallback):
    """The rank's own gradient of the first micro-batch, which accumulation keeps from being reduced."""

    value: float | None = None

    def on_substep_end(self, args, state, control, **kwargs):
        if self.value is None:
            self.value = float(next(kwargs["model"].parameters()).grad.abs().sum())


def main(folder: Path) -> None:
    """Train with gradual pruning and write down what this rank holds at the end."""
    model = tiny_model("mamba")
    config = SSMPrunerConfig(method="gradient_magnitude", sparsity=0.7, targets=["in_proj", "out_proj", "A_log"])
    callback = GradualPruningCallback(SSMPruner(model), config, begin_step=1, end_step=6, update_every=2)
    first = FirstGradient()
    train(model, folder / "run", [callback, first], max_steps=8, ddp_backend="gloo", bf16=True)
    state = PartialState()
    assert state.num_processes == 2, state
    callback.finish()
    PruningReport.plot = lambda self, path: Path(path).write_bytes(b"no picture")  # drawing takes longer than the rest
    callback.pruner.save_pretrained(folder / "sparse")
    names = callback.threshold.names
    held = {
        "gradient": first.value,
        "masks": {name: callback.pruner.masks[name] for name in names},
        "weights": {name: model.get_parameter(name).detach() for name in names},
        "promised": round_half_up(0.7 * callback.threshold.size),
    }
    torch.save(held, folder / f"rank{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
