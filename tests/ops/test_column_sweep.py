# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The column sweep in Triton against torch in float64, and in C against torch bit for bit; of torch against re-inversion see
tests/methods/test_sparsegpt.py."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
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


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("text", [*PATTERNS, "14:16"])
@pytest.mark.parametrize("rows, columns", [(1, 48), (5, 48), (16, 96), (33, 48), (2500, 48)])
def test_c_is_torch_to_the_bit(rows, columns, text):
    """Also where several threads are worth it."""
    given, pattern = problem(rows, columns), Pattern.parse(text)
    for found, wanted in zip(*(swept("cpu", name, torch.float32, *given, pattern) for name in ("native", "torch"))):
        assert torch.equal(found, wanted)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_c_takes_wide_blocks_in_parts(text):
    given, pattern = problem(20, 264), Pattern.parse(text)
    weight, mask, errors, _ = swept("cpu", "native", torch.float32, *given, pattern)
    wanted, chosen, lost, _ = swept("cpu", "torch", torch.float64, *given, pattern)
    assert torch.equal(mask, chosen)
    assert (weight - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (errors - lost).abs().max() <= 1e-5 * lost.abs().max()


@pytest.mark.usefixtures("compiled")
def test_c_refuses_what_it_would_read_past_its_end():
    block, chosen = torch.ones(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    for factor, dead, mask, pattern, message in (
        (torch.eye(7), torch.zeros(8).bool(), chosen, "2:4", "'factor' has shape"),
        (torch.eye(8), torch.zeros(7).bool(), chosen, "2:4", "'dead' has shape"),
        (torch.eye(8), torch.zeros(8).bool(), chosen[:2], "2:4", "'chosen' has shape"),
        (torch.eye(8), torch.zeros(8).bool(), chosen, "2:3", "8 columns do not divide into groups of 3"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            sweep_columns(block, factor, dead, mask, Pattern.parse(pattern), backend="native")


@pytest.mark.usefixtures("compiled")
def test_in_c_equal_scores_go_in_order():
    """The first of every group, and dead inputs before all others."""
    block, chosen = torch.ones(3, 8), torch.zeros(3, 8, dtype=torch.bool)
    dead = torch.tensor([False] * 6 + [True] * 2)
    sweep_columns(block, torch.eye(8), dead, chosen, Pattern.parse("2:4"), backend="native")
    assert chosen.tolist() == [[True, True, False, False, False, False, True, True]] * 3


def test_equal_scores_go_in_order(triton_device):
    """All weights and all factors alike: the first of every group go, as `selection` has it."""
    block, chosen = torch.ones(3, 8, device=triton_device), torch.zeros(3, 8, dtype=torch.bool, device=triton_device)
    unit, dead = torch.eye(8, device=triton_device), torch.zeros(8, dtype=torch.bool, device=triton_device)
    sweep_columns(block, unit, dead, chosen, Pattern.parse("1:4"), backend="triton")
    assert chosen.tolist() == [[True, True, True, False] * 2] * 3
    assert torch.equal(block, (~chosen).float())
