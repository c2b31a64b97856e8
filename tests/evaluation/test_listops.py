# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""ListOps: lengths, classes and values of generated expressions; the example that prunes S5 on them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.evaluation.listops import VOCABULARY, encode, generate, normalise, value


SHARES = [
    0.172,
    *[0.0845] * 8,
    0.175,
]  # of the classes 0 … 9 in the published data, those between within 0.075 … 0.094


def recursive(tokens):
    """Value and number of tokens used, from the definition."""
    if not tokens[0].startswith("["):
        return int(tokens[0]), 1
    name, numbers, at = tokens[0][1:], [], 1
    while tokens[at] != "X":
        number, used = recursive(tokens[at:])
        numbers.append(number)
        at += used
    ordered, count = sorted(numbers), len(numbers)
    median = ordered[count // 2] if count % 2 else int((ordered[count // 2 - 1] + ordered[count // 2]) / 2)
    return {"MIN": ordered[0], "MAX": ordered[-1], "MED": median, "SM": sum(numbers) % 10}[name], at + 1


def test_the_evaluator_agrees_with_a_recursive_one():
    for text, label in generate(300, seed=1, min_length=5, max_length=120):
        assert (label, len(text.split())) == recursive(text.split())


def test_values_by_hand():
    assert value("[MAX 2 9 [MIN 4 7 X 0 X") == 9
    assert value("[SM 9 9 9 X") == 7 and value("[MED 1 8 X") == 4 and value("[MED 3 1 2 X") == 2
    assert value("7") == 7
    for wrong in ("[MAX 1", "1 2", "X", "[AVG 1 X", "[MAX X", "", "[MIN 1 X X", "12"):
        with pytest.raises(ConfigurationError):
            value(wrong)


@pytest.mark.slow
def test_lengths_and_classes_are_the_published_ones():
    found = generate(4000)
    lengths = [len(text.split()) for text, _ in found]
    assert min(lengths) >= 501 and max(lengths) <= 1999
    assert 1000 < sum(lengths) / len(lengths) < 1100
    labels = Counter(label for _, label in found)
    for digit, share in enumerate(SHARES):
        assert labels[digit] / 4000 == pytest.approx(share, abs=0.02)


def test_lengths_lie_strictly_between_the_limits():
    lengths = {len(text.split()) for text, _ in generate(150, seed=3)}
    assert min(lengths) > 500 and max(lengths) < 2000
    short = [len(text.split()) for text, _ in generate(800, min_length=4, max_length=8)]
    assert set(short) == {5, 6, 7}


def test_expressions_are_distinct_seeded_and_finite():
    found = generate(500, seed=2, min_length=3, max_length=50)
    assert len({text for text, _ in found}) == 500
    assert found == generate(500, seed=2, min_length=3, max_length=50) != generate(500, min_length=3, max_length=50)
    with pytest.raises(ConfigurationError, match="allow a wider range"):
        generate(11, min_length=0, max_length=2)  # there are ten digits


def test_tokens():
    assert len(VOCABULARY) == 18 and VOCABULARY["<pad>"] == 0 and VOCABULARY["0"] == 3
    assert normalise("( ( ( [MAX 2 ) 9 ) ] )") == "[MAX 2 9 X"
    assert encode("[MIN 4 7 X") == [13, 7, 10, 17, 2]
    assert encode("[MIN 4 ? X", max_length=4) == [13, 7, 1, 2]


def test_local_expressions_have_the_labels_that_the_evaluator_gives():
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "listops" / "test_d20s.tsv"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not here")
    for line in path.read_text(encoding="utf-8").splitlines()[:2000]:
        label, text = line.split("\t")
        assert value(normalise(text)) == int(label)


@pytest.mark.slow
def test_the_example_prunes_a_model_that_reloads(tmp_path):
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "data.tsv").write_text(
        "Source\tTarget\n"
        + "".join(f"{text}\t{label}\n" for text, label in generate(400, min_length=5, max_length=30))
    )
    options = ["--data", tmp_path / "data.tsv", "--train", 300, "--test", 100, "--epochs", 2, "--layers", 2]
    options += ["--hidden", 16, "--ssm-size", 8, "--blocks", 2, "--ratios", 0, 0.5, "--draws", 1, "--device", "cpu"]
    command = [sys.executable, root / "examples" / "prune_s5_listops.py", *options, "--output", tmp_path / "saved"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert "0.5 LAST: 4 of 8 states" in done.stdout
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[1].strip() for row in rows] == ["LAST", "AIRE", "H∞ uniform", "H∞ global", "magnitude", "random"]
    assert all("(+0.00 ± 0.00)" in row[2] for row in rows)

    from optimum_ssm.models.s5 import S5ForSequenceClassification

    model = S5ForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert sum(model.config.layer_sizes) == 4
