# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm compare` from end to end: files, resumption, errors."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, SSMPrunerConfig, evaluate_perplexity

from .conftest import Ended


@pytest.fixture
def flags(assets: Path, tmp_path: Path) -> list[object]:
    texts = assets / "wikitext-2"
    return [
        *("-o", tmp_path / "out", "--dataset", texts / "calibration.txt", "--num-samples", 2, "--seq-len", 32),
        *("--evaluate", texts / "evaluation.txt", "--window", 64, "--max-windows", 2, "--dtype", "float32"),
    ]


def rows_in(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with open(path / "comparison.csv", newline="", encoding="utf-8") as file:
        return {(row["method"], row["component"], row["budget"]): row for row in csv.DictReader(file)}


def test_compare_writes_what_prune_and_eval_would_give(
    ssm: Callable[..., Ended], assets: Path, tmp_path: Path, flags: list[object]
) -> None:
    cells = [
        "--methods",
        "magnitude:largest",
        "sparsegpt",
        "--budgets",
        0.5,
        "2:4",
        "--components",
        "A_log",
        "dt_proj",
    ]
    ended = ssm("compare", assets / "mamba-tiny", *flags, *cells)
    assert ended.code == 0, ended.err
    rows = rows_in(tmp_path / "out")
    assert len(rows) == 8
    assert [key for key, row in rows.items() if row["status"] == "impossible"] == [
        ("magnitude:largest", "dt_proj", "2:4"),
        ("sparsegpt", "A_log", "0.5"),
        ("sparsegpt", "A_log", "2:4"),
        ("sparsegpt", "dt_proj", "2:4"),
    ]
    texts = assets / "wikitext-2"
    config = SSMPrunerConfig(
        method="sparsegpt",
        sparsity=0.5,
        targets=["dt_proj"],
        dataset=str(texts / "calibration.txt"),
        num_samples=2,
        seq_len=32,
    )
    pruner = SSMPruner.from_pretrained(assets / "mamba-tiny", config, dtype="float32")
    pruner.prune()
    expected = evaluate_perplexity(pruner.model, pruner.tokenizer, texts / "evaluation.txt", window=64, max_windows=2)
    assert float(rows["sparsegpt", "dt_proj", "0.5"]["perplexity"]) == expected
    assert ended.out.count("## ") == 3 and "cannot prune A_log" in ended.out
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000


def test_the_same_command_goes_on(
    ssm: Callable[..., Ended], assets: Path, tmp_path: Path, flags: list[object]
) -> None:
    cells = ["--methods", "magnitude", "--components", "in_proj", "out_proj"]
    assert ssm("compare", assets / "mamba-tiny", *flags, *cells, "--budgets", 0.5).code == 0
    before = rows_in(tmp_path / "out")
    lines = (tmp_path / "out" / "comparison.csv").read_text().splitlines(keepends=True)
    (tmp_path / "out" / "comparison.csv").write_text("".join(lines[:2]))  # as after a kill: the second row is missing
    assert ssm("compare", assets / "mamba-tiny", *flags, *cells, "--budgets", 0.5, 0.7).code == 0
    after = rows_in(tmp_path / "out")
    assert len(after) == 4 and after["magnitude", "in_proj", "0.5"] == before["magnitude", "in_proj", "0.5"]
    again = after["magnitude", "out_proj", "0.5"], before["magnitude", "out_proj", "0.5"]
    assert again[0]["perplexity"] == again[1]["perplexity"] and again[0]["seconds"] != again[1]["seconds"]
    other = ssm("compare", assets / "mamba-tiny", *flags, *cells, "--max-windows", 1)
    assert "holds a comparison with evaluation:" in other.error()
    assert ssm("compare", assets / "mamba-tiny", *flags, *cells, "--max-windows", 1, "--overwrite").code == 0
    assert len(rows_in(tmp_path / "out")) == 4  # the default budgets


def test_compare_errors_are_one_line(
    ssm: Callable[..., Ended], tiny_dir: Path, tiny_mamba: PreTrainedModel, tmp_path: Path, flags: list[object]
) -> None:
    assert "text needs a tokenizer" in ssm("compare", tiny_dir, *flags).error()
    assert "unknown method 'wnda'" in ssm("compare", tiny_dir, *flags, "--methods", "wnda").error()
    assert not (tmp_path / "out").exists()
    pruner = SSMPruner(tiny_mamba)
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.5))
    pruner.save_pretrained(tmp_path / "pruned")
    assert "is pruned already" in ssm("compare", tmp_path / "pruned", *flags).error()
