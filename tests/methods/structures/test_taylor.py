# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The empirical Fisher of all that a unit owns, from one backward pass per sequence."""

import pytest
import torch

from optimum_ssm.errors import ConfigurationError

from ...structured import axes_of, biased, scores_of


def fisher(model, ids):
    """Mean over sequences of the squared gradient of a sequence's mean loss, by parameter name."""
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for sequence in ids:
        model.zero_grad()
        model(sequence[None], labels=sequence[None]).loss.backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.double().square() / len(ids)
    model.zero_grad()
    return sums


CASES = [("mamba", "state"), ("mamba", "channel"), ("mamba2", "state"), ("mamba2", "head"), ("mamba2", "head_dim")]


@pytest.mark.parametrize("model_type, axis", CASES)
def test_it_is_that_of_a_naive_loop(model_type, axis, token_ids):
    model, ids = biased(model_type), token_ids(3, 12)
    squared = fisher(model, ids)
    found = scores_of(model, "taylor", axis, ids, seq_len=12)
    for index, (scores, declared) in enumerate(zip(found, axes_of(model, axis))):
        wanted = torch.zeros(declared.units, dtype=torch.float64)
        for part in declared.owned:
            if part.kind != "linear":
                continue
            name = f"backbone.layers.{index}.{part.parameter}"
            terms = model.get_parameter(name).detach().double().square() * squared[name]
            lines = terms.mean(1 - part.dim)  # mean over a row, or over a column
            for unit in range(declared.units):
                wanted[unit] += lines[part.index[unit]].sum()
        torch.testing.assert_close(scores, wanted, rtol=2e-3, atol=1e-12)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_parts_can_be_chosen(token_ids):
    model, ids = biased("mamba"), token_ids(2, 12)
    both = scores_of(model, "taylor", "state", ids)
    b, c = (scores_of(model, "taylor", "state", ids, method_kwargs={"only": [f"x_proj.{x}"]}) for x in "BC")
    for whole, one, other in zip(both, b, c):
        torch.testing.assert_close(whole, one + other)


def test_parts_that_are_not_there_are_refused_before_any_work(token_ids):
    with pytest.raises(ConfigurationError, match="unknown taylor part 'in_proj.B'. Did you mean 'x_proj.B'"):
        scores_of(biased("mamba"), "taylor", "state", token_ids(), method_kwargs={"only": ["in_proj.B"]})
