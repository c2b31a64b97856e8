# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a model that accelerate has offloaded is asked: where it computes, what its values are, whether a pass can be done.

Such a model holds meta parameters: each module's hook brings the values in for a forward and drops them again, so what is
written into them is lost. How a block is pruned all the same is in `block_weights`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import ConfigurationError


logger = logging.get_logger(__name__)


def work_device(module: nn.Module) -> torch.device:
    """Where a module computes: of its parameters, or where its hook brings offloaded ones."""
    parameter = next(module.parameters())
    if not parameter.is_meta:
        return parameter.device
    for part in module.modules():
        if has_offloaded_params(part) and part._hf_hook.execution_device is not None:
            device = part._hf_hook.execution_device
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return parameter.device


def is_offloaded(model: nn.Module) -> bool:
    """Whether any parameter has no values at its place."""
    return any(parameter.is_meta for parameter in model.parameters())


def check_offload(model: nn.Module, plan: Any) -> None:
    """Refuse what cannot be done where the model is, before anything is; most of all if its parameters are offloaded.

    Args:
        model (`nn.Module`): the model.
        plan (`Plan`, `UnitPlan` or `DropPlan`): a pass over it.

    Raises:
        ConfigurationError: the device is not there, the pass needs the whole model at once, or a parameter has neither
            values nor a hook of accelerate that could bring them; it is named.
    """
    config = plan.config
    if config.device is not None and torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device={config.device!r}: torch sees no CUDA device here; leave device out")
    if config.max_memory is not None and not hasattr(model, "hf_device_map"):
        logger.warning("max_memory acts when SSMPruner.from_pretrained loads the model; this one was loaded without")
    if not is_offloaded(model):
        return
    if config.device is not None:
        logger.warning(f"device={config.device!r}: offloaded blocks go to the device that accelerate's hooks name")
    reasons = {
        f"method={config.method!r} takes gradients through the whole model": getattr(plan, "gradient_parameters", {}),
        "compensation='bias' adds parameters": config.compensation == "bias",
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigurationError(
                f"{reason}, which an offloaded model does not allow; load it without cpu or disk offload"
            )
    names = [task.target.parameter for task in plan.tasks if hasattr(task, "target")]
    names += [f"{t.name}.{part.parameter}" for t in plan.tasks if hasattr(t, "axis") for part in t.axis.owned]
    check_values(model, names)


def check_values(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse parameters that have no values and cannot get any.

    Args:
        model (`nn.Module`): the model.
        names (`Iterable[str]`): qualified names of parameters.

    Raises:
        ConfigurationError: one has neither values nor a hook of accelerate that could bring them; it is named.
    """
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if model.get_parameter(name).is_meta and not has_offloaded_params(module):
            raise ConfigurationError(
                f"{name} is offloaded, and no hook of accelerate brings its values; load the model with a device_map, or "
                "without offload"
            )


def read_parameter(model: nn.Module, name: str) -> Tensor:
    """The values of a parameter in main memory, also of an offloaded one; not to be written to."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if not getattr(module, leaf).is_meta:
        return getattr(module, leaf).detach().cpu()
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, leaf).detach().clone()


def tie_again(model: nn.Module) -> None:
    """Let tied parameters without values be one object again: hooks that bring values leave a new one in place of each.

    A tied tensor has one name in `named_parameters`, and the report and what a run depends on go by names: they must not
    differ with what was run before.
    """
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        path, _, leaf = target.rpartition(".")
        modules = model.get_submodule(path), model.get_submodule(source.rpartition(".")[0])
        if model.get_parameter(target) is model.get_parameter(source) or not all(map(has_offloaded_params, modules)):
            continue
        # transformers names some as tied that a checkpoint holds with values of their own
        if torch.equal(read_parameter(model, target), read_parameter(model, source)):
            setattr(modules[0], leaf, model.get_parameter(source))
