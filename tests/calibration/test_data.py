# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Calibration text becomes equal blocks, the same ones everywhere, or an error that says what is wrong."""

import json
import random

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from optimum_ssm import CalibrationError, ConfigurationError, SSMPrunerConfig
from optimum_ssm.calibration import data
from optimum_ssm.calibration.data import calibration_blocks, load_text, tokenize


VOCABULARY = 8192


@pytest.fixture(scope="module")
def tokenizer(assets):
    return AutoTokenizer.from_pretrained(assets / "mamba-tiny", local_files_only=True)


@pytest.fixture
def text_file(assets):
    return str(assets / "wikitext-2" / "calibration.txt")


def blocks(dataset, tokenizer=None, vocabulary=VOCABULARY, **values):
    values = {"num_samples": 5, "seq_len": 16, **values}
    return calibration_blocks(SSMPrunerConfig(sparsity=0.5, dataset=dataset, **values), tokenizer, vocabulary)


def stream_of(text_file, tokenizer):
    with open(text_file, encoding="utf-8") as file:
        return tokenizer(file.read(), add_special_tokens=False, verbose=False)["input_ids"]


def test_blocks_are_windows_of_the_text_at_positions_that_the_seed_draws(text_file, tokenizer):
    found = blocks(text_file, tokenizer, num_samples=7, seq_len=32, seed=3)
    stream, draw = stream_of(text_file, tokenizer), random.Random(3)
    starts = [draw.randint(0, len(stream) - 33) for _ in range(7)]
    assert found.dtype == torch.int64 and found.device.type == "cpu"
    assert found.tolist() == [stream[start : start + 32] for start in starts]


def test_the_same_seed_draws_the_same_blocks_and_another_seed_others(text_file, tokenizer):
    first = blocks(text_file, tokenizer)
    random.seed(123)
    torch.manual_seed(123)
    assert torch.equal(first, blocks(text_file, tokenizer))
    assert not torch.equal(first, blocks(text_file, tokenizer, seed=1))


def test_more_samples_begin_with_the_fewer(text_file, tokenizer):
    assert torch.equal(blocks(text_file, tokenizer, num_samples=9)[:5], blocks(text_file, tokenizer))


def test_the_global_random_state_is_left_alone(text_file, tokenizer):
    before = random.getstate(), torch.get_rng_state()
    blocks(text_file, tokenizer)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_no_special_token_is_added(text_file, tokenizer):
    ids = tokenize("a text of some words", tokenizer)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)


ROWS = ["The first row of text.", "A second one, a little longer than that.", "", "And a third."] * 20


def test_every_kind_of_source_gives_the_same_blocks(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"text": ROWS, "label": list(range(80))})
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in ROWS), encoding="utf-8")
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("\n\n".join(ROWS), encoding="utf-8")
    sources = [
        str(tmp_path / "rows.txt"),
        tmp_path / "rows.txt",
        str(tmp_path / "rows.jsonl"),
        tmp_path / "rows.parquet",
        table,
        ROWS,
        [{"text": row} for row in ROWS],
        tuple(ROWS),
    ]
    found = [blocks(source, tokenizer) for source in sources]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_another_text_column_can_be_named(tokenizer):
    table = datasets.Dataset.from_dict({"body": ROWS})
    assert torch.equal(blocks(table, tokenizer, text_column="body"), blocks(ROWS, tokenizer))


def test_blocks_of_token_ids_are_taken_as_they_are():
    ids = torch.randint(0, VOCABULARY, (5, 16))
    for source in (ids, ids.to(torch.int32), ids.tolist(), list(ids), list(ids.numpy()), iter(ids.tolist())):
        assert torch.equal(blocks(source), ids)
    assert torch.equal(blocks(ids, num_samples=3), ids[:3])


def test_token_ids_of_other_lengths_are_one_stream():
    rows = [list(range(start, start + 50)) for start in range(0, 300, 50)]
    found = blocks(rows)
    assert found.shape == (5, 16)
    for row in found.tolist():
        assert row == list(range(row[0], row[0] + 16))
    assert torch.equal(found, blocks(list(range(300))))
    assert torch.equal(found, blocks(torch.arange(300)))
    assert torch.equal(found, blocks([np.arange(150), np.arange(150, 300)]))


def test_rows_that_a_tokenizer_padded_are_refused_and_the_same_rows_without_padding_are_one_stream(tokenizer):
    """Padding has no place in a block: no mask says where it is, and its zeros would dilute every statistic."""
    rows = [tokenizer(row, add_special_tokens=False)["input_ids"] for row in ROWS if row]
    longest = max(map(len, rows))
    padded = {
        "input_ids": [row + [0] * (longest - len(row)) for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (longest - len(row)) for row in rows],
    }
    for source in (datasets.Dataset.from_dict(padded), [dict(zip(padded, row)) for row in zip(*padded.values())]):
        for column in ("text", "input_ids"):
            with pytest.raises(ConfigurationError, match="has no column 'text'|is not text"):
                blocks(source, tokenizer, text_column=column)
    stream = [token for row in rows for token in row]
    for block in blocks(rows, num_samples=20).tolist():
        assert any(block == stream[start : start + 16] for start in range(len(stream)))


def test_ids_need_no_tokenizer_but_text_does(text_file):
    with pytest.raises(ConfigurationError, match="text needs a tokenizer"):
        blocks(text_file)


@pytest.mark.parametrize("bad, named", [(VOCABULARY, "8192"), (-1, "-1")])
def test_an_id_outside_the_vocabulary_is_named(bad, named):
    ids = torch.zeros(5, 16, dtype=torch.long)
    ids[2, 3] = bad
    with pytest.raises(CalibrationError, match=f"token id {named} lies outside the model's vocabulary of 8192"):
        blocks(ids)


def test_a_tokenizer_of_another_model_is_noticed(text_file, tokenizer):
    with pytest.raises(CalibrationError, match="the tokenizer belongs to another model"):
        blocks(text_file, tokenizer, vocabulary=64)


@pytest.mark.parametrize("length, refused", [(16, True), (17, False)])
def test_a_text_shorter_than_one_block_is_refused_with_both_lengths(length, refused):
    ids = [list(range(length - 3)), list(range(3))]
    if not refused:
        assert blocks(ids).shape == (5, 16)
        return
    with pytest.raises(CalibrationError, match=r"has 16 tokens, but one block needs seq_len \+ 1 = 17"):
        blocks(ids)


def test_a_text_shorter_than_all_blocks_together_warns_that_they_overlap(caplog):
    assert blocks([list(range(30)), list(range(10))]).shape == (5, 16)
    assert "has 40 tokens, fewer than 5 x 16: blocks will overlap" in caplog.text


@pytest.mark.parametrize("empty", [[], [""], ["  ", "\n"], datasets.Dataset.from_dict({"text": []})], ids=repr)
def test_an_empty_text_is_refused(tokenizer, empty):
    with pytest.raises(CalibrationError, match="holds no text" if len(empty) else "no text|has 0 tokens"):
        blocks(empty, tokenizer)


def test_an_empty_file_is_refused_by_its_path(tmp_path, tokenizer):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="empty.txt' holds no text"):
        blocks(str(tmp_path / "empty.txt"), tokenizer)


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path, tokenizer):
    for name in ("absent.txt", "absent.jsonl", "absent.parquet"):
        with pytest.raises(ConfigurationError, match=name):
            blocks(str(tmp_path / name), tokenizer)


def test_a_file_that_is_not_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigurationError, match="bytes.txt' cannot be read"):
        blocks(str(tmp_path / "bytes.txt"), tokenizer)


def test_a_missing_column_is_named_with_those_that_are_there(tokenizer):
    table = datasets.Dataset.from_dict({"body": ["a"], "label": [1]})
    with pytest.raises(ConfigurationError, match="has no column 'text'; it has: body, label"):
        blocks(table, tokenizer)


@pytest.mark.parametrize("rows", [[{"body": "a"}], [None], [{"text": 3}]], ids=repr)
def test_a_row_that_is_no_text_is_refused(rows, tokenizer):
    with pytest.raises(ConfigurationError, match="is not text; expected str in 'text'"):
        blocks(rows, tokenizer)


@pytest.mark.parametrize("source", [3, 2.5, object()], ids=["int", "float", "object"])
def test_an_object_of_another_type_is_refused_by_its_type(source, tokenizer):
    with pytest.raises(ConfigurationError, match=f"type {type(source).__name__} is neither text, a Dataset nor token"):
        blocks(source, tokenizer)


@pytest.fixture
def hub(monkeypatch):
    """What would have been asked of the Hub."""
    asked = []

    def load_dataset(**options):
        asked.append(options)
        if options["path"] == "absent/dataset":
            raise FileNotFoundError("Couldn't find any data file\nat absent/dataset")
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_short_names_stand_for_the_corpora_of_the_papers(hub):
    load_text("wikitext2")
    load_text("c4", split="validation")
    assert hub[0] == {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"}
    assert hub[1]["path"] == "allenai/c4" and hub[1]["streaming"] and hub[1]["split"] == "validation"


def test_name_and_split_of_the_config_reach_the_hub_and_train_is_the_default(hub, tokenizer):
    blocks("some/corpus", tokenizer, dataset_name="en", dataset_split="validation")
    blocks("some/corpus", tokenizer)
    assert hub == [
        {"path": "some/corpus", "name": "en", "split": "validation"},
        {"path": "some/corpus", "name": None, "split": "train"},
    ]


def test_a_dataset_that_the_hub_does_not_have_is_refused_on_one_line_with_what_is_allowed(hub, tokenizer):
    with pytest.raises(ConfigurationError) as caught:
        blocks("absent/dataset", tokenizer)
    message = str(caught.value)
    assert message.startswith("dataset 'absent/dataset' (split 'train') cannot be loaded: Couldn't find any data file")
    assert "wikitext2" in message and "\n" not in message


def test_a_huge_corpus_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(data, "MOST_CHARACTERS", 1000)

    def endless():
        for number in range(10**9):
            assert number < 50, "read on"
            yield "x" * 100

    class Stream:
        column_names = ["text"]

        def __iter__(self):
            return ({"text": text} for text in endless())

    assert 1000 < len(load_text(Stream())) < 1300


def test_floats_are_no_token_ids():
    with pytest.raises((CalibrationError, ConfigurationError)):
        blocks(torch.rand(5, 16))


def test_a_generator_of_texts_is_text_or_refused_by_the_librarys_own_error(tokenizer):
    try:
        found = blocks((row for row in ROWS), tokenizer)
    except ConfigurationError:
        return
    assert torch.equal(found, blocks(ROWS, tokenizer))


@pytest.mark.parametrize("values", [{"dataset_name": "en"}, {"dataset_split": "train"}])
def test_names_of_parts_of_a_hub_dataset_are_refused_beside_anything_else(text_file, tokenizer, values):
    (field,) = values
    with pytest.raises(ConfigurationError, match=f"{field}=.* names a part of a dataset on the Hub, but .* is a file"):
        blocks(text_file, tokenizer, **values)
    with pytest.raises(ConfigurationError, match="but this one is a list; leave it out"):
        blocks([list(range(16))] * 5, **values)


@pytest.mark.parametrize(
    "make", [np.array, list, tuple, lambda ids: [np.int32(i) for i in ids], lambda ids: [list(ids)]]
)
def test_ids_of_any_make_are_the_same_blocks(make):
    ids = list(range(200))
    assert torch.equal(blocks(make(ids)), blocks(torch.tensor(ids)))
    rows = np.arange(80, dtype=np.uint16).reshape(5, 16)
    assert torch.equal(blocks(rows), torch.arange(80).reshape(5, 16))
