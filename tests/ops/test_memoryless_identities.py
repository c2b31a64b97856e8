# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What removing or forgetting a *set* of states changes, in float64, against a loop that keeps every state.

y - y' is Σ C dA h_{t-1} over the set when its states become memoryless, Σ C h when they are gone; and what a memoryless state
still gives is one number per token, Σ B C over the set, times Δ x: it can be folded into the skip connection.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optimum_ssm.ops.selective_scan import selective_scan
from optimum_ssm.ops.state_space_dual import state_space_dual


BATCH, LENGTH, STATES = 2, 23, 6
FORGOTTEN = -torch.exp(torch.tensor(38.0, dtype=torch.float64))


def mamba_inputs(channels: int = 5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {"x": (BATCH, channels, LENGTH), "dt": (BATCH, channels, LENGTH)}
    shapes |= {"B": (BATCH, STATES, LENGTH), "C": (BATCH, STATES, LENGTH)}
    values = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return values | {"A": -torch.exp(torch.randn(channels, STATES, generator=draw, dtype=torch.float64))}


def mamba_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> dict[str, Tensor]:
    """C dA h_{t-1} and C h of every entry at every step: (batch, channels, states, steps)."""
    delta, state, carried, whole = F.softplus(dt), torch.zeros(BATCH, *A.shape, dtype=x.dtype), [], []
    for t in range(LENGTH):
        kept = torch.exp(delta[:, :, t, None] * A) * state
        state = kept + (delta[:, :, t] * x[:, :, t])[:, :, None] * B[:, None, :, t]
        carried.append(C[:, None, :, t] * kept)
        whole.append(C[:, None, :, t] * state)
    return {"carried": torch.stack(carried, -1), "whole": torch.stack(whole, -1), "delta": delta}


@pytest.fixture
def entries() -> Tensor:
    """An arbitrary set of entries of A: (channels, states), another one in every channel."""
    return torch.rand(5, STATES, generator=torch.Generator().manual_seed(5)) < 0.5


def test_mamba_a_memoryless_set_loses_what_it_carried(entries: Tensor) -> None:
    inputs = mamba_inputs()
    seen = mamba_states(**inputs)
    dense = selective_scan(**inputs, delta_softplus=True)
    A = inputs["A"].masked_fill(entries, FORGOTTEN)
    change = dense - selective_scan(**inputs | {"A": A}, delta_softplus=True)
    expected = (seen["carried"] * entries[..., None]).sum(2)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(change, (seen["whole"] * entries[..., None]).sum(2), atol=1e-3)  # it is no removal


def test_mamba_a_removed_set_of_states_loses_all_that_it_gave() -> None:
    inputs, gone = mamba_inputs(), [0, 3, 4]
    kept = [n for n in range(STATES) if n not in gone]
    sliced = {"A": inputs["A"][:, kept], "B": inputs["B"][:, kept], "C": inputs["C"][:, kept]}
    change = selective_scan(**inputs, delta_softplus=True) - selective_scan(**inputs | sliced, delta_softplus=True)
    torch.testing.assert_close(change, mamba_states(**inputs)["whole"][:, :, gone].sum(2), rtol=0, atol=1e-12)


def test_mamba_memoryless_states_fold_into_the_skip_connection() -> None:
    inputs, gone = mamba_inputs(), [1, 2, 5]
    kept = [n for n in range(STATES) if n not in gone]
    A = inputs["A"].clone()
    A[:, gone] = FORGOTTEN
    memoryless = selective_scan(**inputs | {"A": A}, delta_softplus=True)
    sliced = {"A": inputs["A"][:, kept], "B": inputs["B"][:, kept], "C": inputs["C"][:, kept]}
    folded = (inputs["B"][:, gone] * inputs["C"][:, gone]).sum(1)  # one number per token
    rest = selective_scan(**inputs | sliced, delta_softplus=True)
    expected = rest + folded[:, None] * F.softplus(inputs["dt"]) * inputs["x"]
    torch.testing.assert_close(memoryless, expected, rtol=0, atol=1e-12)


def mamba2_inputs(heads: int = 4, dim: int = 3, groups: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(4)
    shapes = {"x": (BATCH, LENGTH, heads, dim), "dt": (BATCH, LENGTH, heads)}
    shapes |= {"B": (BATCH, LENGTH, groups, STATES), "C": (BATCH, LENGTH, groups, STATES)}
    values = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    return values | {"A": -torch.exp(torch.randn(heads, generator=draw, dtype=torch.float64))}


def test_mamba2_memoryless_heads_lose_what_they_carried_and_fold_into_the_skip_connection() -> None:
    inputs, gone = mamba2_inputs(), [1, 2]
    delta = F.softplus(inputs["dt"])
    B, C = (inputs[name].repeat_interleave(2, dim=2) for name in "BC")  # two heads to a group
    state, carried = torch.zeros(BATCH, 4, 3, STATES, dtype=torch.float64), []
    for t in range(LENGTH):
        kept = torch.exp(delta[:, t] * inputs["A"])[..., None, None] * state
        state = kept + (delta[:, t, :, None] * inputs["x"][:, t])[..., None] * B[:, t, :, None]
        carried.append((C[:, t, :, None] * kept).sum(-1))
    carried = torch.stack(carried, 1)
    A = inputs["A"].clone()
    A[gone] = FORGOTTEN
    for chunk_size in (1, 5, 64):
        options = {"dt_softplus": True, "chunk_size": chunk_size}
        dense, memoryless = state_space_dual(**inputs, **options), state_space_dual(**inputs | {"A": A}, **options)
        change = dense - memoryless
        torch.testing.assert_close(change[:, :, gone], carried[:, :, gone], rtol=0, atol=1e-12)
        assert change[:, :, [0, 3]].abs().max() < 1e-12 < 0.1 < change[:, :, gone].abs().max()
        folded = (B * C).sum(-1)[:, :, gone, None] * delta[:, :, gone, None] * inputs["x"][:, :, gone]
        torch.testing.assert_close(memoryless[:, :, gone], folded, rtol=0, atol=1e-12)


def test_mamba2_a_removed_set_of_states_loses_all_that_it_gave() -> None:
    """Another set in every group; the energies of the scan are those of the single states."""
    inputs, gone = mamba2_inputs(), torch.tensor([[0, 2], [1, 5]])
    C = inputs["C"].clone()
    for group, states in enumerate(gone):
        C[:, :, group, states] = 0
    only = inputs["C"] - C
    change = state_space_dual(**inputs, dt_softplus=True) - state_space_dual(**inputs | {"C": C}, dt_softplus=True)
    torch.testing.assert_close(change, state_space_dual(**inputs | {"C": only}, dt_softplus=True), rtol=0, atol=1e-12)
    sums = {"state_energy": torch.zeros(4, STATES, dtype=torch.float64)}
    state_space_dual(**inputs, dt_softplus=True, sums=sums)
    for state in range(STATES):
        one = torch.zeros_like(C)
        one[..., state] = inputs["C"][..., state]
        alone = state_space_dual(**inputs | {"C": one}, dt_softplus=True).square().sum((0, 1, 3))
        torch.testing.assert_close(sums["state_energy"][:, state], alone, rtol=1e-11, atol=0)
