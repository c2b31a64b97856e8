# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The same number through `evaluate`, without a network and for a model in memory."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedModel

from optimum_ssm import CalibrationError, ConfigurationError, evaluate_perplexity
from optimum_ssm.calibration.data import tokenize
from optimum_ssm.evaluation.metric import SSMPerplexity


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SSMPerplexity:
    """The metric on a machine without a network."""

    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return SSMPerplexity(cache_dir=str(tmp_path))


def test_the_metric_equals_evaluate_perplexity(
    metric: SSMPerplexity, load_trained: Callable[..., PreTrainedModel], assets: Path
) -> None:
    model, tokenizer = load_trained("mamba2-tiny"), AutoTokenizer.from_pretrained(assets / "mamba2-tiny")
    texts = (assets / "wikitext-2" / "evaluation.txt").read_text(encoding="utf-8").splitlines()[:30]
    protocol = {"window": 64, "stride": 32, "max_windows": 3}
    found = metric.compute(predictions=texts, model=model, tokenizer=tokenizer, **protocol)
    ids = tokenize("\n\n".join(texts), tokenizer)
    assert found["perplexity"] == evaluate_perplexity(model, ids, **protocol)
    assert (found["window"], found["stride"], found["windows"], found["tokens"]) == (64, 32, 3, 63 + 2 * 32)
    assert found["protocol"].startswith("texts, 3 windows of 64 tokens")


def test_texts_may_be_added_one_by_one(
    metric: SSMPerplexity, load_trained: Callable[..., PreTrainedModel], assets: Path
) -> None:
    model, tokenizer = load_trained("mamba-tiny"), AutoTokenizer.from_pretrained(assets / "mamba-tiny")
    texts = ["The tower is 324 metres tall .", "It was built in 1889 ."]
    for text in texts:
        metric.add(predictions=text)
    found = metric.compute(model=model, tokenizer=tokenizer, window=8)
    assert found["perplexity"] == evaluate_perplexity(model, tokenize("\n\n".join(texts), tokenizer), window=8)


def test_what_cannot_be_measured_raises_the_librarys_errors(
    metric: SSMPerplexity, tiny_mamba: PreTrainedModel, assets: Path
) -> None:
    with pytest.raises(ConfigurationError, match="text needs a tokenizer"):
        metric.compute(predictions=["a"], model=tiny_mamba, tokenizer=None)
    tokenizer = AutoTokenizer.from_pretrained(assets / "mamba-tiny")
    with pytest.raises(CalibrationError, match="fewer than one window"):
        metric.compute(predictions=["a"], model=tiny_mamba, tokenizer=tokenizer)
