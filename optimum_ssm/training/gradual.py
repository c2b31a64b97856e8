# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning while a model trains: one threshold over all targets, moved step by step along a schedule."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration import SSMPrunerConfig
from ..errors import CheckpointError, ConfigurationError
from ..passes.outcome import BlockOutcome, Outcome
from ..passes.plan import Plan
from ..report_rows import record_weights
from ..sparsity.schedule import SparsitySchedule
from ..sparsity.selection import round_half_up
from .masks import ModelMasks, masks_of
from .state import STATE_FILE, PruningState
from .threshold import GlobalThreshold, global_plan


if TYPE_CHECKING:
    from ..pruner import SSMPruner


class GradualPruningCallback(TrainerCallback):
    """Prunes a pruner's model while transformers' `Trainer` trains it (arXiv 2505.08299; schedule of 1710.01878).

    At the steps of the schedule, the lowest scores of *all* targets together go, as many as the schedule says to the
    entry; `A_log`, where it is a target, competes with the others. The score is the method's: for `gradient_magnitude`
    |W| times a power of the mean |gradient| since the last update, the gradient being the one that the optimiser gets
    (accumulated, reduced over the ranks, clipped). What is removed stays removed, also after the schedule has ended.

    Every checkpoint of the Trainer gets the state too, so `trainer.train(resume_from_checkpoint=…)` goes on in the
    middle of the schedule as if it had not stopped. When training is over, `finish()` hands the masks to the pruner.

    Args:
        pruner (`SSMPruner`): its model is, or is part of, the one that the Trainer trains. What it removed earlier
            stays removed and counts.
        config (`SSMPrunerConfig`): `method` (one that scores by the weight and its gradient: `gradient_magnitude`,
            `magnitude`), `targets`, `exclude`, `a_log_fill`, and `sparsity`, the final one.
        end_step, begin_step, update_every, initial, shape: as in `SparsitySchedule`.
        resume_from (`str` or `Path`, *optional*): the checkpoint that a resumed run reads its state from; by default
            the one of its step in the Trainer's `output_dir`.

    Raises:
        ConfigurationError: the config fits neither the model nor a single threshold, or the schedule is refused.

    Example:
        ```python
        config = SSMPrunerConfig(method="gradient_magnitude", sparsity=0.7)
        gradual = GradualPruningCallback(pruner, config, begin_step=50, end_step=400)
        Trainer(pruner.model, args, train_dataset=blocks, callbacks=[gradual]).train()
        gradual.finish()
        pruner.save_pretrained("sparse")
        ```
    """

    def __init__(
        self,
        pruner: SSMPruner,
        config: SSMPrunerConfig,
        *,
        end_step: int,
        begin_step: int = 0,
        update_every: int = 10,
        initial: float = 0.0,
        shape: str = "cubic",
        resume_from: str | Path | None = None,
    ) -> None:
        self.pruner, self.resume_from = pruner, resume_from
        self.plan = global_plan(pruner.model, pruner.family, config)
        self.schedule = SparsitySchedule(self.plan.config.sparsity, end_step, begin_step, initial, update_every, shape)
        self.masks = _masks_to_grow(pruner, self.plan)
        self.threshold = GlobalThreshold(self.plan, self.masks)
        self._started: float | None = None
        self._recorded = False
        if self.threshold.removed > self._goal:
            raise ConfigurationError(
                f"sparsity={self.schedule.final} removes {self._goal} of the targets' {self.threshold.size} entries, "
                f"but {self.threshold.removed} are removed already; give a higher sparsity"
            )

    @property
    def sparsity(self) -> float:
        """Share of the targets' entries that is removed so far."""
        return self.threshold.removed / self.threshold.size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the run fits the schedule, and take up the state where it is a resumed one."""
        if state.max_steps < self.schedule.end_step:
            raise ConfigurationError(
                f"the schedule ends at end_step={self.schedule.end_step}, but training at max_steps={state.max_steps}; "
                "train longer or give a smaller end_step"
            )
        if args.load_best_model_at_end or state.is_hyper_param_search:
            name = "load_best_model_at_end" if args.load_best_model_at_end else "a hyperparameter search"
            raise ConfigurationError(
                f"gradual pruning contradicts {name}: the best model may be one of lower sparsity"
            )
        self.masks.bind(kwargs["model"])
        for name in self.threshold.names:
            parameter = self.masks.parameters[name]
            if parameter is not self.pruner.model.get_parameter(name):
                raise ConfigurationError(f"the Trainer trains another {name} than the pruner's: pass it pruner.model")
            if not parameter.requires_grad:
                raise ConfigurationError(f"{name} is to be pruned while it trains, but it is frozen; exclude it")
        self.threshold.reset()
        if state.global_step:
            self._resume(Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}"), state)
        self.masks.apply()
        self._started, self._recorded = time.perf_counter(), False
        self.pruner._unfinished = f"{self.plan.config.method}, gradually: finish() was not called"

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add this step's gradients to the scores."""
        if self.threshold.needs_gradients and state.global_step < self.schedule.end_step:
            self.threshold.add_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the masks where the schedule says so, and undo what the step did to removed entries."""
        step = state.global_step + 1  # the Trainer counts it after this call
        if self.schedule.updates(step):
            count = round_half_up(self.schedule.sparsity(step) * self.threshold.size)
            if count > self.threshold.removed:
                self.threshold.remove(count)
            self.threshold.reset()
        self.masks.apply()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the state into the checkpoint that the Trainer has just written."""
        if args.should_save:
            tensors = self.masks.masks, self.threshold.sums
            current = PruningState(state.global_step, self.threshold.batches, self._settings, *tensors)
            current.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model masked, whatever other callbacks did after the last step."""
        self.masks.apply()

    def finish(self) -> None:
        """Hand masks and account to the pruner; its report names the method and the schedule from then on.

        Raises:
            CheckpointError: there was no training, or it ended before the schedule did.
        """
        if self._started is None or self.threshold.removed != self._goal:
            raise CheckpointError(
                f"training ended before the schedule did: {self.threshold.removed} entries are removed, and "
                f"{self._goal} are to be at end_step={self.schedule.end_step}; resume the training"
            )
        self.pruner._unfinished = None
        if self._recorded:
            return
        seconds, outcomes = time.perf_counter() - self._started, {}
        for task in self.plan.tasks:
            mask = self.threshold.mask(task).cpu().clone()
            outcomes.setdefault(task.target.block, []).append(Outcome(task.target, mask, None))
        blocks = [BlockOutcome(index, found, None, seconds) for index, found in outcomes.items()]
        record_weights(self.pruner.report, self.pruner.masks, self.plan, blocks, 0, seconds)
        self.pruner.report.passes[-1].config["schedule"] = dataclasses.asdict(self.schedule)
        self.pruner.report.perplexity.pop("pruned", None)  # it was that of a model which is no more
        self.pruner._done.append(self.plan.config)
        self._recorded = True

    @property
    def _goal(self) -> int:
        return round_half_up(self.schedule.final * self.threshold.size)

    @property
    def _settings(self) -> dict[str, Any]:
        """What must be the same in a run that goes on from a checkpoint of this one."""
        return {
            "method": self.plan.config.method,
            "method_kwargs": self.plan.config.method_kwargs,
            "targets": [task.target.label for task in self.plan.tasks],
            "fills": [self.plan.fill(task.target.weight.kind) for task in self.plan.tasks],
            "schedule": dataclasses.asdict(self.schedule),
        }

    def _resume(self, folder: Path, state: TrainerState) -> None:
        """Take up the state of a checkpoint that belongs to this run and to the weights that were loaded."""
        found = PruningState.load(folder)
        if found.step != state.global_step:
            raise CheckpointError(f"{STATE_FILE} in {folder} is of step {found.step}, not of step {state.global_step}")
        for name, value in self._settings.items():
            if found.settings.get(name) != value:
                raise CheckpointError(f"{folder} was written with {name}={found.settings.get(name)}, not {value}")
        if found.masks.keys() != self.masks.masks.keys():
            raise CheckpointError(f"{folder} holds masks of other parameters than this run")
        self.masks.masks.update(found.masks)
        for name, mask in found.masks.items():
            if self.masks.holding(name) != int(mask.count_nonzero()):
                raise CheckpointError(
                    f"{STATE_FILE} in {folder} does not belong to the loaded weights, where removed entries of {name} "
                    "are not removed; pass resume_from=… the checkpoint that the Trainer resumes from"
                )
        device = {name: self.masks.parameters[name].device for name in found.sums}
        self.threshold.sums = {name: value.to(device[name]) for name, value in found.sums.items()}
        self.threshold.batches = found.batches


def _masks_to_grow(pruner: SSMPruner, plan: Plan) -> ModelMasks:
    """The masks of earlier passes and empty ones for the targets, all of them copies."""
    earlier = masks_of(pruner) if pruner.masks else None
    masks = {name: mask.clone() for name, mask in earlier.masks.items()} if earlier else {}
    fills = dict(earlier.fills) if earlier else {}
    for task in plan.tasks:
        name, fill = task.target.parameter, plan.fill(task.target.weight.kind)
        if name not in masks:
            masks[name] = torch.zeros(pruner.model.get_parameter(name).shape, dtype=torch.bool)
        elif isinstance(fills[name], torch.Tensor) or fills[name] != fill:
            raise ConfigurationError(
                f"{name}: removed entries hold no {fill:g}, which a_log_fill={plan.config.a_log_fill!r} means; exclude it"
            )
        fills[name] = fill
    return ModelMasks(pruner.model, masks, fills)
