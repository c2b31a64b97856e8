# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm prune`: from a directory to a directory, and every mistake in one line before anything is written."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_ssm import PruningReport, SSMPrunerConfig

from .conftest import Ended


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_prune_writes_a_checkpoint_and_prints_the_report(
    ssm: Callable[..., Ended], assets: Path, calibration: list[object], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    flags = [
        "--method",
        "sparsessm",
        "--sparsity",
        0.5,
        "--targets",
        "A_log",
        "in_proj.x",
        "--a-log-fill",
        "memoryless",
    ]
    text = assets / "wikitext-2" / "evaluation.txt"
    protocol = ["--evaluate", text, "--window", 64, "--max-windows", 2]
    ended = ssm("prune", assets / name, "-o", out, *flags, *calibration, *protocol, "--dtype", "float32")
    assert ended.code == 0, ended.err
    assert {"README.md", "config.json", "model.safetensors", "pruning.png", "report.json", "ssm_pruner_config.json",
            "tokenizer.json"} <= {path.name for path in out.iterdir()}  # fmt: skip
    report = PruningReport.from_json((out / "report.json").read_text())
    assert ended.out == f"{report}\nsaved to {out}\n"
    assert "Pass 1: sparsessm, unstructured, sparsity 0.5, 64 calibration tokens" in ended.out
    assert f"| whole model | {report.parameters:,} | " in ended.out.replace("  ", " ")
    assert list(report.perplexity) == ["dense", "pruned"]
    assert report.perplexity["dense"]["perplexity"] < report.perplexity["pruned"]["perplexity"]
    assert report.perplexity["pruned"]["protocol"] == (
        "evaluation.txt, 2 windows of 64 tokens, stride 64, 126 predicted tokens, float32"
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype is torch.float32 and len(tokenizer) == 8192
    half = model.base_model.layers[0].mixer.A_log
    assert (half == 38).sum() == half.numel() // 2
    settings = json.loads((out / "ssm_pruner_config.json").read_text())["passes"][0]
    assert settings["num_samples"] == 2 and settings["targets"] == ["A_log", "in_proj.x"] and settings["seed"] == 0


def test_every_kind_of_flag_reaches_the_config(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path) -> None:
    """Numbers, names, lists, booleans, choices, and key=value pairs read as YAML."""
    flags = ["--method", "magnitude", "--sparsity", "0.25", "--targets", "A_log", "out_proj", "--exclude",
             "re:.*layers.0.*", "--scope", "row", "--a-log-fill", "memoryless", "--memoryless-value", "40",
             "--seed", "7", "--no-sequential", "--method-kwargs", "largest=true"]  # fmt: skip
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", *flags)
    assert ended.code == 0, ended.err
    (found,) = json.loads((tmp_path / "out" / "ssm_pruner_config.json").read_text())["passes"]
    wanted = SSMPrunerConfig(
        method="magnitude", sparsity=0.25, targets=["A_log", "out_proj"], exclude=["re:.*layers.0.*"], scope="row",
        memoryless_value=40.0, seed=7, sequential=False, method_kwargs={"largest": True},
    )  # fmt: skip
    assert found == wanted.to_dict()


def test_a_mapping_in_the_shell(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path) -> None:
    flags = ["-o", tmp_path / "out", *MAGNITUDE, "--targets", "in_proj.*", "out_proj", "--allocation", "by_name"]
    ended = ssm("prune", tiny_dir, *flags, "--allocation-kwargs", 'shares={in_proj.x: 0.75, "*.z": 0.25}')
    assert ended.code == 0, ended.err
    (found,) = json.loads((tmp_path / "out" / "ssm_pruner_config.json").read_text())["passes"]
    assert found["allocation_kwargs"] == {"shares": {"in_proj.x": 0.75, "*.z": 0.25}}
    ended = ssm("prune", tiny_dir, *flags, "--allocation-kwargs", "shares={in_proj.x:0.75}")
    assert ended.code == 2 and "'in_proj.x:0.75' needs a space behind the colon" in ended.err


def test_a_recipe_of_two_passes(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "passes:\n"
        "- {method: magnitude, sparsity: 0.5, targets: [A_log], a_log_fill: zero}\n"
        "- {method: random, pattern: '2:4', targets: in_proj, seed: 3}\n"
    )
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", "--recipe", recipe)
    assert ended.code == 0, ended.err
    assert "Pass 1: magnitude, unstructured" in ended.out and "Pass 2: random, 2:4" in ended.out
    assert PruningReport.from_json((tmp_path / "out" / "report.json").read_text()).pruned == 512 + 4096


def test_overwrite_replaces_the_output(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").touch()
    (tmp_path / "out" / "config.json").write_text("{}")
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", "--overwrite", "--method", "magnitude", "--sparsity", 0.5)
    assert ended.code == 0 and not (tmp_path / "out" / "old.txt").exists()


MAGNITUDE = ["--method", "magnitude", "--sparsity", "0.5"]


@pytest.mark.parametrize("flags, message", [
    (["--method", "wander", "--sparsity", "0.5"], "unknown method 'wander'. Did you mean 'wanda'? Allowed: "),
    (["--method", "wanda", "--sparsity", "0.5", "--allocation", "owls"], "unknown allocation 'owls'. Did you mean 'owl'?"),
    ([*MAGNITUDE, "--targets", "in_prj"], "unknown target 'in_prj'. Did you mean 'in_proj'? Allowed: "),
    ([*MAGNITUDE, "--method-kwargs", "largst=true"], "'largst'. Did you mean 'largest'? Allowed: largest"),
    (["--method", "magnitude", "--pattern", "2:4", "--sparsity", "0.7"], "contradicts sparsity=0.7"),
    (["--method", "magnitude", "--pattern", "4:2"], "pattern '4:2' keeps 4 of 2"),
    (["--method", "magnitude", "--sparsity", "1.5"], "sparsity=1.5 must lie in [0, 1)"),
    (["--method", "magnitude"], "sparsity must be given"),
    ([*MAGNITUDE, "--seq-len", "1"], "seq_len=1 must be at least 2"),
    (["--method", "wanda", "--sparsity", "0.5", "--targets", "A_log"], "method 'wanda' cannot prune A_log"),
    ([*MAGNITUDE, "--dtype", "float33"], "float33"),
])  # fmt: skip
def test_a_wrong_flag_is_one_line_and_nothing_is_written(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in ssm("prune", tiny_dir, "-o", tmp_path / "out", *flags).error()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--dataset", "{tmp}/missing.txt"], "dataset '{tmp}/missing.txt' cannot be read"),
    (["--dataset", "{tmp}/missing.jsonl"], "dataset '{tmp}/missing.jsonl' is not a file"),
    (["--dataset", "{tmp}/short.txt"], "the calibration text has 3 tokens, but one block needs seq_len + 1 = 33"),
    (["--dataset", "{tmp}/empty.txt"], "holds no text"),
])  # fmt: skip
def test_a_text_that_cannot_be_used_is_one_line(
    ssm: Callable[..., Ended], assets: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "short.txt").write_text("one two three")
    (tmp_path / "empty.txt").write_text("\n\n")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    wanda = ["--method", "wanda", "--sparsity", "0.5", "--seq-len", 32, "--num-samples", 2]
    ended = ssm("prune", assets / "mamba-tiny", "-o", tmp_path / "out", *wanda, *flags)
    assert message.format(tmp=tmp_path) in ended.error()
    assert not (tmp_path / "out").exists()


def test_text_without_a_tokenizer_is_one_line(
    ssm: Callable[..., Ended], tiny_dir: Path, calibration: list[object], tmp_path: Path
) -> None:
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", "--method", "wanda", "--sparsity", 0.5, *calibration)
    assert "text needs a tokenizer" in ended.error()


def test_an_output_that_is_not_empty_is_refused_before_the_model_is_loaded(
    ssm: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optimum_ssm.pruner.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty; give another directory" in ssm("prune", "a/b", "-o", tmp_path, *MAGNITUDE).error()
    for more in ([], ["--overwrite"]):
        ended = ssm("prune", "a/b", "-o", tmp_path / "notes.txt", *MAGNITUDE, *more)
        assert "notes.txt is a file; give a directory" in ended.error()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_that_is_missing_or_of_another_type_is_one_line(ssm: Callable[..., Ended], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nowhere is not a directory" in ssm("prune", tmp_path / "nowhere", "-o", out, *MAGNITUDE).error()
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    ended = ssm("prune", tmp_path / "gpt2", "-o", out, *MAGNITUDE)
    assert "unknown model type 'gpt2'. Allowed: mamba, mamba2" in ended.error()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "gpt2" / "model.safetensors").write_bytes(b"not read")  # the config alone decides
    assert "unknown model type 'nothing'" in ssm("prune", tmp_path / "gpt2", "-o", out, *MAGNITUDE).error()
    assert not out.exists()


@pytest.mark.parametrize("text, message", [
    ("- {method: magnitude, sparsty: 0.5}", "pass 1: unknown config key 'sparsty'. Did you mean 'sparsity'?"),
    ("- {method: magnitude, sparsity: 0.5}\n- {method: magnitud, sparsity: 0.5}", "pass 2: unknown method 'magnitud'"),
    ("a: [", "cannot be read"),
    ("[]", "must hold one mapping or a non-empty list"),
    (None, "cannot be read"),
])  # fmt: skip
def test_a_wrong_recipe_is_one_line(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "recipe.yaml").write_text(text)
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")
    assert message in ended.error() and "recipe.yaml" in ended.err


def test_a_recipe_and_pruning_flags_exclude_each_other(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("{method: magnitude, sparsity: 0.5}")
    flags = ["--recipe", tmp_path / "recipe.yaml", "--seq-len", 64, "--no-sequential", "--method", "wanda"]
    message = ssm("prune", tiny_dir, "-o", tmp_path / "out", *flags).error()
    assert "--recipe already says what to prune; leave out --method, --sequential" in message
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--dtype", "bfloat16")
    assert ended.code == 0, "loading flags say nothing about pruning"


def test_a_recipe_by_name_with_another_budget(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, calibration: list[object]
) -> None:
    flags = ["--recipe", "sparsessm", "--sparsity", 0.25]
    with_ids = ssm("prune", tiny_dir, "-o", tmp_path / "out", *flags, *calibration)
    assert "text needs a tokenizer" in with_ids.error()  # so the calibration flags were heard
    pruned = ssm("prune", tiny_dir, "-o", tmp_path / "out", *flags[:1], "sparsesm", *flags[2:])
    assert "unknown recipe 'sparsesm'. Did you mean 'sparsessm'?" in pruned.error()


def test_an_interrupt_is_one_line(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optimum_ssm.pruner.run_pass", interrupted)
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", *MAGNITUDE)
    assert ended.code == 1 and ended.err.splitlines()[-1] == "interrupted; nothing was saved"
    assert not (tmp_path / "out").exists()


def test_an_interrupt_says_where_finished_blocks_are(
    ssm: Callable[..., Ended], assets: Path, calibration: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--method", "wanda", "--sparsity", 0.5, *calibration, "--resume-from", tmp_path / "blocks"]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("optimum_ssm.pruner.record_weights", interrupted)
        ended = ssm("prune", assets / "mamba-tiny", "-o", tmp_path / "out", *flags)
    blocks = tmp_path / "blocks"
    assert ended.err.splitlines()[-1] == (
        f"interrupted; no model was saved; finished blocks are in {blocks}, and the same command goes on with the others"
    )
    assert not (tmp_path / "out").exists() and len(list(blocks.glob("*block*"))) == 6
    with monkeypatch.context() as patch:
        patch.setattr("optimum_ssm.pruner.SSMPruner.push_to_hub", interrupted)
        ended = ssm("prune", assets / "mamba-tiny", "-o", tmp_path / "out", *flags, "--push-to-hub", "me/it")
    assert ended.err.splitlines()[-1] == (
        f"interrupted; the model is saved to {tmp_path / 'out'}, the upload to me/it may not be complete"
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("place", ["out", "out/blocks"])
def test_finished_blocks_and_the_model_need_two_directories(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, place: str
) -> None:
    """Otherwise the output directory is not empty when the model is ready."""
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", *MAGNITUDE, "--resume-from", tmp_path / place)
    assert f"resume_from='{tmp_path / place}' lies in the output directory" in ended.error()
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_does_not_exist(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path) -> None:
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", *MAGNITUDE, "--dtype", "float33")
    assert "dtype='float33' does not exist. Allowed: float32, bfloat16" in ended.error()


def test_pushing_gets_repository_visibility_and_token(
    ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def push(self: object, repo_id: str, **kwargs: object) -> str:
        calls.append((repo_id, kwargs))
        return "https://somewhere/commit"

    monkeypatch.setattr("optimum_ssm.pruner.SSMPruner.push_to_hub", push)
    flags = ["--push-to-hub", "me/pruned", "--private", "--token", "hf_mine"]
    ended = ssm("prune", tiny_dir, "-o", tmp_path / "out", *MAGNITUDE, *flags)
    assert ended.code == 0 and ended.out.endswith("pushed to https://somewhere/commit\n")
    assert calls == [("me/pruned", {"private": True, "token": "hf_mine", "remote_code": False})]
    assert "hf_mine" not in (tmp_path / "out" / "ssm_pruner_config.json").read_text()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SSMPrunerConfig)])
def test_every_field_of_the_config_is_a_flag_with_its_help(ssm: Callable[..., Ended], field: str) -> None:
    ended = ssm("prune", "--help")
    assert ended.code == 0
    text = " ".join(ended.out.split())
    assert f"--{field.replace('_', '-')}" in text
    described = next(f for f in dataclasses.fields(SSMPrunerConfig) if f.name == field).metadata["help"]
    assert " ".join(described.split())[:30] in text


@pytest.mark.parametrize("flags", [["--sparsity", "half"], ["--scope", "column"], ["--method-kwargs", "largest"], []])
def test_flags_that_argparse_refuses_end_with_usage(
    ssm: Callable[..., Ended], tiny_dir: Path, flags: list[str]
) -> None:
    ended = ssm("prune", tiny_dir, *flags)
    assert ended.code == 2 and "usage: optimum-ssm prune" in ended.err and "Traceback" not in ended.err


def test_the_dense_model_is_not_overwritten_by_the_pruned_one(ssm: Callable[..., Ended], tiny_dir: Path) -> None:
    before = sorted(path.read_bytes() for path in tiny_dir.iterdir() if path.is_file())
    ended = ssm("prune", tiny_dir, "-o", tiny_dir, "--overwrite", *MAGNITUDE)
    assert "the dense model would be lost" in ended.error()
    assert sorted(path.read_bytes() for path in tiny_dir.iterdir() if path.is_file()) == before
