# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How much faster is a whole Mamba block with our selective scan in place of transformers', on a CPU?

All cases run in one process and take turns, round after round, so that a slow phase of the machine hits all of them;
ratios are taken inside a round. `benchmark_scan.py` times the scan alone.

    python examples/benchmark_block.py --rounds 10
    OMP_WAIT_POLICY=PASSIVE python examples/benchmark_block.py    # where other programs share the cores
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MambaConfig, MambaModel
from transformers.models.mamba import modeling_mamba

from optimum_ssm.ops.native_library import library_obstacle
from optimum_ssm.ops.selective_scan import allocate_sums, selective_scan


FALLBACK = getattr(modeling_mamba.mamba_selective_scan, "__wrapped__", modeling_mamba.mamba_selective_scan)
BASELINE = "transformers' fallback"


def block_parser(description: str) -> argparse.ArgumentParser:
    """The flags of a block and of how it is timed."""
    parser = argparse.ArgumentParser(
        description=description, epilog="Set OMP_WAIT_POLICY=PASSIVE where cores are shared."
    )
    parser.add_argument(
        "--width", type=int, default=768, help="hidden size of the block; its inner width is twice that"
    )
    parser.add_argument("--state-size", type=int, default=16, help="N")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence, L")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, help="torch threads; by default what torch chooses")
    return parser


def make_block(arguments: argparse.Namespace) -> tuple[torch.nn.Module, torch.Tensor]:
    """A block with random weights, and its inputs."""
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size = {"hidden_size": arguments.width, "state_size": arguments.state_size, "num_hidden_layers": 1}
    # Taken out of a model, because a block made alone keeps uninitialised memory in A_log and D.
    block = MambaModel(MambaConfig(**size, vocab_size=32)).eval().layers[0]
    return block, torch.randn(arguments.batch, arguments.tokens, arguments.width)


def run_block(block: torch.nn.Module, hidden_states: torch.Tensor, scan: Callable[..., Any]) -> torch.Tensor:
    """The block's output with `scan` in the place of transformers' module-level scan."""
    original = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = scan
    try:
        return block(hidden_states)
    finally:
        modeling_mamba.mamba_selective_scan = original


def our_scan(*args: Any, use_mambapy: bool = False, use_associative_scan: bool = False, **kwargs: Any) -> Any:
    """`selective_scan` as the block calls it: the two switches choose among transformers' own fallbacks."""
    return selective_scan(*args, **kwargs)


def backends() -> list[str]:
    """Those of our scan that run on this CPU."""
    obstacle = library_obstacle()
    if obstacle:
        print(f"the native scan is not timed: {obstacle}")
    return ["torch"] if obstacle else ["torch", "native"]


def build_cases(block: torch.nn.Module, hidden_states: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Every case by its label."""
    sizes = {"channels": block.mixer.intermediate_size, "state_size": block.mixer.ssm_state_size}

    def with_sums(backend: str, *names: str) -> Callable[..., Any]:
        sums = allocate_sums(names, **sizes, length=hidden_states.shape[1])
        return lambda *args, **kwargs: our_scan(*args, sums=sums, backend=backend, **kwargs)

    scans: dict[str, Callable[..., Any]] = {BASELINE: FALLBACK}
    for backend in backends():
        scans[backend] = with_sums(backend)
        scans[f"{backend} + decay_error"] = with_sums(backend, "decay_error")
    return {name: lambda scan=scan: run_block(block, hidden_states, scan) for name, scan in scans.items()}


def describe_difference(block: torch.nn.Module, hidden_states: torch.Tensor) -> str:
    """How far the block's output with our scan is from the one with transformers' scan."""
    expected = run_block(block, hidden_states, FALLBACK)
    difference = (run_block(block, hidden_states, our_scan) - expected).abs().max().item()
    largest = expected.abs().max().item()
    return (
        f"largest difference of the block's output: {difference:.1e}, {difference / largest:.1e} of the largest output"
    )


def measure(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every case in every round; the first round only warms up."""
    times: dict[str, list[float]] = {label: [] for label in cases}
    for _ in range(rounds + 1):
        for label, case in cases.items():
            start = time.perf_counter()
            case()
            times[label].append(1e3 * (time.perf_counter() - start))
    return {label: values[1:] for label, values in times.items()}


def print_table(times: dict[str, list[float]], baseline: Callable[[str], str] = lambda label: BASELINE) -> None:
    """Milliseconds by case, and how many times faster each is than the case that `baseline` names for it."""
    print(f"| {'case':<46} | {'median ms':>9} | {'min':>7} | {'max':>7} | {'times faster than':<26} |")
    print(f"|{'-' * 48}|{'-' * 10}:|{'-' * 8}:|{'-' * 8}:|{'-' * 28}|")
    for label, values in times.items():
        ratios = [slow / fast for slow, fast in zip(times[baseline(label)], values, strict=True)]
        name = "fallback" if baseline(label) == BASELINE else "the control"
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) {name}"
        ratio = "" if baseline(label) == label else ratio
        middle = statistics.median(values)
        print(f"| {label:<46} | {middle:>9.1f} | {min(values):>7.1f} | {max(values):>7.1f} | {ratio:<26} |")


def describe_run(arguments: argparse.Namespace, what: str = "Mamba block") -> str:
    """The machine, the sizes and the load."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
    ]
    cpu = models[0] if models else platform.processor() or platform.machine()
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
        f"{what}: width {arguments.width}, N = {arguments.state_size}, {arguments.tokens} tokens, "
        f"batch {arguments.batch}, float32, {arguments.rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    arguments = block_parser(__doc__.partition("\n\n")[0]).parse_args()
    block, hidden_states = make_block(arguments)
    with torch.no_grad():
        difference = describe_difference(block, hidden_states)
        times = measure(build_cases(block, hidden_states), arguments.rounds)
    print(f"{describe_run(arguments)}\n{difference}\n")
    print_table(times)


if __name__ == "__main__":
    main()
