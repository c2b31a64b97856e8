# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Masks that survive training: after every optimiser step, removed entries are set back to what a removed one holds.

Weight decay, momentum and gradients of a dense graph all move removed entries, so it is the write after the step that
counts. The gradient of a memoryless `A_log` entry is exactly 0, but weight decay moves that one too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigurationError
from ..families.matching import declared_targets


if TYPE_CHECKING:
    from ..pruner import SSMPruner


# What torch.compile and adapters put in the middle of a parameter's name.
INNER_WRAPPERS = ("_orig_mod.", "base_layer.")


class ModelMasks:
    """Masks of a model's parameters, each with the value that a removed entry holds.

    Args:
        model (`nn.Module`): holds the parameters; wrapped or not, see `parameters_by_name`.
        masks (`dict[str, Tensor]`): parameter name to bool mask of the parameter's shape, `True` = removed.
        fills (`dict[str, float | Tensor]`, *optional*): parameter name to the value of removed entries, 0 by default;
            a tensor of the parameter's shape where they differ.

    Raises:
        ConfigurationError: a name is not found, or a shape does not fit; sharded parameters are refused.
    """

    def __init__(
        self, model: nn.Module, masks: dict[str, Tensor], fills: dict[str, float | Tensor] | None = None
    ) -> None:
        self.masks = dict(masks)
        self.fills = {name: (fills or {}).get(name, 0.0) for name in masks}
        self.bind(model)

    def bind(self, model: nn.Module) -> None:
        """Work on the parameters of this model from now on. Raises as the constructor."""
        self.parameters = parameters_by_name(model, self.masks)
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor) or parameter.is_meta or parameter.shape != self.masks[name].shape:
                raise ConfigurationError(
                    f"{name} with a mask of shape {tuple(self.masks[name].shape)} is sharded, offloaded or of another "
                    f"shape {tuple(parameter.shape)}: train on one device or with plain data parallelism (DDP)"
                )

    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Set every removed entry to its fill.

        Args:
            model (`nn.Module`, *optional*): bind to this model first, such as one into which adapters were merged.
        """
        if model is not None:
            self.bind(model)
        for name, parameter in self.parameters.items():
            mask, fill = self._local(name)
            if isinstance(fill, Tensor):
                parameter.copy_(torch.where(mask, fill, parameter))
            else:
                parameter.masked_fill_(mask, fill)

    @torch.no_grad()
    def holding(self, name: str) -> int:
        """How many removed entries of a parameter hold their fill at this moment."""
        mask, fill = self._local(name)
        parameter = self.parameters[name]
        fill = torch.as_tensor(fill, dtype=parameter.dtype, device=parameter.device)  # rounded as it is when stored
        return int(((parameter == fill) & mask).count_nonzero())

    def sparsity(self) -> float:
        """Share of the masked parameters' entries that are removed and hold their fill at this moment."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(map(self.holding, self.masks)) / total if total else 0.0

    def _local(self, name: str) -> tuple[Tensor, float | Tensor]:
        """Mask and fill on the parameter's device, where they stay."""
        device = self.parameters[name].device
        self.masks[name] = self.masks[name].to(device)
        if isinstance(self.fills[name], Tensor):
            self.fills[name] = self.fills[name].to(self.parameters[name])
        return self.masks[name], self.fills[name]


class SparsityCallback(TrainerCallback):
    """Keeps removed entries removed while transformers' `Trainer` tunes the others. See `SSMPruner.sparsity_callback`.

    Works with weight decay, gradient accumulation, autocast, DDP and torch.compile. Adapters (LoRA) train beside the
    masked weights; merging them fills the zeros, so call `masks.apply(merged_model)` after that.

    Args:
        masks (`ModelMasks`): the masks; the Trainer's model is searched for the same parameter names.
    """

    def __init__(self, masks: ModelMasks) -> None:
        self.masks = masks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the parameters in the Trainer's model, which may be wrapped or another copy."""
        self.masks.apply(kwargs["model"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undo what the step did to removed entries."""
        self.masks.apply()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Once more: `load_best_model_at_end` may have brought weights from elsewhere."""
        self.masks.apply()


def parameters_by_name(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters of a model that may be wrapped (DDP, torch.compile, adapters) or be part of a larger one.

    A name fits a parameter that is called so, or else the only one whose qualified name ends with it.

    Raises:
        ConfigurationError: no parameter fits a name, or several do.
    """
    present: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        for wrapper in INNER_WRAPPERS:
            name = name.replace(wrapper, "")
        present[name] = parameter
    found = {}
    for name in names:
        hits = [name] if name in present else [known for known in present if known.endswith(f".{name}")]
        if len(hits) != 1:
            reason = f"several parameters end with it: {', '.join(hits)}" if hits else "it has no such parameter"
            raise ConfigurationError(f"{type(model).__name__} does not fit the mask of {name!r}: {reason}")
        found[name] = present[hits[0]]
    return found


def masks_of(pruner: SSMPruner) -> ModelMasks:
    """The masks that a pruner keeps, with their fills, bound to its model.

    Raises:
        ConfigurationError: nothing was removed.
    """
    if not pruner.masks:
        raise ConfigurationError("nothing was removed from the model yet: call prune() first")
    recurrent = {
        target.parameter for target in declared_targets(pruner.family, pruner.model) if target.weight.kind == "a_log"
    }
    known = {0.0 if config.a_log_fill == "zero" else float(config.memoryless_value) for config in pruner._done}
    common = next(iter(known)) if len(known) == 1 else None
    fills: dict[str, float | Tensor] = {}
    for name in recurrent & pruner.masks.keys():
        # Where passes had different fills, each entry keeps the value that it has.
        fills[name] = pruner.model.get_parameter(name).detach().clone() if common is None else common
    return ModelMasks(pruner.model, pruner.masks, fills)
