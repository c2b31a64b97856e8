# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of models that take turns in one process: a dense one and what was cut out of it.

A run of one model is followed by a run of the next, so that a slow phase of the machine hits all of them, and ratios are
taken between runs of the same round.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import CheckpointError, ConfigurationError
from ..hub.checkpoint import LOCATION, load_model, read_json
from ..report_rows import origin
from .benchmark_facts import check_scan, file_bytes, model_facts, parameter_bytes, scan_in_use
from .benchmark_report import OUT_OF_MEMORY, BenchmarkReport, Measurement
from .decoding import GreedyDecoder, cache_of, is_recurrent, prefill


PHASES = ("prefill", "decode")
# A recurrent state has the same size after any prompt, so decoding need not wait for a long one.
DECODE_PROMPT = 16
AGREEMENT_STEPS = 8


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
    _check(models, batch_sizes, new_tokens, repeats, phases)
    if not isinstance(models, Mapping):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        check_scan(scan, device)
        models, files = _load(models, device, loading)
    else:
        files = {}
        device = _common_device(models)
        check_scan(scan, device)
    ids = _prompts(models, prompt, max(batch_sizes)).to(device)
    rows: list[Measurement] = []
    with _evaluating(models.values()):
        facts = [model_facts(name, model, files.get(name), scan) for name, model in models.items()]
        recurrent = all(is_recurrent(cache_of(prefill(model, ids[:1, :4]))[1]) for model in models.values())
        decode_ids = ids[:, :DECODE_PROMPT] if recurrent else ids
        graph = cuda_graph and device.type == "cuda" and recurrent
        for phase in phases:
            for batch_size in batch_sizes:
                runs: dict[str, _Run]
                if phase == "prefill":
                    runs = {name: _Prefill(model, ids[:batch_size], scan) for name, model in models.items()}
                else:
                    starts = decode_ids[:batch_size]
                    runs = {name: _Decode(model, starts, scan, new_tokens, graph) for name, model in models.items()}
                rows += (found := _take_turns(runs, phase, batch_size, repeats, device))
                del runs
                _free(device)
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


def _check(models: Any, batch_sizes: Any, new_tokens: int, repeats: int, phases: Any) -> None:
    if not models or isinstance(models, (str, os.PathLike)):
        raise ConfigurationError(f"models must name at least one model, by a mapping or a list; got {models!r}")
    for name, values in (("batch_sizes", batch_sizes), ("new_tokens", [new_tokens]), ("repeats", [repeats])):
        if not values or any(not isinstance(value, int) or value < 1 for value in values):
            raise ConfigurationError(f"{name} must be whole numbers of at least 1; got {values}")
    if not phases or any(phase not in PHASES for phase in phases):
        raise ConfigurationError(f"phases={list(phases)} must be some of {', '.join(PHASES)}")


def _load(
    sources: Sequence[str | os.PathLike], device: torch.device, loading: dict[str, Any]
) -> tuple[dict[str, PreTrainedModel], dict[str, int | None]]:
    """Models and bytes of their files by a short name; a source that is not there is found before any is loaded."""
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
        if prompt < 1:
            raise ConfigurationError(f"prompt={prompt} must be at least 1 token")
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


class _Run:
    """Something to time: `prepare` once, which gives the peak memory, then `__call__` as often as wanted."""

    tokens: int
    decode: str = ""
    agreement: float | None = None
    decoder: GreedyDecoder | None = None

    def prepare(self, device: torch.device) -> int | None:
        """Warm up; returns the bytes of the largest allocation, or `None` where that is not measured."""
        raise NotImplementedError

    def before(self) -> None:
        """What a timed run needs but is not part of it."""

    def __call__(self) -> None:
        raise NotImplementedError


class _Prefill(_Run):
    def __init__(self, model: PreTrainedModel, ids: Tensor, scan: str):
        self.model, self.ids, self.scan = model, ids, scan
        self.tokens = ids.numel()

    def prepare(self, device: torch.device) -> int | None:
        with _peak_memory(device, self.model) as peak:
            self()
        return peak[0]

    def __call__(self) -> None:
        with scan_in_use(self.model, self.scan):
            prefill(self.model, self.ids)


class _Decode(_Run):
    def __init__(self, model: PreTrainedModel, ids: Tensor, scan: str, new_tokens: int, graph: bool):
        self.model, self.ids, self.scan, self.new_tokens, self.graph = model, ids, scan, new_tokens, graph
        self.tokens = len(ids) * new_tokens
        self.decode = "CUDA graph" if graph else "eager"

    def prepare(self, device: torch.device) -> int | None:
        with scan_in_use(self.model, self.scan), _peak_memory(device, self.model) as peak:
            decoder = GreedyDecoder(self.model, self.ids)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)  # the short prompt is not what is asked for
            eager = decoder.run(AGREEMENT_STEPS)
        with scan_in_use(self.model, self.scan):
            if self.graph:
                decoder.capture()
                self.agreement = float((decoder.run(AGREEMENT_STEPS) == eager).float().mean())
        self.decoder = decoder
        self()
        return peak[0]

    def before(self) -> None:
        with scan_in_use(self.model, self.scan):
            self.decoder.restart()

    def __call__(self) -> None:
        self.decoder.run(self.new_tokens)


def _take_turns(
    runs: dict[str, _Run], phase: str, batch_size: int, repeats: int, device: torch.device
) -> list[Measurement]:
    """Warm up all runs, then time them round by round. One without enough memory drops out, the others go on."""
    rows = {name: Measurement(name, phase, batch_size, run.tokens, decode=run.decode) for name, run in runs.items()}
    alive = dict(runs)

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            rows[name].status = OUT_OF_MEMORY
            rows[name].seconds = []
            rows[name].peak_memory_bytes = None
            alive.pop(name).decoder = None  # the others may need its memory
        _free(device)
        return None

    for name, run in runs.items():
        rows[name].peak_memory_bytes = attempt(name, lambda run=run: run.prepare(device))
        rows[name].agreement = run.agreement
    for _ in range(repeats):
        for name, run in list(alive.items()):
            seconds = attempt(name, lambda run=run: _seconds(run, device))
            if seconds is not None:
                rows[name].seconds.append(seconds)
    first = next(iter(rows.values())).seconds
    for row in rows.values():
        row.ratios = [slow / fast for slow, fast in zip(first, row.seconds)]
    return list(rows.values())


def _seconds(run: _Run, device: torch.device) -> float:
    run.before()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _peak_memory(device: torch.device, model: PreTrainedModel) -> Iterator[list[int | None]]:
    """Bytes that a process with this model alone would hold at most: what is allocated inside, and the weights.

    Only torch's CUDA allocator can tell. The growth of a CPU process depends on what its allocator kept from earlier.
    """
    found: list[int | None] = [None]
    if device.type != "cuda":
        yield found
        return
    _free(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    _wait(device)
    found[0] = torch.cuda.max_memory_allocated(device) - before + parameter_bytes(model)


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Also where it ended something else, such as the capture of a graph."""
    while error is not None:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if any(said in text for said in ("can't allocate memory", "ALLOC_FAILED", "out of memory")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(row: Measurement) -> str:
    found = row.to_dict()
    speed = row.status if found["tokens_per_second"] is None else f"{found['tokens_per_second']:,.1f} tokens/s"
    ratio = "" if found["ratio"] is None else f", x {found['ratio']:.2f}"
    return f"{row.phase}, batch {row.batch_size}, {row.model}: {speed}{ratio}"
