# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A run that was killed and goes on ends bit for bit where it would have ended; pieces of another run are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optimum_ssm import CalibrationError, CheckpointError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration.activations import Activations
from optimum_ssm.hub.shards import HALF, MARKER
from optimum_ssm.passes import pipeline
from tests.passes.interrupted import FAULTS, LAYERS, LENGTH, RUNS, SEARCHES, pruner_of


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with what every fault left behind, and what became of the processes."""
    root = tmp_path_factory.mktemp("interrupted")
    script = Path(__file__).with_name("interrupted.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(root), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done.stdout


@pytest.fixture(scope="module")
def whole() -> dict[str, SSMPruner]:
    """The runs without an interruption, and without a directory."""
    pruners = {name: pruner_of(name, None) for name in RUNS}
    for pruner in pruners.values():
        pruner.prune()
    return pruners


def assert_equal(one: SSMPruner, two: SSMPruner) -> None:
    """Weights, masks and report bit for bit; only the wall time may differ."""
    assert one.masks.keys() == two.masks.keys()
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in one.masks)
    there = dict(two.model.named_parameters())
    assert [name for name, _ in one.model.named_parameters()] == list(there)
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, there[name]), name
        assert parameter.requires_grad == there[name].requires_grad, name
    reports = [pruner.report for pruner in (one, two)]
    for fact in ("rows", "sizes", "recurrent_state_bytes", "conv_state_bytes", "loads_with"):
        assert getattr(reports[0], fact) == getattr(reports[1], fact), fact
    ids = torch.arange(LENGTH)[None]
    assert torch.equal(*(pruner.model(ids).logits for pruner in (one, two)))
    for first, second in zip(reports[0].passes, reports[1].passes, strict=True):
        second.seconds = first.seconds
        second.reconstruction_seconds = first.reconstruction_seconds
        assert first == second
    assert one.model.config.to_dict() == two.model.config.to_dict()


@pytest.mark.parametrize("fault", FAULTS)
def test_goes_on_bit_for_bit(
    fault: str,
    interrupted: tuple[Path, str],
    whole: dict[str, SSMPruner],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, output = interrupted
    run, _, finished = FAULTS[fault]
    assert f"{fault} ended by {3 if fault == 'full' else -9}" in output
    number = 2 if fault in ("second-pass", "states") else 1
    pieces = list((root / fault).glob(f"pass-{number}-block-*.safetensors"))
    assert len(pieces) == finished, "the interruption came where it should"
    applied = []
    apply_tasks = pipeline.apply_tasks
    monkeypatch.setattr(pipeline, "apply_tasks", lambda *args: applied.append(args) or apply_tasks(*args))
    pruner = pruner_of(run, root / fault)
    pruner.prune()
    assert_equal(whole[run], pruner)
    assert len(applied) == len(RUNS[run][1]) * LAYERS - finished - (number - 1) * LAYERS, (
        "finished blocks were taken over"
    )
    assert not [path for path in (root / fault).iterdir() if path.name.endswith(HALF)], "halves are cleaned away"
    assert str(root / fault) in caplog.text or not finished


@pytest.mark.parametrize("fault", SEARCHES)
def test_a_search_goes_on_bit_for_bit(
    fault: str, interrupted: tuple[Path, str], whole: dict[str, SSMPruner], caplog: pytest.LogCaptureFixture
) -> None:
    root, output = interrupted
    run, _, pieces = SEARCHES[fault]
    assert f"{fault} ended by -9" in output
    assert sorted(path.stem for path in (root / fault).glob("*.safetensors")) == pieces
    pruner = pruner_of(run, root / fault)
    pruner.prune()
    assert_equal(whole[run], pruner)
    rounds = sum("round" in piece for piece in pieces)
    assert f"pass 1: {rounds} finished rounds are taken from {root / fault}" in caplog.text


def test_what_interrupted_writes_leave(interrupted: tuple[Path, str]) -> None:
    _, output = interrupted
    assert "middle left ['pass-1-block-0002.safetensors.half']" in output
    assert "unnamed left ['pass-1-block-0003.safetensors.half']" in output
    assert "full left []" in output, "a process that lives removes its half"
    assert (
        "block-0002.safetensors cannot be written: File too large. The finished blocks before it are whole" in output
    )


def test_a_finished_run_is_not_computed_again(whole: dict[str, SSMPruner], tmp_path: Path, monkeypatch) -> None:
    pruner_of("units", tmp_path).prune()
    monkeypatch.setattr(Activations, "__init__", None)  # no forward at all
    again = pruner_of("units", tmp_path)
    again.prune()
    assert_equal(whole["units"], again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "the model's weights is another$"),
        ({"ids_seed": 6}, "the calibration text is another$"),
        ({"sparsity": 0.6}, r"config.sparsity was 0\.5, is 0\.6$"),
        ({"method_kwargs": {"variant": "l2"}}, r"config.method_kwargs was \{\}, is \{'variant': 'l2'\}$"),
        (
            {"batch_size": 1, "sequential": False},
            "config.batch_size was 2, is 1; config.sequential was True, is False$",
        ),
    ],
)
def test_pieces_of_another_run_are_refused(tmp_path_factory, changes: dict, message: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "other-run"
    if not folder.exists():
        pruner_of("weights", folder).prune()
    pruner = pruner_of("weights", folder, **changes)
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    message = message.replace("$", r"\. Give that run's settings, or another resume_from$")
    with pytest.raises(CheckpointError, match=rf"pass-1-block-0000\.safetensors was made by another run: {message}"):
        pruner.prune()
    assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())
    pruner.save_pretrained(folder.with_name(f"dense-{len(changes)}-{hash(message)}"))  # nothing is half done


def test_other_versions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruner_of("weights", tmp_path).prune()
    monkeypatch.setattr("optimum_ssm.passes.fingerprint.__version__", "99")
    with pytest.raises(CheckpointError, match=r"optimum_ssm was '[^']+', is '99'"):
        pruner_of("weights", tmp_path).prune()


def test_other_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They round otherwise, and a run that goes on promises equal bits."""
    monkeypatch.setenv("OPTIMUM_SSM_SCAN", "torch")
    pruner_of("weights", tmp_path).prune()
    monkeypatch.setenv("OPTIMUM_SSM_SCAN", "native")
    with pytest.raises(CheckpointError, match=r"kernels \(OPTIMUM_SSM_SCAN\) was 'torch', is 'native'"):
        pruner_of("weights", tmp_path).prune()


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=f"holds 'thesis.tex' and no {MARKER}"):
        pruner_of("weights", tmp_path).prune()
    with pytest.raises(CheckpointError, match="cannot be used: File exists"):
        pruner_of("weights", tmp_path / "thesis.tex").prune()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mamba", {"method": "magnitude", "axis": "state"}),
        ("mamba", {"method": "magnitude", "axis": "dt_rank", "multiple_of": 1}),
        ("mamba", {"method": "flap", "axis": "channel"}),
        ("mamba2", {"method": "magnitude", "axis": "head", "multiple_of": 2}),
        ("mamba2", {"method": "magnitude", "axis": "head_dim", "multiple_of": 2}),
        ("mamba2", {"method": "merge"}),
    ],
)
def test_blocks_that_were_cut_are_put_back_whole(
    family: str, config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes that their modules work by, too: the model runs, and the next pass finds what it would have."""
    monkeypatch.setitem(RUNS, "cut", (family, [{"sparsity": 0.5, **config}]))
    whole, first, again = (pruner_of("cut", folder) for folder in (None, tmp_path, tmp_path))
    for pruner in (whole, first, again):
        pruner.prune()
    assert again.report.passes[0].earlier_blocks == LAYERS
    assert_equal(whole, again)
    for pruner in (whole, again):
        pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["in_proj", "out_proj"]))
    assert_equal(whole, again)


@pytest.mark.parametrize("place", ["tensor", "mask", "facts"])
def test_a_wrong_bit_is_noticed(place: str, tmp_path: Path) -> None:
    pruner_of("weights", tmp_path).prune()
    piece = tmp_path / "pass-1-block-0001.safetensors"
    content = bytearray(piece.read_bytes())
    header = int.from_bytes(content[:8], "little")
    offset = {"tensor": 8 + header + 1000, "mask": len(content) - 50, "facts": content.index(b"seconds") + 1}[place]
    content[offset] ^= 0x04
    piece.write_bytes(content)
    message = r"block-0001\.safetensors cannot be read: its checksum is not that of what it holds\. Remove it"
    with pytest.raises(CheckpointError, match=message):
        pruner_of("weights", tmp_path).prune()


@pytest.mark.parametrize(("run", "piece"), [("weights", "pass-1-plan"), ("search", "pass-1-round-0000")])
def test_a_wrong_digit_is_noticed_where_there_are_no_tensors(run: str, piece: str, tmp_path: Path) -> None:
    """What a plan or a round of a search says decides what goes."""
    pruner_of(run, tmp_path).prune()
    path = tmp_path / f"{piece}.safetensors"
    content = bytearray(path.read_bytes())
    content[content.index(b"seconds") + 15] ^= 0x01
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{piece}\.safetensors cannot be read: its checksum is not"):
        pruner_of(run, tmp_path).prune()


def test_a_piece_of_another_name_is_not_taken(tmp_path: Path) -> None:
    pruner_of("weights", tmp_path).prune()
    one, two = (tmp_path / f"pass-1-block-000{number}.safetensors" for number in (0, 1))
    one.write_bytes(two.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"0000\.safetensors cannot be read: it is the piece 'pass-1-block-0001'"
    ):
        pruner_of("weights", tmp_path).prune()
    save_file({"x": torch.zeros(1)}, one, {"optimum_ssm": "{}"})
    with pytest.raises(CheckpointError, match=r"0000\.safetensors cannot be read: it says nothing of 'sha256'"):
        pruner_of("weights", tmp_path).prune()


def test_pieces_of_a_later_pass_are_looked_at_before_the_first_one(tmp_path: Path) -> None:
    """Otherwise the first pass would be done, and a second call would do it again."""
    pruner_of("states", tmp_path).prune()
    pruner = pruner_of("states", tmp_path)
    pruner.pruning_config[1].sparsity = 0.75
    before = {name: value.clone() for name, value in pruner.model.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"pass-2-[a-z0-9-]+\.safetensors was made by another run: config\.sparsity"
    ):
        pruner.prune()
    assert not pruner.report.passes
    assert all(torch.equal(value, before[name]) for name, value in pruner.model.state_dict().items())
    pruner.pruning_config[1].sparsity = 0.5
    pruner.prune()
    assert pruner.report.passes[1].earlier_blocks == LAYERS


def test_a_pass_that_changed_nothing_leaves_the_pruner_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    for run, cause in (("weights", CalibrationError("no room")), ("search", KeyboardInterrupt())):
        pruner, whole = pruner_of(run, None), pruner_of(run, None)
        through, calls = Activations.through, []

        def stopped(*args: object, cause: BaseException = cause, **kwargs: object) -> object:
            if calls:
                raise cause
            calls.append(args)
            return through(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(type(cause)):
            patch.setattr(Activations, "through", stopped)
            pruner.prune()
        for one in (pruner, whole):
            one.prune()
        assert_equal(whole, pruner)


def test_a_directory_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner_of("weights", tmp_path).prune()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # the superuser may write anywhere
    with pytest.raises(CheckpointError, match="cannot be used: Permission denied"):
        pruner_of("weights", tmp_path).prune()


def test_a_damaged_piece_is_named(tmp_path: Path, whole: dict[str, SSMPruner]) -> None:
    pruner_of("weights", tmp_path).prune()
    piece = tmp_path / "pass-1-block-0001.safetensors"
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"block-0001\.safetensors cannot be read: .* Remove it"):
        pruner_of("weights", tmp_path).prune()
    piece.unlink()
    pruner = pruner_of("weights", tmp_path)
    pruner.prune()
    assert_equal(whole["weights"], pruner)


def test_a_second_call_is_the_next_pass(tmp_path: Path) -> None:
    once, twice = pruner_of("weights", tmp_path), pruner_of("weights", tmp_path)
    for pruner in (once, twice):
        pruner.prune()
        pruner.prune([{"method": "magnitude", "sparsity": 0.7, "resume_from": str(tmp_path)}])
    assert_equal(once, twice)
    assert (tmp_path / "pass-2-block-0003.safetensors").exists()


def test_only_what_changed_is_kept(tmp_path: Path) -> None:
    pruner = pruner_of("weights", tmp_path)
    size = sum(p.numel() * p.element_size() for p in pruner.model.backbone.layers[0].parameters())
    pruner.prune([{"method": "magnitude", "sparsity": 0.5, "targets": ["A_log"], "resume_from": tmp_path}])
    assert (tmp_path / "pass-1-block-0000.safetensors").stat().st_size < size / 4


def test_the_directory_is_no_part_of_what_is_published(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pruner = pruner_of("weights", tmp_path / "pieces")
    pruner.prune()
    pruner.save_pretrained(tmp_path / "saved")
    assert f"{tmp_path / 'pieces'}' are not needed any more" in caplog.text
    for path in (tmp_path / "saved").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
