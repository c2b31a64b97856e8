# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sizes, speed and memory of models in one process: a dense one and what was cut out of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from .benchmark_facts import check_scan, model_facts, probe_cache
from .benchmark_report import BenchmarkReport, Measurement
from .benchmark_runs import Decode, Prefill, Run, free, take_turns
from .decoding import is_recurrent


PHASES = ("prefill", "decode")
# A recurrent state has the same size after any prompt, so decoding need not wait for a long one.
DECODE_PROMPT = 16


def benchmark(
    models: Mapping[str, PreTrainedModel] | Sequence[str | os.PathLike],
    batch_sizes: Sequence[int] = (1, 16, 128),
    prompt: int | Tensor | Sequence[int] = 2048,
    new_tokens: int = 128,
    repeats: int = 5,
    *,
    phases: Sequence[str] = PHASES,
    scan: str = "auto",
    cuda_graph: bool = True,
    device: str | torch.device | None = None,
    progress: Callable[[str], None] | None = None,
    **loading: Any,
) -> BenchmarkReport:
    """Parameters, bytes, state per sequence, peak memory and tokens per second of models, compared with the first one.

    All models are in memory at once and take turns. A cell for which the device's memory is too small says so and the
    others go on.

    Args:
        models (`Mapping[str, PreTrainedModel]` or `Sequence`): models in memory by name, all on one device, or Hub ids and
            directories to load. The first is the one that the others are compared with.
        batch_sizes (`Sequence[int]`): sequences per run.
        prompt (`int`, `Tensor` or `Sequence[int]`): tokens of a prompt, drawn at random with a fixed seed, or the token ids
            of one prompt, which every sequence of a batch gets.
        new_tokens (`int`): tokens to decode, one a step, by the most probable one. A recurrent state has the same size after
            any prompt, so decoding starts after the prompt's first 16 tokens.
        repeats (`int`): counted runs; one more before them warms up.
        phases (`Sequence[str]`): `"prefill"`, `"decode"` or both.
        scan (`str`): scan of the prefill. `"library"`: this library's; `"transformers"`: what transformers would run;
            `"auto"`: mamba_ssm's kernel where it is installed and the device is CUDA, else this library's.
        cuda_graph (`bool`): on CUDA, capture a decode step as a graph and replay it; otherwise every step is launched
            kernel by kernel, which hides what a smaller model gains at small batches.
        device (`str` or `torch.device`, *optional*): where to put models that are loaded; default CUDA where there is one.
            Models in memory stay where they are.
        progress (`Callable[[str], None]`, *optional*): called with a line about every finished cell.
        **loading: passed to `from_pretrained` for models that are loaded: `dtype`, `token`, …

    Returns:
        `BenchmarkReport`: one row per phase, batch size and model.

    Raises:
        ConfigurationError: a setting is out of range, the models are on several devices, a token id lies outside a
            vocabulary, or a model's family is not supported.
        CheckpointError: a model cannot be loaded.
    """
    _check(models, batch_sizes, prompt, new_tokens, repeats, phases)
    if not isinstance(models, Mapping):
        device = _device(device)
        check_scan(scan, device)
        models, files = _load(models, device, loading)
    else:
        files = {}
        device = _common_device(models)
        check_scan(scan, device)
    ids = _prompts(models, prompt, max(batch_sizes)).to(device)
    rows: list[Measurement] = []
    with _evaluating(models.values()):
        caches = {name: probe_cache(model, scan) for name, model in models.items()}
        facts = [model_facts(name, model, caches[name], files.get(name), scan) for name, model in models.items()]
        recurrent = all(is_recurrent(cache) for cache in caches.values())
        del caches
        decode_ids = ids[:, :DECODE_PROMPT] if recurrent else ids
        graph = cuda_graph and device.type == "cuda" and recurrent
        for phase in phases:
            for batch_size in batch_sizes:
                runs: dict[str, Run]
                if phase == "prefill":
                    runs = {name: Prefill(model, ids[:batch_size], scan) for name, model in models.items()}
                else:
                    starts = decode_ids[:batch_size]
                    runs = {name: Decode(model, starts, scan, new_tokens, graph) for name, model in models.items()}
                rows += (found := take_turns(runs, phase, batch_size, repeats, device))
                del runs
                free(device)
                for row in found if progress is not None else ():
                    progress(_line(row))
    settings = {
        "prompt_length": ids.shape[1],
        "decode_prompt_length": decode_ids.shape[1],
        "new_tokens": new_tokens,
        "repeats": repeats,
        "scan": scan,
        "cuda_graph": graph,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return BenchmarkReport(facts, rows, settings)


def _check(models: Any, batch_sizes: Any, prompt: Any, new_tokens: int, repeats: int, phases: Any) -> None:
    if not models or isinstance(models, (str, os.PathLike)):
        raise ConfigurationError(f"models must name at least one model, by a mapping or a list; got {models!r}")
    for name, values in (("batch_sizes", batch_sizes), ("new_tokens", [new_tokens]), ("repeats", [repeats])):
        if not values or any(not isinstance(value, int) or value < 1 for value in values):
            raise ConfigurationError(f"{name} must be whole numbers of at least 1; got {values}")
    if isinstance(prompt, int) and prompt < 1:
        raise ConfigurationError(f"prompt={prompt} must be at least 1 token")
    if not phases or any(phase not in PHASES for phase in phases):
        raise ConfigurationError(f"phases={list(phases)} must be some of {', '.join(PHASES)}")


def _load(
    sources: Sequence[str | os.PathLike], device: torch.device, loading: dict[str, Any]
) -> tuple[dict[str, PreTrainedModel], dict[str, int | None]]:
    """Models and bytes of their files by a short name; a source that is not there is found before any is loaded."""
    from ..hub.checkpoint import LOCATION, load_model, read_json  # not needed for models in memory
    from ..hub.weight_files import file_bytes
    from ..report_rows import origin

    location = {name: loading[name] for name in LOCATION if name in loading}
    for source in sources:
        if read_json(source, "config.json", location) is None:
            raise CheckpointError(f"{source} has no config.json, as a directory or on the Hub")
    models, files = {}, {}
    for source in sources:
        short = origin(os.fspath(source))
        name = short if short not in models else f"{short} ({len(models) + 1})"
        models[name] = load_model(source, **loading)[0].to(device)
        files[name] = file_bytes(source)
    return models, files


def _device(name: str | torch.device | None) -> torch.device:
    """The device of that name, if models can be put there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigurationError(f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _common_device(models: Mapping[str, PreTrainedModel]) -> torch.device:
    devices = {parameter.device for model in models.values() for parameter in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ConfigurationError(f"models must be on one device to be compared; they are on {found}")
    return devices.pop()


def _prompts(models: Mapping[str, PreTrainedModel], prompt: int | Tensor | Sequence[int], batch: int) -> Tensor:
    """Token ids that every model knows, int64, (batch, length)."""
    vocabulary = min(model.get_input_embeddings().weight.shape[0] for model in models.values())
    if isinstance(prompt, int):
        return torch.randint(0, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    ids = torch.as_tensor(prompt).reshape(-1)
    if not len(ids) or ids.is_floating_point():
        raise ConfigurationError("prompt must be a length or the token ids of one prompt")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ConfigurationError(
            f"token id {low if low < 0 else high} lies outside the smallest vocabulary of {vocabulary}"
        )
    return ids.long().cpu().expand(batch, -1)


@contextmanager
def _evaluating(models: Iterable[PreTrainedModel]) -> Iterator[None]:
    """eval mode without gradients; the modes are as they were at exit."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _line(row: Measurement) -> str:
    found = row.to_dict()
    speed = row.status if found["tokens_per_second"] is None else f"{found['tokens_per_second']:,.1f} tokens/s"
    ratio = "" if found["ratio"] is None else f", x {found['ratio']:.2f}"
    return f"{row.phase}, batch {row.batch_size}, {row.model}: {speed}{ratio}"
