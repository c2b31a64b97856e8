# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Decoding step by step gives the tokens of `generate`, on states that stay where they are."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.evaluation.benchmark_facts import scan_in_use
from optimum_ssm.evaluation.decoding import GreedyDecoder, prefill, states_of


def greedy(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """What `generate` adds to a prompt."""
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **limits)[:, prompt.shape[1] :]


@torch.no_grad()
def test_steps_give_the_tokens_of_generate(either_tiny_model: PreTrainedModel, token_ids: Callable) -> None:
    prompt = token_ids(3, 10)
    expected = greedy(either_tiny_model, prompt, 9)
    assert len(expected.unique()) > 3
    decoder = GreedyDecoder(either_tiny_model, prompt)
    assert torch.equal(decoder.ids, expected[:, :1])
    assert torch.equal(torch.cat([decoder.run(3), decoder.run(5)], dim=1), expected[:, 1:])
    decoder.restart()
    assert torch.equal(decoder.ids, expected[:, :1]) and torch.equal(decoder.run(8), expected[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("scan", ["library", "transformers"])
def test_states_stay_where_they_are(either_tiny_model: PreTrainedModel, token_ids: Callable, scan: str) -> None:
    """What the graph relies on: steps and a second prefill write into the tensors of the first one."""
    with scan_in_use(either_tiny_model, scan):
        decoder = GreedyDecoder(either_tiny_model, token_ids(2, 10))
        recurrent, conv = states_of(decoder.cache)
        assert len(recurrent) == len(conv) == 2 and all(state.is_contiguous() for state in recurrent)
        places = [state.data_ptr() for state in recurrent + conv]
        before = [state.clone() for state in recurrent + conv]
        decoder.run(4)
        changed = [state for states in states_of(decoder.cache) for state in states]
        assert [state.data_ptr() for state in changed] == places
        assert not any(torch.equal(old, new) for old, new in zip(before, changed))
        decoder.restart()
        assert [state.data_ptr() for states in states_of(decoder.cache) for state in states] == places
        assert all(torch.equal(old, new) for old, new in zip(before, changed))


@torch.no_grad()
def test_a_prefill_gives_only_the_last_logits(either_tiny_model: PreTrainedModel, token_ids: Callable) -> None:
    ids = token_ids(2, 12)
    logits = prefill(either_tiny_model, ids).logits
    assert logits.shape == (2, 1, 64)
    torch.testing.assert_close(logits, either_tiny_model(input_ids=ids).logits[:, -1:])


@torch.no_grad()
def test_a_graph_needs_cuda(tiny_mamba: PreTrainedModel, token_ids: Callable) -> None:
    with pytest.raises(ConfigurationError, match="needs a model on a CUDA device; this one is on cpu"):
        GreedyDecoder(tiny_mamba, token_ids(1, 4)).capture()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_gives_the_tokens_of_generate(
    either_tiny_model: PreTrainedModel, token_ids: Callable, dtype: torch.dtype
) -> None:
    model, prompt = either_tiny_model.to("cuda", dtype), token_ids(3, 10).cuda()
    expected = greedy(model, prompt, 13)
    decoder = GreedyDecoder(model, prompt)
    decoder.capture()
    for _ in range(2):
        assert torch.equal(torch.cat([decoder.ids, decoder.run(12)], dim=1), expected)
        decoder.restart()
