# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm eval`, `ssm inspect`, `ssm methods`, and the ways in."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from matplotlib.image import imread
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, __version__, evaluate_perplexity
from optimum_ssm.families import FAMILIES
from optimum_ssm.methods import METHODS
from optimum_ssm.methods.structures import STRUCTURES
from optimum_ssm.sparsity.allocations import ALLOCATIONS

from .conftest import Ended


ROOT = Path(__file__).resolve().parents[2]


def in_a_process(*command: object, path: object = ROOT) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------ eval


def test_eval_prints_the_perplexity_with_its_protocol(ssm: Callable[..., Ended], assets: Path) -> None:
    text = assets / "wikitext-2" / "evaluation.txt"
    flags = ["--dataset", text, "--window", 64, "--max-windows", 3, "--stride", 32, "--eval-batch-size", 2]
    ended = ssm("eval", assets / "mamba-tiny", *flags, "--dtype", "float32")
    assert ended.code == 0, ended.err
    pruner = SSMPruner.from_pretrained(assets / "mamba-tiny", dtype="float32")
    protocol = {"window": 64, "max_windows": 3, "stride": 32, "batch_size": 2}
    expected = evaluate_perplexity(pruner.model, pruner.tokenizer, text, **protocol)
    line = "evaluation.txt, 3 windows of 64 tokens, stride 32, 127 predicted tokens, float32"
    assert ended.out == f"perplexity {expected:.4f} ({line})\n"
    found = json.loads(ssm("eval", assets / "mamba-tiny", *flags, "--dtype", "float32", "--json").out)
    assert found["perplexity"] == expected and found["protocol"] == line and found["stride"] == 32


@pytest.mark.parametrize("flags, message", [
    (["--window", "1"], "perplexity needs window >= 2"),
    (["--stride", "0"], "1 <= stride <= window"),
    (["--window", "64", "--stride", "65"], "1 <= stride <= window"),
    (["--max-windows", "0"], "max_windows >= 1"),
    (["--eval-batch-size", "0"], "batch_size >= 1"),
    (["--dataset", "{tmp}/missing.txt"], "cannot be read"),
    (["--dataset", "{tmp}/short.txt"], "the text has 3 tokens, fewer than one window of 2048"),
])  # fmt: skip
def test_eval_errors_are_one_line(
    ssm: Callable[..., Ended], assets: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "short.txt").write_text("one two three")
    given = ["--dataset", assets / "wikitext-2" / "evaluation.txt", *(flag.format(tmp=tmp_path) for flag in flags)]
    assert message in ssm("eval", assets / "mamba-tiny", *given).error()


def test_eval_without_a_tokenizer_is_one_line(ssm: Callable[..., Ended], tiny_dir: Path) -> None:
    assert "has no tokenizer, so text cannot be evaluated" in ssm("eval", tiny_dir).error()
    assert "is not a directory" in ssm("eval", tiny_dir / "nowhere").error()


# ------------------------------------------------------------------ inspect


def table_of(text: str) -> dict[str, list[str]]:
    """Cells of the printed report by component."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in lines}


def test_inspect_counts_what_prune_removed(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path) -> None:
    flags = ["--method", "magnitude", "--sparsity", 0.5, "--targets", "A_log", "in_proj"]
    assert ssm("prune", tiny_dir, "-o", tmp_path / "out", *flags).code == 0
    ended = ssm("inspect", tmp_path / "out", "--plot", tmp_path / "shares.png")
    assert ended.code == 0, ended.err
    rows = table_of(ended.out)
    assert rows["A_log"][1] == "512" and rows["in_proj"][1] == "4,096" and rows["out_proj"][1] == "0"
    assert rows["whole model"][1] == "4,608" and "Pass" not in ended.out
    assert imread(tmp_path / "shares.png").std() > 0.05


def test_inspect_counts_zeros_that_another_program_left(
    ssm: Callable[..., Ended], tiny_mamba: PreTrainedModel, tmp_path: Path
) -> None:
    """In A_log a zero is a decay rate of 1, not a removal, unless a settings file says otherwise."""
    mixer = tiny_mamba.base_model.layers[1].mixer
    mixer.out_proj.weight.data[:, ::2] = 0
    mixer.A_log.data[:, 0] = 0
    tiny_mamba.save_pretrained(tmp_path / "foreign")
    ended = ssm("inspect", tmp_path / "foreign")
    rows = table_of(ended.out)
    assert rows["whole model"][:2] == ["19,936", "1,024"] and rows["A_log"][1] == "0"
    assert rows["out_proj"][1:3] == ["1,024", "25.00 %"]
    assert all(all(cells) for cells in rows.values())


@pytest.mark.parametrize("plot", ["missing/shares.png", "shares.xyz"])
def test_inspect_errors_are_one_line(ssm: Callable[..., Ended], tiny_dir: Path, tmp_path: Path, plot: str) -> None:
    assert "cannot draw" in ssm("inspect", tiny_dir, "--plot", tmp_path / plot).error()
    assert "is not a directory" in ssm("inspect", tmp_path / "nowhere").error()


# ------------------------------------------------------------------ methods


def test_methods_lists_every_entry_of_the_registries(ssm: Callable[..., Ended]) -> None:
    ended = ssm("methods")
    assert ended.code == 0
    for registry in (METHODS, STRUCTURES, ALLOCATIONS):
        section = ended.out.partition(f"{registry.kind}s:\n")[2]
        for name, entry in registry.items():
            line = next(line for line in section.splitlines() if line.split()[:1] == [name])
            axes = f" [{', '.join(entry.axes)}]" if registry is STRUCTURES else ""
            assert line.endswith(entry.summary + axes)
    for name, family in FAMILIES.items():
        assert any(line.split()[:1] == [name] and family.model_types[0] in line for line in ended.out.splitlines())
    assert "variant='c2'" in ended.out


@pytest.mark.parametrize("name", [*METHODS.names(), *STRUCTURES.names(), *ALLOCATIONS.names()])
def test_methods_shows_one_entry_in_full(ssm: Callable[..., Ended], name: str) -> None:
    ended = ssm("methods", name)
    assert ended.code == 0
    for registry in (METHODS, STRUCTURES, ALLOCATIONS):
        if name in registry.names():
            entry = registry.get(name)
            assert f"{registry.kind} {name}\nsource: {entry.source}" in ended.out
            assert entry.__doc__.strip().splitlines()[0] in ended.out


def test_methods_suggests_what_was_meant(ssm: Callable[..., Ended]) -> None:
    assert "unknown method or allocation 'wnda'. Did you mean 'wanda'?" in ssm("methods", "wnda").error()


# ------------------------------------------------------------------ ways in


def test_without_a_command_the_help_is_printed(ssm: Callable[..., Ended]) -> None:
    ended = ssm()
    assert ended.code == 1 and all(name in ended.out for name in ("prune", "eval", "inspect", "methods"))
    assert ssm("--version").out.strip() == __version__
    assert ssm("prunes").code == 2


def test_python_dash_m_prunes_and_fails_like_the_function(assets: Path, tiny_dir: Path, tmp_path: Path) -> None:
    flags = ["prune", tiny_dir, "-o", tmp_path / "out", "--method", "magnitude"]
    done = in_a_process("-m", "optimum_ssm", *flags, "--sparsity", 0.5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"saved to {tmp_path / 'out'}\n") and (tmp_path / "out" / "model.safetensors").exists()
    failed = in_a_process("-m", "optimum_ssm", *flags, "--sparsity", 1.5)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr == "error: sparsity=1.5 must lie in [0, 1)\n"


@pytest.mark.parametrize(
    "args", [["prune", "--help"], ["eval", "--help"], ["--help"], ["prune", "m", "-o", "o", "--recipe"]]
)
def test_reading_flags_imports_no_heavy_library(args: list[str]) -> None:
    """optimum-cli does it for every command of its own."""
    code = (
        "import sys\n"
        "from optimum_ssm.__main__ import main\n"
        f"sys.argv = ['optimum-ssm', *{args!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib', 'accelerate'} & set(sys.modules)))\n"
    )
    done = in_a_process("-c", code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_optimum_cli_finds_the_command(tmp_path: Path) -> None:
    """The register folder becomes part of optimum's namespace: by the installation, or here by hand where there is none."""
    source = ROOT / "optimum_ssm" / "commands" / "register" / "register_ssm.py"
    assert not (source.parent / "__init__.py").exists(), "it would hide other packages' commands"
    path = str(ROOT)
    if find_spec("optimum.commands.register") is None or find_spec("optimum.commands.register.register_ssm") is None:
        folder = tmp_path / "optimum" / "commands" / "register"
        folder.mkdir(parents=True)
        (folder / source.name).write_text(source.read_text())
        path = os.pathsep.join((str(tmp_path), path))
    done = in_a_process("-m", "optimum.commands.optimum_cli", "ssm", "methods", "wanda", path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("method wanda\nsource: Sun et al.")
    helped = in_a_process("-m", "optimum.commands.optimum_cli", "--help", path=path)
    assert "ssm" in helped.stdout
