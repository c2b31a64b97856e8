# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Perplexity per token, against a loop in float64 over a forward that shares nothing with the package."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_ssm import CalibrationError, ConfigurationError, evaluate_perplexity
from optimum_ssm.evaluation import perplexity as module
from optimum_ssm.evaluation.perplexity import measure_perplexity
from tests.reference import trace


def by_hand(model: PreTrainedModel, ids: Tensor, window: int, stride: int, windows: int) -> tuple[float, int]:
    """Windows, tokens and logarithms one after the other: the perplexity, and how many tokens it is over."""
    total, seen = 0.0, set()
    for start in range(0, windows * stride, stride):
        part = ids[start : start + window]
        probabilities = trace(model, part[None])[1][0].softmax(-1)
        for place in range(1, window):
            # of a later window only what no earlier one has predicted: its last `stride` tokens
            if start > 0 and place < window - stride:
                continue
            total -= math.log(probabilities[place - 1, part[place]])
            assert start + place not in seen
            seen.add(start + place)
    return math.exp(total / len(seen)), len(seen)


@pytest.mark.parametrize(
    "window, stride, batch_size", [(16, None, 3), (16, 16, 1), (16, 5, 4), (16, 15, 2), (16, 1, 8), (2, 1, 4)]
)
def test_perplexity_is_that_of_a_float64_loop(
    either_tiny_model: PreTrainedModel,
    token_ids: Callable[..., Tensor],
    window: int,
    stride: int | None,
    batch_size: int,
) -> None:
    ids = token_ids(1, 50)[0]
    step = stride or window
    windows = (50 - window) // step + 1
    found = measure_perplexity(either_tiny_model, ids, window=window, stride=stride, batch_size=batch_size)
    expected, tokens = by_hand(either_tiny_model, ids, window, step, windows)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert (found.windows, found.tokens, found.window, found.stride) == (windows, tokens, window, step)
    if step < window:
        assert tokens == window - 1 + (windows - 1) * step, "every token after the first one, once"
    else:
        assert tokens == windows * (window - 1), "the first token of each window has nothing before it"


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    tiny_mamba.lm_head.weight.data.zero_()
    assert evaluate_perplexity(tiny_mamba, token_ids(1, 100)[0], window=20) == pytest.approx(64)


def test_batches_do_not_change_the_number(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    ids = token_ids(1, 200)[0]
    found = [evaluate_perplexity(either_tiny_model, ids, window=20, stride=8, batch_size=size) for size in (1, 3, 100)]
    assert found == [pytest.approx(found[0], rel=1e-6)] * 3


def test_the_tail_is_dropped_and_max_windows_takes_the_first(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    ids = token_ids(1, 75)[0]
    whole = evaluate_perplexity(tiny_mamba, ids[:60], window=20)
    assert (
        evaluate_perplexity(tiny_mamba, ids, window=20)
        == evaluate_perplexity(tiny_mamba, ids[:79], window=20)
        == whole
    )
    changed = torch.cat([ids[:60], (ids[60:] + 1) % 64])
    assert evaluate_perplexity(tiny_mamba, changed, window=20) == whole
    limited = measure_perplexity(tiny_mamba, ids, window=20, max_windows=2)
    assert limited.windows == 2 and limited.perplexity == evaluate_perplexity(tiny_mamba, ids[:40], window=20)
    assert measure_perplexity(tiny_mamba, ids, window=20, max_windows=99).windows == 3


def test_padding_and_caches_are_never_used(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window never continues from a cache: Mamba-1 would restart its scan there without a word."""
    calls, forward = [], tiny_mamba.forward

    def recorded(**kwargs: object) -> object:
        calls.append(kwargs)
        output = forward(**kwargs)
        assert output.cache_params is None
        return output

    monkeypatch.setattr(tiny_mamba, "forward", recorded)
    evaluate_perplexity(tiny_mamba, token_ids(1, 100)[0], window=20, batch_size=3)
    assert [tuple(call["input_ids"].shape) for call in calls] == [(3, 20), (2, 20)]
    assert all(call["use_cache"] is False and "attention_mask" not in call for call in calls)


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_the_replaced_scan_gives_the_perplexity_of_the_stock_one(
    load_trained: Callable[..., PreTrainedModel], assets: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model, tokenizer = load_trained(name), AutoTokenizer.from_pretrained(assets / name)
    for block in model.base_model.layers:
        block.mixer.chunk_size = 32
    protocol = {"dataset": assets / "wikitext-2" / "evaluation.txt", "window": 100, "max_windows": 2}
    ours = evaluate_perplexity(model, tokenizer, **protocol)
    modelling, used = sys.modules[type(model.base_model.layers[0].mixer).__module__], []
    scan = "mamba_selective_scan" if name == "mamba-tiny" else "mamba2_chunk_scan"
    stock = getattr(modelling, scan)
    monkeypatch.setattr(modelling, scan, lambda *args, **kwargs: used.append(1) or stock(*args, **kwargs))
    assert evaluate_perplexity(model, tokenizer, **protocol) == ours and not used
    monkeypatch.setattr(module, "FAMILIES", {})  # no family is known: the model runs as transformers made it
    assert evaluate_perplexity(model, tokenizer, **protocol) == pytest.approx(ours, rel=1e-4) and used


def test_a_model_of_no_supported_family_is_measured_too(token_ids: Callable[..., Tensor]) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), token_ids(1, 40)[0]
    expected = torch.stack([model(part[None], labels=part[None]).loss for part in ids.split(20)]).mean().exp()
    assert evaluate_perplexity(model, ids, window=20) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], training: bool
) -> None:
    tiny_mamba.train(training)
    tiny_mamba.base_model.layers[0].eval()
    modelling = sys.modules[type(tiny_mamba.base_model.layers[0].mixer).__module__]
    state = {name: sub.training for name, sub in tiny_mamba.named_modules()}
    scan, config = modelling.mamba_selective_scan, tiny_mamba.config.to_dict()
    evaluate_perplexity(tiny_mamba, token_ids(1, 40)[0], window=20)
    tiny_mamba.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="logits that are not finite"):
        evaluate_perplexity(tiny_mamba, token_ids(1, 40)[0], window=20)
    assert {name: sub.training for name, sub in tiny_mamba.named_modules()} == state
    assert modelling.mamba_selective_scan is scan and tiny_mamba.config.to_dict() == config
    assert torch.is_grad_enabled()


def test_bfloat16_is_measured_and_named(tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]) -> None:
    ids = token_ids(1, 40)[0]
    full = evaluate_perplexity(tiny_mamba, ids, window=20)
    found = measure_perplexity(tiny_mamba.to(torch.bfloat16), ids, window=20)
    assert found.dtype == "bfloat16" and found.perplexity == pytest.approx(full, rel=0.1)


# ------------------------------------------------------------------ what cannot be measured


@pytest.mark.parametrize("options", [
    {"window": 1}, {"stride": 0}, {"window": 20, "stride": 21}, {"batch_size": 0}, {"max_windows": 0}, {"window": -4},
])  # fmt: skip
def test_sizes_out_of_range_are_named(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], options: dict[str, int]
) -> None:
    with pytest.raises(ConfigurationError, match="window >= 2, 1 <= stride <= window, batch_size >= 1") as caught:
        evaluate_perplexity(tiny_mamba, token_ids(1, 40)[0], **options)
    for name, value in options.items():
        assert f"{name}={value}" in str(caught.value)


def test_a_text_shorter_than_a_window_is_refused(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    with pytest.raises(CalibrationError, match="the text has 19 tokens, fewer than one window of 20"):
        evaluate_perplexity(tiny_mamba, token_ids(1, 19)[0], window=20)
    assert measure_perplexity(tiny_mamba, token_ids(1, 20)[0], window=20).tokens == 19
    with pytest.raises(CalibrationError, match="the text has 0 tokens"):
        evaluate_perplexity(tiny_mamba, [])


@pytest.mark.parametrize("wrong", [64, -1, -100])
def test_ids_beyond_the_vocabulary_are_named(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], wrong: int
) -> None:
    """-100 too, which a loss would ignore in silence."""
    ids = token_ids(1, 40)[0]
    ids[3] = wrong
    with pytest.raises(CalibrationError, match=f"token id {wrong} lies outside the model's vocabulary of 64"):
        evaluate_perplexity(tiny_mamba, ids, window=20)


def test_a_perplexity_that_overflows_is_an_error_and_no_infinity(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    tiny_mamba.base_model.norm_f.weight.data.mul_(1e4)
    with pytest.raises(CalibrationError, match="the mean loss per token is .*too large for a float"):
        evaluate_perplexity(tiny_mamba, token_ids(1, 40)[0], window=20)


def test_text_needs_a_tokenizer(tiny_mamba: PreTrainedModel, assets: Path) -> None:
    with pytest.raises(ConfigurationError, match="text needs a tokenizer"):
        evaluate_perplexity(tiny_mamba, None, assets / "wikitext-2" / "evaluation.txt")


# ------------------------------------------------------------------ protocol


def test_the_protocol_names_everything_and_no_path(load_trained: Callable[..., PreTrainedModel], assets: Path) -> None:
    model, tokenizer = load_trained("mamba-tiny"), AutoTokenizer.from_pretrained(assets / "mamba-tiny")
    text = assets / "wikitext-2" / "evaluation.txt"
    found = measure_perplexity(model, tokenizer, text, window=32, stride=16, max_windows=2)
    assert found.protocol == "evaluation.txt, 2 windows of 32 tokens, stride 16, 47 predicted tokens, float32"
    assert found.to_dict() == {
        "perplexity": found.perplexity, "dataset": "evaluation.txt", "window": 32, "stride": 16, "windows": 2,
        "tokens": 47, "dtype": "float32", "protocol": found.protocol,
    }  # fmt: skip
    rows = [{"text": line} for line in text.read_text(encoding="utf-8").splitlines()[:40]]
    assert measure_perplexity(model, tokenizer, rows, window=32, max_windows=1).dataset == "list"


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_token_ids_are_taken_as_they_are(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], kind: Callable[[list], object]
) -> None:
    ids = token_ids(1, 40)[0]
    found = measure_perplexity(tiny_mamba, kind(ids.tolist()), window=20)
    assert found.perplexity == evaluate_perplexity(tiny_mamba, ids, window=20) and found.dataset == "token ids"
    assert measure_perplexity(tiny_mamba, ids, "my text", window=20).dataset == "my text"


def test_a_model_whose_embeddings_are_offloaded(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], tmp_path: Path
) -> None:
    """They are on no device themselves: the ids go where they are computed."""
    tiny_mamba.save_pretrained(tmp_path / "model")
    ids = token_ids(6).reshape(-1)
    there = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert there.get_input_embeddings().weight.is_meta
    assert evaluate_perplexity(there, ids, window=16) == evaluate_perplexity(tiny_mamba, ids, window=16)
