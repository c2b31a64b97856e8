# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what is counted, who takes turns, and what the report says of it.

No test asserts a time; only that times go to the right rows.
"""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from transformers import PreTrainedModel
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback

from optimum_ssm.errors import CheckpointError, ConfigurationError
from optimum_ssm.evaluation import benchmark_runs
from optimum_ssm.evaluation.benchmark import benchmark
from optimum_ssm.evaluation.benchmark_facts import implementation
from optimum_ssm.evaluation.benchmark_report import BenchmarkReport
from optimum_ssm.families import family_of
from optimum_ssm.hub.weight_files import file_bytes
from optimum_ssm.ops.native_library import library_obstacle
from optimum_ssm.surgery.cut import cut


CPU = torch.device("cpu")
QUICK = {"batch_sizes": (1, 3), "prompt": 20, "new_tokens": 3, "repeats": 2}


# ------------------------------------------------------------------ what is counted


def test_sizes_and_states(make_tiny_model: Callable) -> None:
    models = {
        "m1": make_tiny_model("mamba"),
        "m2": make_tiny_model("mamba2"),
        "n4": make_tiny_model("mamba", state_size=4),
    }
    before = {name: model.config.to_dict() for name, model in models.items()}
    report = benchmark(models, **QUICK)
    m1, m2, n4 = report.models
    assert (m1.recurrent_state_bytes, m1.conv_state_bytes) == (2 * 64 * 8 * 4, 2 * 64 * 4 * 4)
    assert (m2.recurrent_state_bytes, m2.conv_state_bytes) == (2 * 8 * 8 * 8 * 4, 2 * (64 + 2 * 2 * 8) * 4 * 4)
    assert n4.recurrent_state_bytes * 2 == m1.recurrent_state_bytes
    for facts, model in zip(report.models, models.values()):
        assert facts.parameters == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        assert facts.weight_bytes == 4 * facts.parameters and facts.weight_source == "parameters in memory"
    assert m1.parameters - n4.parameters == 2 * (64 * 4 + 64 * 2 * 4)  # A_log, and the rows of B and C in x_proj
    assert {name: model.config.to_dict() for name, model in models.items()} == before


def test_bytes_of_directories_are_those_of_their_files(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path / "one")
    tiny_mamba.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    report = benchmark([tmp_path / "one", str(tmp_path / "many")], (1,), 4, 1, 1)
    assert [facts.name for facts in report.models] == ["./one", "./many"]
    assert [facts.weight_bytes for facts in report.models] == [file_bytes(tmp_path / name) for name in ("one", "many")]
    assert all(facts.weight_source == "files" for facts in report.models)


def test_blocks_of_different_sizes_are_counted_one_by_one(tiny_mamba2: PreTrainedModel) -> None:
    family = family_of(tiny_mamba2)
    for (_, block), kept in zip(family.blocks(tiny_mamba2), (3, 2)):  # heads of each of two groups
        cut(family, block, family.axes(block)["head"], torch.arange(4).repeat(2) >= kept)
    report = benchmark({"uneven": tiny_mamba2}, **QUICK)
    assert report.models[0].recurrent_state_bytes == (6 + 4) * 8 * 8 * 4
    assert report.models[0].parameters == sum(parameter.numel() for parameter in tiny_mamba2.parameters())
    assert all(row.status == "ok" for row in report.rows)


def test_the_implementation_is_named(either_tiny_model: PreTrainedModel) -> None:
    ours = benchmark({"a": either_tiny_model}, (1,), 4, 1, 1, scan="auto").models[0]
    theirs = benchmark({"a": either_tiny_model}, (1,), 4, 1, 1, scan="transformers").models[0]
    native = either_tiny_model.config.model_type == "mamba" and library_obstacle() is None
    assert (
        ours.scan == f"optimum_ssm ({'native' if native else 'torch'})"
        and theirs.scan == "torch fallback of transformers"
    )
    assert ours.conv == ours.state_update == "torch fallback of transformers"
    assert implementation(use_kernel_func_from_hub_with_fallback("dumps", "json")(lambda text: text)) == "json"


# ------------------------------------------------------------------ turns


class Logged(benchmark_runs.Run):
    """Writes down when it runs; runs out of memory at its `fails`-th call."""

    tokens = 10

    def __init__(self, name: str, log: list[str], fails: int | None = None, error: Exception | None = None):
        self.name, self.log, self.fails = name, log, fails
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def prepare(self, device: torch.device) -> int | None:
        self.log.append(f"prepare {self.name}")
        if self.fails == 0:
            raise self.error
        return 5

    def __call__(self) -> None:
        self.log.append(self.name)
        if self.fails is not None and self.log.count(self.name) == self.fails:
            raise self.error


def test_models_take_turns_after_a_warm_up() -> None:
    log: list[str] = []
    rows = benchmark_runs.take_turns({name: Logged(name, log) for name in "ab"}, "decode", 4, 3, CPU)
    assert log == ["prepare a", "prepare b", "a", "b", "a", "b", "a", "b"]
    a, b = rows
    assert (a.model, a.phase, a.batch_size, a.tokens, a.peak_memory_bytes) == ("a", "decode", 4, 10, 5)
    assert len(a.seconds) == len(b.seconds) == 3 and a.ratios == [1.0] * 3
    assert b.ratios == [slow / fast for slow, fast in zip(a.seconds, b.seconds)]
    assert a.tokens_per_second == [10 / seconds for seconds in a.seconds]


@pytest.mark.parametrize("fails", [0, 2])
def test_who_runs_out_of_memory_drops_out_and_the_others_go_on(fails: int) -> None:
    log: list[str] = []
    rows = benchmark_runs.take_turns({"a": Logged("a", log, fails), "b": Logged("b", log)}, "prefill", 1, 3, CPU)
    assert log.count("a") == fails and log.count("b") == 3
    assert [row.status for row in rows] == ["out of memory", "ok"]
    assert rows[0].seconds == rows[1].ratios == [] and rows[0].peak_memory_bytes is None and len(rows[1].seconds) == 3


@pytest.mark.parametrize("cause", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
])  # fmt: skip
def test_an_error_that_a_lack_of_memory_caused_counts_as_one(cause: Exception) -> None:
    error = RuntimeError("operation failed due to a previous error during capture")
    error.__context__ = cause
    rows = benchmark_runs.take_turns({"a": Logged("a", [], 1, error)}, "decode", 1, 2, CPU)
    assert rows[0].status == "out of memory"


def test_any_other_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        benchmark_runs.take_turns({"a": Logged("a", [], 1, RuntimeError("shapes"))}, "decode", 1, 2, CPU)


def test_a_real_lack_of_memory_is_reported(tiny_mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator itself refuses."""
    forward = tiny_mamba.forward

    def hungry(input_ids: torch.Tensor, **kwargs: object) -> object:
        if len(input_ids) == 3:
            torch.empty(10**15)
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(tiny_mamba, "forward", hungry)
    report = benchmark({"a": tiny_mamba}, **QUICK)
    assert [row.status for row in report.rows] == ["ok", "out of memory"] * 2
    assert str(report).count("out of memory") == 2


# ------------------------------------------------------------------ the report


@pytest.fixture(scope="module")
def report(make_tiny_model: Callable) -> BenchmarkReport:
    """Two models in two phases at two batch sizes."""
    models = {"dense": make_tiny_model("mamba"), "half, state": make_tiny_model("mamba", state_size=4)}
    return benchmark(models, **QUICK)


def test_rows(report: BenchmarkReport) -> None:
    expected = [
        (phase, n, name) for phase in ("prefill", "decode") for n in (1, 3) for name in ("dense", "half, state")
    ]
    assert [(row.phase, row.batch_size, row.model) for row in report.rows] == expected
    assert [row.tokens for row in report.rows[::2]] == [20, 60, 3, 9]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 and row.peak_memory_bytes is None for row in report.rows)
    assert [row.decode for row in report.rows] == [""] * 4 + ["eager"] * 4
    assert report.settings["prompt_length"] == 20 and report.settings["decode_prompt_length"] == 16


def test_every_form_tells_the_same(report: BenchmarkReport) -> None:
    found = json.loads(report.to_json())
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    cells = [
        line.split("|") for line in report.to_markdown().splitlines() if line.startswith(("| prefill", "| decode"))
    ]
    assert len(lines) == len(found["rows"]) == len(cells) == 8 and found["version"] == 1
    for row, line, value, shown in zip(report.rows, lines, found["rows"], cells):
        middle = sum(row.tokens_per_second) / 2  # of two runs
        assert float(line["tokens_per_second"]) == pytest.approx(middle) == value["tokens_per_second"]
        assert shown[4].strip() == f"{middle:,.1f}" and value["seconds"] == row.seconds
        assert line["model"] == value["model"] == shown[3].strip() == row.model
        assert float(line["ratio_max"]) == max(row.ratios) == value["ratio_max"]
        if row.model != "dense":
            assert shown[6].strip() == f"{sum(row.ratios) / 2:.2f}"
    assert [line["recurrent_state_bytes"] for line in lines[:2]] == ["4096", "2048"]
    assert found["models"][1]["recurrent_state_bytes"] == 2048
    text = report.to_markdown()
    state = next(line for line in text.splitlines() if "recurrent state" in line)
    assert [cell.strip() for cell in state.split("|")[2:-1]] == ["4,096", "2,048", "0.500"]
    native = "native" if library_obstacle() is None else "torch"
    assert f"Scan: optimum_ssm ({native})." in text and "Peak memory is not measured on cpu." in text


def test_the_files_and_the_picture(report: BenchmarkReport, tmp_path: Path) -> None:
    report.write(tmp_path)
    assert (tmp_path / "benchmark.md").read_text() == str(report) + "\n"
    assert (tmp_path / "benchmark.csv").read_text() == report.to_csv()
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(report.to_json())
    assert imread(tmp_path / "benchmark.png").std() > 0.05
    with pytest.raises(CheckpointError, match="cannot draw"):
        report.plot(tmp_path / "picture.xyz")
    with pytest.raises(CheckpointError, match="cannot write"):
        report.write(tmp_path / "missing")


def test_a_cell_without_memory_is_drawn_and_written(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    report = benchmark({"a": tiny_mamba, "b": tiny_mamba}, (1,), 4, 1, 1)
    report.rows[0].seconds, report.rows[0].status = [], "out of memory"
    report.rows[0].ratios = report.rows[1].ratios = []
    report.write(tmp_path)
    assert "out of memory" in str(report) and next(csv.DictReader(io.StringIO(report.to_csv())))["ratio"] == ""


# ------------------------------------------------------------------ what a caller gives


def test_given_tokens_are_the_prompt_of_every_sequence(
    tiny_mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, forward = [], tiny_mamba.forward

    def watch(input_ids: torch.Tensor, **kwargs: object) -> object:
        seen.append(input_ids.clone())
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(tiny_mamba, "forward", watch)
    benchmark({"a": tiny_mamba}, (2,), [5, 6, 7], 1, 1, phases=["prefill"])
    assert torch.equal(seen[-1], torch.tensor([[5, 6, 7]] * 2))


def test_what_belongs_to_the_caller_is_left_alone(either_tiny_model: PreTrainedModel) -> None:
    module = sys.modules[type(either_tiny_model.base_model.layers[0].mixer).__module__]
    functions = dict(vars(module))
    either_tiny_model.train()
    either_tiny_model.lm_head.eval()
    lines: list[str] = []
    benchmark({"a": either_tiny_model}, (1,), 4, 1, 1, progress=lines.append)
    assert either_tiny_model.training and not either_tiny_model.lm_head.training and torch.is_grad_enabled()
    assert all(functions[name] is value for name, value in vars(module).items())
    assert [line.split(":")[0] for line in lines] == ["prefill, batch 1, a", "decode, batch 1, a"]


@pytest.mark.parametrize("changes, message", [
    ({"batch_sizes": (1, 0)}, "batch_sizes must be whole numbers of at least 1"),
    ({"batch_sizes": ()}, "batch_sizes must be whole numbers of at least 1"),
    ({"new_tokens": 0}, "new_tokens must be whole numbers of at least 1"),
    ({"repeats": 0}, "repeats must be whole numbers of at least 1"),
    ({"prompt": 0}, "prompt=0 must be at least 1 token"),
    ({"prompt": [3, 64]}, "token id 64 lies outside the smallest vocabulary of 64"),
    ({"prompt": [-1]}, "token id -1 lies outside"),
    ({"prompt": []}, "prompt must be a length or the token ids"),
    ({"phases": ["train"]}, "phases=.*must be some of prefill, decode"),
    ({"scan": "triton"}, "scan='triton' is not one of auto, library, transformers"),
])  # fmt: skip
def test_settings_are_refused_before_anything_runs(
    tiny_mamba: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, changes: dict, message: str
) -> None:
    monkeypatch.setattr(tiny_mamba, "forward", lambda **kwargs: pytest.fail("the model ran"))
    with pytest.raises(ConfigurationError, match=message):
        benchmark({"a": tiny_mamba}, **{**QUICK, **changes})


def test_models_are_refused(tiny_mamba: PreTrainedModel, make_tiny_model: Callable, tmp_path: Path) -> None:
    for nothing in ({}, [], "a-name"):
        with pytest.raises(ConfigurationError, match="at least one model"):
            benchmark(nothing, **QUICK)
    with pytest.raises(ConfigurationError, match="on one device.*cpu, meta"):
        benchmark({"a": tiny_mamba, "b": make_tiny_model("mamba").to("meta")}, **QUICK)
    tiny_mamba.save_pretrained(tmp_path / "good")
    with pytest.raises(CheckpointError, match="missing"):
        benchmark([tmp_path / "good", tmp_path / "missing"], **QUICK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_memory_is_measured_and_the_graph_compared(either_tiny_model: PreTrainedModel) -> None:
    report = benchmark({"a": either_tiny_model.cuda()}, **QUICK)
    weights = sum(parameter.numel() * 4 for parameter in either_tiny_model.parameters())
    assert all(row.peak_memory_bytes > weights for row in report.rows)
    assert [row.agreement for row in report.rows] == [None, None, 1.0, 1.0]
    assert "CUDA graph; tokens that equal those of eager steps: all" in str(report)
