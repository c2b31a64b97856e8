# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for GPUs without one being there: the interpreter accepts more than the compiler does."""

import os
import subprocess
import sys

import pytest


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from optimum_ssm.ops import triton_causal_convolution as convolution, triton_chunk_scan as chunk
from optimum_ssm.ops import triton_column_sweep as sweep, triton_gated_norm as norm, triton_selective_scan as mamba, triton_state_space_dual as mamba2

def build(kernel, pointers, absent, ones, sizes, capability):
    constants = dict(sizes) | dict.fromkeys(absent) | dict.fromkeys(ones, 1)
    options = {{name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}}
    signature = {{
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }}
    source = ASTSource(kernel, signature, {{(kernel.arg_names.index(name),): v for name, v in constants.items()}})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert built.asm["cubin"], "no machine code"

{call}
"""
MAMBA = """
dtype, absent, ones, states, softplus, indexed = {case}
single = ("A", "B", "C", "D", "delta_bias", "last_state", "decay_error", "state_energy", "state_prev_total",
          "gate_energy", "state_prev", "decay_sum")
pointers = dict.fromkeys(("x", "dt", "z", "y"), dtype) | dict.fromkeys(single, "*fp32")
sizes = mamba.block_sizes(states, indexed) | {{"SOFTPLUS": softplus}}
for capability in (80, 90):
    build(mamba._scan_kernel, pointers, absent, ones, sizes, capability)
"""
MAMBA2 = """
import torch
dtype, absent, ones, states, head_dim = {case}
single = ("delta", "decay", "D", "initial_states", "y", "last_state", "decay_error", "state_energy")
pointers = dict.fromkeys(("x", "B", "C"), dtype) | dict.fromkeys(single, "*fp32")
sizes = mamba2.block_sizes(states, head_dim, 1, torch.device("cpu"))
for capability in (80, 90):
    build(mamba2._scan_kernel, pointers, absent, ones, sizes, capability)
"""
CHUNK = """
import triton.language as tl
from optimum_ssm.ops import triton_chunk_sums as sums
absent, ones, states, head_dim = {case}
steps = ("delta", "coarse", "fine")
single = (*steps, "delta_out", "coarse_out", "fine_out", "A", "D", "initial_states", "y", "last_state", "decay_error",
          "state_energy")
half = ("x", "B", "C", "squares_high", "squares_low")
pointers = dict.fromkeys(half, "*bf16") | dict.fromkeys(single, "*fp32")
for capability in (80, 90):
    for kernel, sizes in (
        (chunk._steps_kernel, {{"BLOCK_H": 32, "num_warps": 4}}),
        (chunk._chunk_kernel, chunk.block_sizes(states, head_dim) | {{"OPERAND": tl.bfloat16}}),
        (sums._sums_kernel, sums.block_sizes(states, head_dim) | {{"OPERAND": tl.bfloat16}}),
    ):
        sizes["T"] = chunk.CHUNK
        known = set(kernel.arg_names)
        build(kernel, pointers, known & set(absent), known & set(ones), sizes, capability)
"""
CONVOLUTION = """
dtype, absent, ones, silu = {case}
sizes = {{"SILU": silu, "BLOCK_L": 32, "BLOCK_C": 128, "TAPS": 4, "num_warps": 4}}
for capability in (80, 90):
    build(convolution._conv_kernel, dict.fromkeys(("x", "weight", "bias", "y"), dtype), absent, ones, sizes, capability)
"""
NORM = """
dtype, ones, group_size = {case}
sizes = {{"GROUP": group_size, "BLOCK": triton.next_power_of_2(group_size), "num_warps": norm.warps(group_size)}}
pointers = dict.fromkeys(("gate", "weight", "y"), dtype) | {{"x": "*fp32", "eps": "fp32"}}
for capability in (80, 90):
    build(norm._norm_kernel, pointers, (), ones, sizes, capability)
"""
SWEEP = """
ones, group, removed = {case}
pointers = {{"block": "*fp32", "factor": "*fp32", "errors": "*fp32", "dead": "*u8", "chosen": "*u8"}}
sizes = {{"GROUP": group, "REMOVED": removed, "BLOCK_R": sweep.BLOCK_R, "BLOCK_C": 128, "num_warps": 4}}
for capability in (80, 90):
    build(sweep._sweep_kernel, pointers, (), ones, sizes, capability)
"""
INDEXED = ("state_prev", "decay_sum")
SUMS = ("decay_error", "state_energy")
# Arguments that are 1 become constants, absent tensors drop their branch: both change what is compiled.
CASES = [
    (MAMBA, ("*fp32", (*INDEXED, "state_prev_total", "gate_energy"), ("x_step", "dt_step"), 16, True, False)),
    (MAMBA, ("*bf16", (), ("z_channel", "state_prev_channel"), 16, True, True)),
    (
        MAMBA,
        ("*fp16", ("z", "D", "delta_bias", *SUMS, *INDEXED, "state_prev_total", "gate_energy"), (), 5, False, False),
    ),
    (MAMBA, ("*fp32", INDEXED, ("length", "channels", "state_size", "x_step"), 1, True, False)),
    (MAMBA, ("*bf16", INDEXED, (), 200, True, False)),
    (MAMBA2, ("*fp32", (), ("x_step",), 128, 64)),
    (MAMBA2, ("*bf16", ("D", "initial_states"), ("x_row",), 16, 64)),
    (MAMBA2, ("*fp16", SUMS, ("groups",), 200, 3)),
    (MAMBA2, ("*fp32", ("state_energy",), ("heads", "head_dim", "groups", "state_size", "length", "x_row"), 1, 1)),
    (CHUNK, ((), ("x_row", "B_state", "C_state", "squares_state"), 128, 64)),
    (
        CHUNK,
        (("D", "initial_states", "state_energy"), ("x_row", "B_state", "C_state", "squares_state", "groups"), 32, 16),
    ),
    (CONVOLUTION, ("*bf16", (), ("x_channel",), True)),
    (CONVOLUTION, ("*fp32", ("bias",), ("x_step",), False)),
    (NORM, ("*bf16", (), 5120)),
    (NORM, ("*fp32", ("length",), 16384)),
    (NORM, ("*bf16", (), 1)),
    (SWEEP, (("block_column", "chosen_column"), 0, 0)),
    (SWEEP, (("factor_column",), 4, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_kernels_compile(tmp_path, kernel, case):
    pytest.importorskip("triton", reason="needs the package triton (Linux only)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = COMPILE.format(call=kernel.format(case=repr(case)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
