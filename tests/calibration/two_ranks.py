# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""One process of the two that `test_ranks.py` starts, and what both it and a single process do."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optimum_ssm import SSMPruner, SSMPrunerConfig, evaluate_perplexity, register_method
from optimum_ssm.calibration import placement
from optimum_ssm.calibration.ranks import current_ranks
from optimum_ssm.errors import CalibrationError, CheckpointError, ConfigurationError
from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.passes import pipeline
from optimum_ssm.passes.dropping import _Search
from tests.conftest import VOCABULARY, tiny_model


LENGTH = 16
ALL = ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {  # family, calibration blocks, config
    "wanda": ("mamba", 5, {"method": "wanda", "targets": ["in_proj", "out_proj"], "allocation": "owl"}),
    "sparsegpt": ("mamba", 6, {"method": "sparsegpt", "targets": ALL}),
    "batches": ("mamba", 7, {"method": "sparsessm", "targets": [*ALL, "A_log"], "batch_size": 2}),
    "batches of heads": ("mamba2", 6, {"method": "sparsessm", "targets": ["in_proj", "out_proj", "A_log"],
                                       "batch_size": 3}),
    "sparsessm": ("mamba", 7, {"method": "sparsessm", "targets": [*ALL, "A_log"]}),
    "votes": ("mamba", 4, {"method": "sparsessm", "targets": ["A_log"], "method_kwargs": {"variant": "v1"}}),
    "weighted": ("mamba", 4, {"method": "sparsessm", "targets": ["A_log"], "method_kwargs": {"variant": "v2"}}),
    "state_energy": ("mamba2", 5, {"method": "state_energy", "uniform_sizes": False, "multiple_of": 1,
                                   "compensation": "least_squares"}),
    "heads": ("mamba2", 3, {"method": "magnitude", "axis": "head", "multiple_of": 2, "norm_rescale": "energy",
                                   "compensation": "bias"}),
    "minitron": ("mamba2", 4, {"method": "minitron", "axis": "head", "multiple_of": 2}),
    "merge": ("mamba2", 4, {"method": "merge", "compensation": "bias"}),
    "block_drop": ("mamba", 4, {"method": "block_drop"}),
    "gradient_magnitude": ("mamba", 5, {"method": "gradient_magnitude", "targets": ["in_proj"], "batch_size": 2}),
    "reconstruction": ("mamba", 8, {"method": "wanda", "targets": ["in_proj"], "reconstruction_epochs": 2,
                                    "batch_size": 4}),
}  # fmt: skip


@dataclass
class Refuses(Magnitude):
    """Cannot score one weight of a block, of which one process takes care."""

    def score(self, weight: Tensor, *args: Any) -> Tensor:
        if weight.shape[0] == 32:
            raise ValueError("no score for this one")
        return super().score(weight, *args)


def ids_of(samples: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(3))


def pruner_of(name: str, **changes: Any) -> SSMPruner:
    """The model of a run, not pruned yet."""
    family, samples, options = RUNS[name]
    common = {"sparsity": 0.5, "seq_len": LENGTH, "num_samples": samples, "batch_size": 8, "dataset": ids_of(samples)}
    config = SSMPrunerConfig(**{**common, **options, **changes})
    model = tiny_model(family, num_hidden_layers=3 if name == "block_drop" else 2)
    gpu = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    return SSMPruner(model.to(current_ranks().wire or gpu), pruning_config=config)


def held(name: str) -> dict[str, Any]:
    """What a process holds after a run, and the statistics that its first block was pruned by."""
    statistics: dict[str, Tensor] = {}
    apply_tasks = pipeline.apply_tasks

    def seen(work: Any, place: Any, tasks: Any, values: Any, ranks: Any) -> list:
        if not statistics:
            found = {f"{work.label(t)} {n}": value.cpu().clone() for t in tasks for n, value in values[t].items()}
            statistics.update(found)
            for gradients in work.gradients.values() if hasattr(work, "gradients") else ():
                statistics.update({f"{len(statistics)} {n}": value.cpu().clone() for n, value in gradients.items()})
        return apply_tasks(work, place, tasks, values, ranks)

    pipeline.apply_tasks = seen
    try:
        pruner = pruner_of(name)
        report = pruner.prune()
    finally:
        pipeline.apply_tasks = apply_tasks
    return {
        "statistics": statistics,
        "masks": pruner.masks,
        "weights": {name: parameter.detach().cpu() for name, parameter in pruner.model.named_parameters()},
        "errors": [row.error for row in report.rows if row.error is not None] + report.passes[-1].block_errors,
        "units": {key: value for key, value in report.passes[-1].units.items() if key != "scores"},
        "scores": report.passes[-1].units.get("scores"),
        "tokens": report.passes[-1].tokens,
        "perplexity": evaluate_perplexity(pruner.model, ids_of(9).flatten(), window=LENGTH, batch_size=2),
    }


def resumed_search(folder: Path) -> dict[str, Any]:
    """What a process holds of `block_drop` that ended with its first round and goes on."""
    measure, asked = _Search._scores, []

    def once(search: _Search, left: list[int]) -> list[float]:
        asked.append(left)
        if len(asked) == 2:
            raise CalibrationError("stop")
        return measure(search, left)

    _Search._scores = once
    try:
        stopped = message(pruner_of("block_drop", resume_from=str(folder)).prune)
        pruner = pruner_of("block_drop", resume_from=str(folder))
        report = pruner.prune()
    finally:
        _Search._scores = measure
    weights = {name: parameter.detach().cpu() for name, parameter in pruner.model.named_parameters()}
    return {"stopped": stopped, "rounds": asked, "units": report.passes[-1].units, "weights": weights}


def infinite_on_one(name: str) -> SSMPruner:
    """A run whose activations overflow in the second process only, at a token that only its part of the text holds."""
    ids = ids_of(4) % (VOCABULARY - 1)
    ids[1::2, 3] = VOCABULARY - 1
    pruner = pruner_of(name, dataset=ids, num_samples=4, batch_size=1)
    pruner.model.get_input_embeddings().weight.data[-1] = torch.inf
    return pruner


def without_room(name: str, rank: int) -> Any:
    """A run for whose activations the second process alone finds no room."""

    def run() -> None:
        choose = placement.choose_place

        def full(*args: Any) -> Any:
            if rank == 1:
                raise CalibrationError("no room here")
            return choose(*args)

        placement.choose_place = full
        try:
            pruner_of(name).prune()
        finally:
            placement.choose_place = choose

    return run


def message(function: Any) -> str:
    try:
        function()
    except (CalibrationError, CheckpointError, ConfigurationError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: Path) -> None:
    """Everything, and down on disk what this process holds of it."""
    ranks = current_ranks()
    found: dict[str, Any] = {name: held(name) for name in RUNS}
    found["count"] = ranks.count
    found["few"] = message(lambda: pruner_of("wanda", dataset=ids_of(1)).prune())
    found["others"] = message(lambda: pruner_of("wanda", dataset=ids_of(4) // (1 + ranks.index)).prune())
    broken = pruner_of("wanda")
    if ranks.index == 1:
        broken.model.backbone.layers[0].mixer.D.data.mul_(2)
    found["models"] = message(broken.prune)
    register_method("refuses")(Refuses)
    found["solve"] = message(pruner_of("wanda", method="refuses", allocation=None).prune)

    found["room"] = [message(without_room(name, ranks.index)) for name in ("wanda", "block_drop")]
    found["forward"] = [message(infinite_on_one(name).prune) for name in ("wanda", "block_drop")]

    resumed = [pruner_of("sparsessm", resume_from=str(folder / "pieces")) for _ in range(2)]
    for pruner in resumed:
        pruner.prune()
    found["resumed"] = [{n: p.detach().cpu() for n, p in pruner.model.named_parameters()} for pruner in resumed]
    resumed[0].save_pretrained(folder / "saved")
    found["search resumed"] = resumed_search(folder / "rounds")
    found["saved there"] = (folder / "saved" / "model.safetensors").exists()
    found["save again"] = message(lambda: resumed[0].save_pretrained(folder / "saved"))
    torch.save(found, folder / f"rank{ranks.index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
