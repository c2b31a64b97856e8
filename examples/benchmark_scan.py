# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How fast is our selective scan alone, and what do calibration statistics cost in it?

All cases run in one process and take turns, round after round, so that a slow phase of the machine hits all of them;
ratios are taken inside a round. The control for the statistics is the plain way to get them, which published
calibration code follows: scan step by step, keep every state in a list, and reduce the list.

    python examples/benchmark_scan.py --rounds 10
    OMP_WAIT_POLICY=PASSIVE python examples/benchmark_scan.py    # where other programs share the cores

On a GPU it times the scans of both recurrences: in torch, in Triton without and with sums, and mamba_ssm's own kernels
where they are installed, beside the least time that their bytes and their operations take.

    python examples/benchmark_scan.py --width 2560 --batch 8 --dtype bfloat16 --rounds 20

`benchmark_block.py` times a whole block.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_block import (
    BASELINE,
    FALLBACK,
    backends,
    block_parser,
    describe_run,
    make_block,
    measure,
    our_scan,
    print_table,
    run_block,
)

from optimum_ssm.ops import state_space_dual as mamba2_scan
from optimum_ssm.ops.selective_scan import SCAN_SUMS, allocate_sums, selective_scan


TIME_INDEXED = ("state_prev", "decay_sum")
CONTROL = "every state kept + state_prev, decay_sum"


def parse_arguments() -> argparse.Namespace:
    parser = block_parser(__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default cuda, where there is a GPU")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="GPU only")
    parser.add_argument("--head-dim", type=int, default=64, help="P of Mamba-2, GPU only")
    parser.add_argument("--mamba2-state-size", type=int, default=128, help="N of Mamba-2, GPU only")
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


def build_cases(args: tuple, kwargs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Every case by its label, all with the arguments of one call."""
    sizes = {"channels": args[0].shape[1], "state_size": args[2].shape[1], "length": args[0].shape[2]}

    def with_sums(backend: str, *names: str) -> Callable[..., Any]:
        sums = allocate_sums(names, **sizes)
        return lambda *args, **kwargs: our_scan(*args, sums=sums, backend=backend, **kwargs)

    scans: dict[str, Callable[..., Any]] = {BASELINE: FALLBACK}
    for backend in backends():
        scans[backend] = with_sums(backend)
        scans[f"{backend} + decay_error"] = with_sums(backend, "decay_error")
        scans[f"{backend} + state_prev, decay_sum"] = with_sums(backend, *TIME_INDEXED)
        scans[f"{backend} + every sum"] = with_sums(backend, *SCAN_SUMS)
    scans[CONTROL] = keep_every_state
    check_control(args, kwargs, allocate_sums(TIME_INDEXED, **sizes))
    return {name: lambda scan=scan: scan(*args, **kwargs) for name, scan in scans.items()}


def check_control(args: tuple, kwargs: dict[str, Any], sums: dict[str, torch.Tensor]) -> None:
    """The control must compute what it is a control for."""
    expected_y, expected_sums = keep_every_state(*args, **kwargs)
    for ours, control in [(our_scan(*args, sums=sums, **kwargs), expected_y)] + [
        (sums[name], expected_sums[name]) for name in TIME_INDEXED
    ]:
        if (ours - control).abs().max() > 1e-4 * control.abs().max():
            raise RuntimeError("the control and our scan disagree: their times cannot be compared")


@dataclass
class Call:
    """One way to run a scan on the GPU, with what it has to move and to compute.

    `operations` counts multiply-adds, and other operations of the same units, per state and step; `exponentials` those
    of the special function units, which are an eighth as many.
    """

    label: str
    run: Callable[[], torch.Tensor]
    bytes: int
    operations: int
    exponentials: int = 0


def mamba_calls(arguments: argparse.Namespace) -> tuple[list[Call], int]:
    """The Mamba-1 scans, the first one in torch, and the number of their states times steps."""
    batch, length, states, channels = arguments.batch, arguments.tokens, arguments.state_size, 2 * arguments.width
    dtype = getattr(torch, arguments.dtype)
    x, dt = (torch.randn(batch, channels, length, device="cuda", dtype=dtype) for _ in range(2))
    z = torch.randn(batch, length, 2 * channels, device="cuda", dtype=dtype)[..., channels:].transpose(1, 2)
    maps = torch.randn(batch, length, 2 * states, device="cuda", dtype=dtype).transpose(1, 2)
    A = -torch.arange(1.0, states + 1, device="cuda").repeat(channels, 1)
    args = (x, dt, A, maps[:, :states], maps[:, states:])
    vectors = {"D": torch.ones(channels, device="cuda"), "delta_bias": torch.full((channels,), -4.0, device="cuda")}
    options = {**vectors, "z": z, "delta_softplus": True}
    moved = x.element_size() * batch * length * (4 * channels + 2 * states)

    def call(backend: str, *names: str, operations: int = 0, more: int = 0) -> Call:
        sums = allocate_sums(names, channels=channels, state_size=states, length=length, device="cuda")
        scan = partial(selective_scan, *args, **options, sums=sums, backend=backend)
        return Call(", ".join((f"Mamba, {backend}", *names)), scan, moved + more, 6 + operations, 1)

    indexed = 2 * 4 * batch * length * states * channels  # every element is read and written, for every sequence
    calls = [
        call("torch"),
        call("torch", "decay_error", operations=2),
        call("triton"),
        call("triton", "decay_error", operations=2),
        call("triton", "decay_error", "state_energy", operations=3),
        call("triton", *TIME_INDEXED, operations=3, more=2 * indexed),
    ]
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        print("mamba_ssm is not installed: its kernels are not timed")
    else:
        calls.append(Call("Mamba, mamba_ssm", partial(selective_scan_fn, *args, **options), moved, 6, 1))
    return calls, batch * length * channels * states


def mamba2_calls(arguments: argparse.Namespace) -> tuple[list[Call], int]:
    """The Mamba-2 scans of one group, the first one in torch, and the number of their states times steps."""
    batch, length, states, rows = arguments.batch, arguments.tokens, arguments.mamba2_state_size, arguments.head_dim
    heads, dtype = 2 * arguments.width // rows, getattr(torch, arguments.dtype)
    inner = heads * rows
    mixed = torch.randn(batch, inner + 2 * states, length, device="cuda", dtype=dtype).transpose(1, 2)
    x, B, C = mixed.split([inner, states, states], dim=-1)
    dt = torch.randn(batch, length, heads, device="cuda", dtype=dtype)
    A = -torch.linspace(1, 16, heads, device="cuda")
    args = (x.unflatten(-1, (heads, rows)), dt, A, B.unsqueeze(2), C.unsqueeze(2))
    options = {"D": torch.ones(heads, device="cuda"), "dt_bias": torch.full((heads,), -4.0, device="cuda")}
    options["dt_softplus"] = True
    moved = batch * length * (x.element_size() * (inner + 2 * states) + 4 * inner)

    def call(backend: str, *names: str) -> Call:
        sums = mamba2_scan.allocate_sums(names, heads=heads, state_size=states, device="cuda")
        scan = partial(mamba2_scan.state_space_dual, *args, **options, sums=sums, backend=backend, chunk_size=128)
        return Call(", ".join((f"Mamba-2, {backend}", *names)), scan, moved, 3 + bool(names))

    both = ("decay_error", "state_energy")
    calls = [call("torch"), call("torch", *both), call("triton"), call("triton", *both)]
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        pass  # said once, for Mamba
    else:
        contiguous = [tensor.contiguous() for tensor in args]
        calls.append(
            Call("Mamba-2, mamba_ssm", partial(mamba_chunk_scan_combined, *contiguous, 256, **options), moved, 3)
        )
    return calls, batch * length * inner * states


def time_on_gpu(calls: list[Call], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call in every round; the calls take turns, and two rounds that are not kept compile."""
    times: dict[str, list[float]] = {call.label: [] for call in calls}
    for _ in range(rounds + 2):
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            call.run()
            end.record()
            torch.cuda.synchronize()
            times[call.label].append(start.elapsed_time(end))
    return {label: values[2:] for label, values in times.items()}


def bytes_per_millisecond() -> float:
    """What a copy of 1 GiB inside the GPU's memory reaches, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = Call("copy", lambda: target.copy_(source), 0, 0)
    return 2 * source.numel() / statistics.median(time_on_gpu([copy], 10)["copy"])


def main_on_gpu(arguments: argparse.Namespace) -> None:
    properties, bandwidth = torch.cuda.get_device_properties(0), bytes_per_millisecond()
    lanes = properties.multi_processor_count * 128 * properties.clock_rate  # kHz: operations per millisecond
    print(
        f"{properties.name}, copies at {bandwidth / 1e9:.2f} TB/s, {lanes / 1e9:.1f}e12 float32 operations/s at most"
    )
    print(f"width {arguments.width}, {arguments.tokens} tokens, batch {arguments.batch}, {arguments.dtype}\n")
    print(
        f"| {'scan':<42} | median ms | {'min':>7} | {'max':>7} | bytes ms | operations ms | times faster | difference |"
    )
    print(f"|{'-' * 44}|----------:|--------:|--------:|---------:|--------------:|-------------:|-----------:|")
    for calls, elements in (mamba_calls(arguments), mamba2_calls(arguments)):
        times = time_on_gpu(calls, arguments.rounds)
        expected = calls[0].run().float()
        for call in calls:
            values = times[call.label]
            middle = statistics.median(values)
            least = elements / lanes * max(call.operations, 8 * call.exponentials)
            faster = statistics.median(times[calls[0].label]) / middle
            difference = ((call.run().float() - expected).abs().max() / expected.abs().max()).item()
            print(
                f"| {call.label:<42} | {middle:>9.3f} | {min(values):>7.3f} | {max(values):>7.3f} | "
                f"{call.bytes / bandwidth:>8.3f} | {least:>13.3f} | {faster:>12.1f} | {difference:>10.1e} |"
            )


def main() -> None:
    arguments = parse_arguments()
    if (arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        torch.manual_seed(0)
        with torch.no_grad():
            main_on_gpu(arguments)
        return
    block, hidden_states = make_block(arguments)
    with torch.no_grad():
        times = measure(build_cases(*record_scan(block, hidden_states)), arguments.rounds)
    print(f"{describe_run(arguments, 'scan of a Mamba block')}\n")
    print_table(times, lambda label: CONTROL if all(name in label for name in TIME_INDEXED) else BASELINE)


if __name__ == "__main__":
    main()
