# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a model costs before it runs, and which implementation of its operations will run."""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_mamba_ssm_available

from ..calibration.seam import replaced_scan
from ..errors import ConfigurationError
from ..families import family_of
from ..ops.backend import scan_backend, use_triton
from .benchmark_report import ModelFacts
from .decoding import cache_of, prefill, states_of


SCANS = ("auto", "library", "transformers")


def probe_cache(model: PreTrainedModel, scan: str) -> Any:
    """The cache of one short sequence, as the model makes it. Needs eval mode and gradients off."""
    device = model.get_input_embeddings().weight.device
    with scan_in_use(model, scan):
        return cache_of(prefill(model, torch.zeros(1, 4, dtype=torch.long, device=device)))[1]


def model_facts(name: str, model: PreTrainedModel, cache: Any, files: int | None, scan: str) -> ModelFacts:
    """Sizes and implementations.

    Args:
        name (`str`): the model's name in the report.
        model (`PreTrainedModel`): the model.
        cache: what `probe_cache` gave for it; the state's bytes are read off it.
        files (`int`, *optional*): bytes of its weight files; by default the parameters in memory are counted.
        scan (`str`): which scan will run, as in `benchmark`.
    """
    recurrent, conv = (sum(state.numel() * state.element_size() for state in states) for states in states_of(cache))
    functions = vars(_modelling_module(model))
    return ModelFacts(
        name=name,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=parameter_bytes(model) if files is None else files,
        weight_source="parameters in memory" if files is None else "files",
        recurrent_state_bytes=recurrent,
        conv_state_bytes=conv,
        scan=_scan_name(model, cache) if _is_ours(model, scan) else implementation(functions[family_of(model).scan]),
        conv=implementation(functions["causal_conv1d_update"]),
        state_update=implementation(next(f for n, f in functions.items() if n.endswith("selective_state_update"))),
    )


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in memory, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def scan_in_use(model: PreTrainedModel, scan: str) -> AbstractContextManager[Any]:
    """A context in which the model's full-sequence forward runs the scan that `benchmark` was asked for."""
    return replaced_scan(family_of(model), model) if _is_ours(model, scan) else nullcontext()


def check_scan(scan: str, device: torch.device) -> None:
    """Refuse a scan that is unknown or cannot be chosen on this device."""
    if scan not in SCANS:
        raise ConfigurationError(f"scan={scan!r} is not one of {', '.join(SCANS)}")
    if scan == "library" and device.type == "cuda" and is_mamba_ssm_available():
        raise ConfigurationError("scan='library' cannot be measured where mamba_ssm is installed: its kernel is taken")


def implementation(function: Any) -> str:
    """The package whose code runs behind one of transformers' functions that fall back to torch."""
    closure = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    package = getattr(closure.get("implementation"), "__module__", None)
    if package is None:
        return f"chosen by the kernels package ({type(function).__name__})"
    package = package.partition(".")[0]
    return "torch fallback of transformers" if package == "transformers" else package


def _scan_name(model: PreTrainedModel, cache: Any) -> str:
    """This library's scan, with the backend that it takes for this model."""
    weight = next(model.parameters())
    largest = max(state.shape[-1] for state in states_of(cache)[0])
    if family_of(model).recurrence == "mamba":
        backend = scan_backend(weight, largest)
    else:
        backend = "triton" if use_triton(weight, largest) else "torch"
    return f"optimum_ssm ({'Triton' if backend == 'triton' else backend})"


def _is_ours(model: PreTrainedModel, scan: str) -> bool:
    fused = model.get_input_embeddings().weight.is_cuda and is_mamba_ssm_available()
    return scan == "library" or (scan == "auto" and not fused)


def _modelling_module(model: PreTrainedModel) -> Any:
    family = family_of(model)
    mixer = next(mixer for _, block in family.blocks(model) if (mixer := family.mixer(block)) is not None)
    return sys.modules[type(mixer).__module__]
