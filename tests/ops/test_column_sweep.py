# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The column sweep in Triton against torch in float64; of torch against re-inversion see tests/methods/test_sparsegpt.py."""

import pytest
import torch

from optimum_ssm.ops import column_sweep
from optimum_ssm.ops.column_sweep import sweep_columns
from optimum_ssm.sparsity.pattern import Pattern


PATTERNS = ["unstructured", "1:4", "2:4", "4:8", "2:3"]


def problem(rows, columns, seed=0):
    """W, U of correlated inputs with some that never fired, and a mask; all of it parts of larger tensors, as in use."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, columns + 5, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    hessian = mixing @ mixing.T + 0.1 * torch.eye(columns, dtype=torch.float64)
    dead = torch.zeros(columns, dtype=torch.bool)
    dead[3::7] = True
    hessian[dead] = hessian[:, dead] = 0
    hessian[dead, dead] = 1
    factor = torch.zeros(columns + 2, columns + 2, dtype=torch.float64)
    factor[:columns, :columns] = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    mask = torch.rand(rows, columns + 5, generator=generator) < 0.5
    return wide.float(), factor.float(), dead, mask


def swept(device, backend, dtype, wide, factor, dead, mask, pattern):
    columns = len(dead)
    wide, mask, factor = wide.to(device, dtype, copy=True), mask.to(device, copy=True), factor.to(device, dtype)
    block, inner, chosen = wide[:, 2 : columns + 2], factor[:columns, :columns], mask[:, 2 : columns + 2]
    if pattern.is_n_m:
        chosen.fill_(False)
    errors = sweep_columns(block, inner, dead.to(device), chosen, pattern, backend=backend)
    assert errors.shape == block.shape
    return block.double().cpu(), chosen.cpu(), errors.double().cpu(), wide.double().cpu()


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("rows, columns", [(1, 24), (5, 24), (17, 48), (33, 24)])
def test_triton_is_torch(triton_device, rows, columns, text):
    given, pattern = problem(rows, columns), Pattern.parse(text)
    weight, mask, errors, whole = swept(triton_device, "triton", torch.float32, *given, pattern)
    wanted, chosen, lost, around = swept("cpu", "torch", torch.float64, *given, pattern)
    assert torch.equal(mask, chosen)
    assert not weight[mask].any()
    assert (weight - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (errors - lost).abs().max() <= 1e-5 * lost.abs().max()
    outside = [0, 1, *range(columns + 2, columns + 5)]
    assert torch.equal(whole[:, outside], around[:, outside]), "what is beside the block is as it was"


@pytest.mark.parametrize("text", ["unstructured", "2:4", "2:3"])
def test_wide_blocks_are_swept_in_parts(triton_device, monkeypatch, text):
    monkeypatch.setattr(column_sweep, "KERNEL_COLUMNS", 8)
    given, pattern = problem(6, 24), Pattern.parse(text)
    weight, mask, errors, _ = swept(triton_device, "triton", torch.float32, *given, pattern)
    wanted, chosen, lost, _ = swept("cpu", "torch", torch.float64, *given, pattern)
    assert torch.equal(mask, chosen)
    assert (weight - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (errors - lost).abs().max() <= 1e-5 * lost.abs().max()


def test_equal_scores_go_in_order(triton_device):
    """All weights and all factors alike: the first of every group go, as `selection` has it."""
    block, chosen = torch.ones(3, 8, device=triton_device), torch.zeros(3, 8, dtype=torch.bool, device=triton_device)
    unit, dead = torch.eye(8, device=triton_device), torch.zeros(8, dtype=torch.bool, device=triton_device)
    sweep_columns(block, unit, dead, chosen, Pattern.parse("1:4"), backend="triton")
    assert chosen.tolist() == [[True, True, True, False] * 2] * 3
    assert torch.equal(block, (~chosen).float())
