# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Seconds per calibration sample of pruning A_log, against the plain way: a step-by-step scan that keeps every state.

Both do what a sequential calibration must: every block sees each sample twice, once to collect and once, pruned, to feed the
next block. The control runs transformers' modules with a scan that appends L states to a list and reduces the list, one sample at
a time, as published calibration code does. They take turns, round after round; ratios are taken inside a round.

    python examples/benchmark_calibration.py MODEL --rounds 3
    OMP_WAIT_POLICY=PASSIVE python examples/benchmark_calibration.py MODEL    # where other programs share the cores
"""

import argparse
import copy
import functools
import itertools
import os
import platform
import statistics
import time

import torch
from benchmark_scan import keep_every_state
from transformers import AutoModelForCausalLM
from transformers.models.mamba import modeling_mamba

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.ops import backend


def plain(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """The control: every block twice, sample by sample, its sums from a list of states."""
    totals: dict[str, torch.Tensor] = {}

    def scan(x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, **kwargs):
        y, sums = keep_every_state(x, dt, A, B, C, **kwargs)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0) + value
        return y

    original, modeling_mamba.mamba_selective_scan = modeling_mamba.mamba_selective_scan, scan
    try:
        with torch.no_grad():
            hidden = [model.backbone.embeddings(sample[None]) for sample in ids]
            for block in model.backbone.layers:
                totals.clear()
                for sample in hidden:
                    block(sample)
                hidden = [block(sample) for sample in hidden]
    finally:
        modeling_mamba.mamba_selective_scan = original


def ours(model: torch.nn.Module, ids: torch.Tensor, variant: str, scan: str = "auto") -> None:
    """This library's pass, statistics, pruning and replay, with its scan in torch or compiled."""
    os.environ[backend.VARIABLE] = scan
    config = SSMPrunerConfig(
        method="sparsessm", sparsity=0.5, targets=["A_log"], dataset=ids, num_samples=len(ids), seq_len=ids.shape[1],
        method_kwargs={"variant": variant},
    )  # fmt: skip
    SSMPruner(model).prune(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", help="directory or Hub id of a Mamba model")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that is not counted")
    parser.add_argument("--variants", nargs="+", default=["c2", "v2"], help="SparseSSM's forms of the saliency")
    parser.add_argument("--scans", nargs="+", default=["torch", "native"], help="backends of this library's scan")
    parser.add_argument("--threads", type=int, help="torch threads; by default what torch chooses")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = torch.randint(0, dense.config.vocab_size, (args.samples, args.tokens), generator=torch.manual_seed(0))
    seconds: dict[str, list[float]] = {}
    cases = {"plain": plain}
    for variant, scan in itertools.product(args.variants, args.scans):
        cases[f"{variant}, {scan}"] = functools.partial(ours, variant=variant, scan=scan)
    for turn in range(args.rounds + 1):
        for name, case in cases.items():
            model = copy.deepcopy(dense)
            start = time.perf_counter()
            case(model, ids)
            if turn:
                seconds.setdefault(name, []).append((time.perf_counter() - start) / args.samples)
    print(
        f"{args.samples} x {args.tokens} tokens, {torch.get_num_threads()} threads, {platform.processor() or 'CPU'}, "
        f"load average {os.getloadavg()[0]:.1f}"
    )
    print("| | s per sample | times faster than the plain scan |\n|---|---:|---:|")
    for name, taken in seconds.items():
        ratios = [base / own for base, own in zip(seconds["plain"], taken)]
        print(f"| {name} | {statistics.median(taken):.3f} | {statistics.median(ratios):.1f} |")


if __name__ == "__main__":
    main()
