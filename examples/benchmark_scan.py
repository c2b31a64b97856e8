# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How much faster is our selective scan, alone, inside a Mamba block, and while it takes calibration statistics?

All cases run in one process and take turns, round after round, so that a slow phase of the machine hits all of them;
ratios are taken inside a round. The control for the statistics is the plain way to get them, which published
calibration code follows: scan step by step, keep every state in a list, and reduce the list.

    python examples/benchmark_scan.py --rounds 10
    OMP_WAIT_POLICY=PASSIVE python examples/benchmark_scan.py    # where other programs share the cores
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
import torch.nn.functional as F
import transformers
from transformers import MambaConfig, MambaModel
from transformers.models.mamba import modeling_mamba

from optimum_ssm.ops.selective_scan import SCAN_SUMS, allocate_sums, selective_scan


TIME_INDEXED = ("state_prev", "decay_sum")
FALLBACK = getattr(modeling_mamba.mamba_selective_scan, "__wrapped__", modeling_mamba.mamba_selective_scan)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="Set OMP_WAIT_POLICY=PASSIVE where cores are shared."
    )
    parser.add_argument(
        "--width", type=int, default=768, help="hidden size of the block; its inner width is twice that"
    )
    parser.add_argument("--state-size", type=int, default=16, help="N")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a sequence, L")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, help="torch threads; by default what torch chooses")
    return parser.parse_args()


def keep_every_state(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The control: y and the time-indexed sums of a scan that holds L states of [B, I, N]."""
    delta = F.softplus(dt + kwargs["delta_bias"][:, None])
    decay = torch.exp(delta.transpose(1, 2).unsqueeze(-1) * A)  # [B, L, I, N]
    added = (delta * x).transpose(1, 2).unsqueeze(-1) * B.transpose(1, 2).unsqueeze(2)
    states = [torch.zeros_like(added[:, 0])]
    for step in range(x.shape[2]):
        states.append(decay[:, step] * states[-1] + added[:, step])
    outputs = [(state @ C[:, :, step, None]).squeeze(-1) for step, state in enumerate(states[1:])]
    y = (torch.stack(outputs, dim=-1) + kwargs["D"][:, None] * x) * F.silu(kwargs["z"])
    sums = {"state_prev": torch.stack([state.square().sum(0) for state in states[:-1]]), "decay_sum": decay.sum(0)}
    return y, sums


def record_scan(block: torch.nn.Module, hidden_states: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with which the block calls its scan."""
    calls = []

    def recorder(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((args, kwargs))
        return FALLBACK(*args, **kwargs)

    run_block(block, hidden_states, recorder)
    return calls[0]


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


def build_cases(block: torch.nn.Module, hidden_states: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Every case by its label."""
    args, kwargs = record_scan(block, hidden_states)
    sizes = {"channels": args[0].shape[1], "state_size": args[2].shape[1], "length": args[0].shape[2]}

    def with_sums(*names: str) -> Callable[..., Any]:
        sums = allocate_sums(names, **sizes)
        return lambda *args, **kwargs: our_scan(*args, sums=sums, **kwargs)

    scans = {
        "transformers' fallback": FALLBACK,
        "ours": our_scan,
        "ours + decay_error": with_sums("decay_error"),
    }
    cases = {f"block, {name}": lambda scan=scan: run_block(block, hidden_states, scan) for name, scan in scans.items()}
    scans["ours + state_prev, decay_sum"] = with_sums(*TIME_INDEXED)
    scans["ours + every sum"] = with_sums(*SCAN_SUMS)
    scans["every state kept + state_prev, decay_sum"] = keep_every_state
    cases |= {f"scan, {name}": lambda scan=scan: scan(*args, **kwargs) for name, scan in scans.items()}
    check_control(args, kwargs, allocate_sums(TIME_INDEXED, **sizes))
    return cases


def describe_difference(block: torch.nn.Module, hidden_states: torch.Tensor) -> str:
    """How far the block's output with our scan is from the one with transformers' scan."""
    expected = run_block(block, hidden_states, FALLBACK)
    difference = (run_block(block, hidden_states, our_scan) - expected).abs().max().item()
    largest = expected.abs().max().item()
    return (
        f"largest difference of the block's output: {difference:.1e}, {difference / largest:.1e} of the largest output"
    )


def check_control(args: tuple, kwargs: dict[str, Any], sums: dict[str, torch.Tensor]) -> None:
    """The control must compute what it is a control for."""
    expected_y, expected_sums = keep_every_state(*args, **kwargs)
    for ours, control in [(our_scan(*args, sums=sums, **kwargs), expected_y)] + [
        (sums[name], expected_sums[name]) for name in TIME_INDEXED
    ]:
        if (ours - control).abs().max() > 1e-4 * control.abs().max():
            raise RuntimeError("the control and our scan disagree: their times cannot be compared")


def measure(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every case in every round; the first round only warms up."""
    times: dict[str, list[float]] = {label: [] for label in cases}
    for _ in range(rounds + 1):
        for label, case in cases.items():
            start = time.perf_counter()
            case()
            times[label].append(1e3 * (time.perf_counter() - start))
    return {label: values[1:] for label, values in times.items()}


def print_table(times: dict[str, list[float]]) -> None:
    print(f"| {'case':<46} | {'median ms':>9} | {'min':>7} | {'max':>7} | {'times faster than':<26} |")
    print(f"|{'-' * 48}|{'-' * 10}:|{'-' * 8}:|{'-' * 8}:|{'-' * 28}|")
    for label, values in times.items():
        kind = label.partition(",")[0]
        baseline = f"{kind}, transformers' fallback"
        if all(name in label for name in TIME_INDEXED):
            baseline = "scan, every state kept + state_prev, decay_sum"
        ratios = [slow / fast for slow, fast in zip(times[baseline], values, strict=True)]
        name = "the control" if "every state" in baseline else "fallback"
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) {name}"
        ratio = "" if baseline == label else ratio
        middle = statistics.median(values)
        print(f"| {label:<46} | {middle:>9.1f} | {min(values):>7.1f} | {max(values):>7.1f} | {ratio:<26} |")


def describe_machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
    ]
    cpu = models[0] if models else platform.processor() or platform.machine()
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def main() -> None:
    arguments = parse_arguments()
    transformers.logging.set_verbosity_error()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    size = {"hidden_size": arguments.width, "state_size": arguments.state_size, "num_hidden_layers": 1}
    # Taken out of a model, because a block made alone keeps uninitialised memory in A_log and D.
    block = MambaModel(MambaConfig(**size, vocab_size=32)).eval().layers[0]
    hidden_states = torch.randn(arguments.batch, arguments.tokens, arguments.width)
    with torch.no_grad():
        cases = build_cases(block, hidden_states)
        difference = describe_difference(block, hidden_states)
        times = measure(cases, arguments.rounds)
    print(describe_machine())
    print(
        f"Mamba block: width {arguments.width}, N = {arguments.state_size}, {arguments.tokens} tokens, "
        f"batch {arguments.batch}, float32, {arguments.rounds} rounds, load average {os.getloadavg()[0]:.1f}"
    )
    print(difference + "\n")
    print_table(times)


if __name__ == "__main__":
    main()
