# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The least time that a pruning pass can take on a machine: its operations and bytes over what the machine can do.

Operations are counted as a method needs them, not as this library does them. Matrix products of activations, Gram matrices
among them, run at the rate of the model's dtype; scans and the updates of solvers at that of exact float32; factorisations
at that of float64. Every tensor that has to cross the memory once is counted once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.activations import inference_state
from ..calibration.block_weights import BlockWeights
from ..families.base import Family


SCAN_OPERATIONS = 6  # per token, channel and state: exponent, decay, two for the input, two for the output
SUM_OPERATIONS = 3
SWEEPS = ("sparsegpt", "sparsessm")  # one inverse factor, then every column changes those on its right


@dataclass(frozen=True)
class Rates:
    """What a device does, measured.

    Args:
        matmul, exact, double (`float`): operations per second of products in the model's dtype, in float32 without TF32,
            and in float64.
        bandwidth (`float`): bytes per second of its memory, read and written.
        link (`float`): bytes per second from pinned main memory; the bandwidth again where there is no accelerator.
    """

    matmul: float
    exact: float
    double: float
    bandwidth: float
    link: float

    def __str__(self) -> str:
        return (
            f"matrix products {self.matmul / 1e12:.2f} Tflop/s, exact float32 {self.exact / 1e12:.2f}, float64 "
            f"{self.double / 1e12:.2f}; memory {self.bandwidth / 1e9:.1f} GB/s, link {self.link / 1e9:.1f} GB/s"
        )


@dataclass
class Cost:
    """Operations by kind, and bytes over the memory and over the link."""

    matmul: float = 0.0
    exact: float = 0.0
    double: float = 0.0
    bytes: float = 0.0
    link: float = 0.0

    def add(self, times: float = 1.0, **parts: float) -> None:
        """Add so much of each part, `times` times."""
        for name, value in parts.items():
            setattr(self, name, getattr(self, name) + times * value)

    def seconds(self, rates: Rates) -> float:
        """Each part at its rate, one after the other."""
        operations = self.matmul / rates.matmul + self.exact / rates.exact + self.double / rates.double
        return operations + self.bytes / rates.bandwidth + self.link / rates.link


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few runs of each kind; about a second on a GPU, a few on a CPU."""
    cuda = device.type == "cuda"
    with inference_state(nn.Module()):
        products = {
            kind: 2 * n**3 / _best(lambda a=_square(n, kind, device): a @ a, device)
            for kind, n in {dtype: 8192 if cuda else 512, torch.float32: 8192 if cuda else 512}.items()
        }
        n = 4096 if cuda else 384
        double = 2 * n**3 / _best(lambda a=_square(n, torch.float64, device): a @ a, device)
        source = torch.zeros(2**30 if cuda else 2**26, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bandwidth = link = 2 * source.numel() / _best(lambda: target.copy_(source), device)
        if cuda:
            host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
            link = host.numel() / _best(lambda: target[: host.numel()].copy_(host, non_blocking=True), device)
    return Rates(products[dtype], products[torch.float32], double, bandwidth, link)


def pass_bounds(model: nn.Module, family: Family, plan: Any, tokens: int, place: str) -> dict[str, Cost]:
    """The least cost of every phase of a pass over weights, by the names that `calibration.timing` knows.

    Args:
        model (`nn.Module`): before the pass.
        family (`Family`), plan (`Plan`): its description, and the pass.
        tokens (`int`): calibration tokens.
        place (`str`): where the activations are kept: `"device"`, `"cpu"` or `"disk"`.
    """
    costs = {
        name: Cost()
        for name in (
            "embedding", "forward", "convolution", "scan", "scan with sums", "statistics", "solve", "replay", "weights",
            "activations",
        )
    }  # fmt: skip
    hidden = model.get_input_embeddings().weight
    stream = tokens * hidden.shape[1] * (4 if getattr(model.config, "residual_in_fp32", False) else hidden.itemsize)
    costs["embedding"].add(bytes=2 * tokens * hidden.shape[1] * hidden.itemsize)
    work, weights = plan.work(model, {}, {}), BlockWeights(model, plan.config.device)
    planned = bool(any(work.planning_needs(task) is not None for tasks in work.tasks.values() for task in tasks))
    blocks = family.blocks(model)
    for index, (_, block) in enumerate(blocks[: None if planned else max(work.tasks) + 1]):
        tasks = work.tasks.get(index, [])
        passes = [work.needs(task) for task in tasks], [work.planning_needs(task) or {} for task in tasks]
        size = sum(parameter.nbytes for parameter in block.parameters())
        if weights.device is not None and weights.device != next(block.parameters()).device:
            costs["weights"].add(link=(3 if planned else 2) * size)
        _solve(costs["solve"], work, tasks, model, plan.config.method)
        if not tokens:
            continue
        for needs in passes[: 2 if planned else 1]:
            unique = {need for of_task in needs for need in of_task.values()}
            sums = sum(need.site.end == "scan" for need in unique)
            _forward(costs, "forward", family, block, tokens, stream, sums)
            for need in unique:
                if need.site.end != "scan":
                    _statistic(costs["statistics"], need, block, tokens)
            costs["activations"].add(link=2 * stream if place != "device" else 0)
        if tasks:
            _forward(costs, "replay", family, block, tokens, 2 * stream, 0)
            costs["activations"].add(link=3 * stream if place != "device" else 0)
    return {name: cost for name, cost in costs.items() if cost != Cost()}


def _forward(
    costs: dict[str, Cost], name: str, family: Family, block: nn.Module, tokens: int, stream: float, sums: int
) -> None:
    size = next(block.parameters()).itemsize
    for linear in (module for module in block.modules() if isinstance(module, nn.Linear)):
        rows, columns = linear.weight.shape
        costs[name].add(matmul=2 * tokens * rows * columns)
        costs[name].add(bytes=tokens * (rows + columns) * size + linear.weight.nbytes)
    costs[name].add(bytes=2 * stream)
    mixer = family.mixer(block)
    if mixer is None:
        return
    channels, inner = mixer.conv1d.weight.shape[0], block.get_submodule(family.output).weight.shape[1]
    entries, scan = family.state_elements(block)[0], costs["scan with sums" if sums else "scan"]
    costs["convolution"].add(bytes=2 * tokens * channels * size)
    scan.add(exact=tokens * entries * (SCAN_OPERATIONS + SUM_OPERATIONS * sums))
    scan.add(bytes=tokens * (channels + 3 * inner) * size)


def _statistic(cost: Cost, need: Any, block: nn.Module, tokens: int) -> None:
    module = block.get_submodule(need.site.module)
    columns = module.weight.shape[1] if need.site.end == "input" else module.weight.shape[0]
    if need.site.columns is not None:
        columns = need.site.columns[1] - need.site.columns[0]
    cost.add(bytes=tokens * columns * next(block.parameters()).itemsize)
    if need.statistic == "gram":
        cost.add(matmul=2 * tokens * columns**2)
    elif need.statistic == "conv_gram":
        cost.add(exact=2 * tokens * columns * need.taps**2)


def _solve(cost: Cost, work: Any, tasks: list, model: nn.Module, method: str) -> None:
    """Weights read and written; for the column sweep, one inverse factor per Gram matrix and the updates."""
    factored = set()
    for task in tasks:
        weight: Tensor = model.get_parameter(task.target.parameter)[task.target.rows]
        cost.add(bytes=2 * weight.numel() * weight.itemsize)
        grams = [need for need in work.needs(task).values() if need.statistic == "gram"]
        if grams and method in SWEEPS:
            rows, columns = weight.shape
            cost.add(exact=rows * columns**2)
            if grams[0] not in factored:
                cost.add(double=2 / 3 * columns**3)  # a Cholesky factor, and its inverse
                factored.add(grams[0])


def _square(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(n, n, device=device).to(dtype)


def _best(action: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
