# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo on the CPU, NCCL where there are two GPUs) end where one does, and hold the same bits."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from optimum_ssm.calibration.ranks import ALONE, Ranks, check_model, current_ranks, own_device_map
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.passes.sharing import share_out
from tests.calibration.two_ranks import RUNS, held


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[str], dict[str, Any], Path]:
    """What the two processes held and said, and what one process holds."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # what torchrun sets; its agent would import torch once more
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < 2:
        common["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(folder)]
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=ROOT))
    try:
        alone = {name: held(name) for name in RUNS}
        said = ["".join(process.communicate(timeout=240)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), said[0] + said[1]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)], said, alone, folder


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_are_as_one(launched: tuple, run: str) -> None:
    (first, second), _, alone, _ = launched
    assert first["count"] == second["count"] == 2
    one, two, single = first[run], second[run], alone[run]
    for what in ("masks", "weights"):
        assert one[what].keys() == two[what].keys() == single[what].keys()
        for name, value in one[what].items():
            assert torch.equal(value, two[what][name]), f"{what} of {name} differ between the processes"
    for name, mask in single["masks"].items():
        assert torch.equal(one["masks"][name], mask), (
            f"{name}: {int((one['masks'][name] ^ mask).sum())} entries differ"
        )
    assert one["statistics"].keys() == single["statistics"].keys()
    for name, value in single["statistics"].items():
        assert (one["statistics"][name] - value).abs().max() <= 1e-6 * value.abs().max(), name
    for name, value in single["weights"].items():
        torch.testing.assert_close(
            one["weights"][name], value, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert one["units"] == two["units"] == single["units"]
    assert one["tokens"] == single["tokens"]
    assert one["errors"] == two["errors"]
    for error, expected in zip(one["errors"], single["errors"], strict=True):
        assert error == expected or error == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert one["perplexity"] == two["perplexity"]
    assert one["perplexity"] == pytest.approx(single["perplexity"], rel=1e-4)


@pytest.mark.parametrize("run", [name for name in RUNS if name.startswith("batches")])
def test_shared_in_whole_batches_all_is_the_same_to_the_bit(launched: tuple, run: str) -> None:
    """Also weights that SparseGPT has updated, and whatever the order in which sums were taken."""
    (first, _), _, alone, _ = launched
    for what in ("statistics", "masks", "weights"):
        for name, value in alone[run][what].items():
            assert torch.equal(first[run][what][name], value), f"{what} of {name} differ"


def test_statistics_were_taken_of_all_blocks(launched: tuple) -> None:
    """Oracles above would hold for statistics of nothing: there are some, and of every kind of sum."""
    names = {name.rpartition(" ")[2] for run in launched[2].values() for name in run["statistics"]}
    assert {"col_energy", "gram", "conv_gram", "decay_error", "state_prev", "decay_sum", "state_energy",
            "sequence_activity", "grad_abs"} <= names  # fmt: skip


def test_failures_are_those_of_all_processes(launched: tuple) -> None:
    (first, second), _, _, _ = launched
    few = "ConfigurationError: 1 calibration blocks cannot be shared by 2 processes; give num_samples of at least 2"
    for found in (first, second):
        assert found["few"].startswith(few)
        assert found["others"] == (
            "ConfigurationError: the 2 processes were given calibration texts that differ; all need the same"
        )
        assert found["models"].endswith("were given models that differ; all need the same")
        assert found["solve"].endswith("backbone.layers.0.mixer.out_proj: no score for this one")
        assert found["room"] == ["CalibrationError: no room here"] * 2
        for said in found["forward"]:
            assert said.startswith("CalibrationError: backbone.layers.0: activations are not finite"), said
        assert found["save again"].startswith("CheckpointError: ") and "is not empty" in found["save again"]


def test_one_process_writes_and_speaks(launched: tuple) -> None:
    (first, second), said, _, folder = launched
    assert first["saved there"] and second["saved there"], "the others wait until it is written"
    assert (folder / "pieces" / "pass-1-block-0001.safetensors").exists()
    for name, value in first["resumed"][0].items():
        assert all(torch.equal(value, other[name]) for found in (first, second) for other in found["resumed"]), name
    assert "are taken from" in said[0] and "not needed any more" in said[0]
    assert "optimum_ssm" not in said[1] and "taken from" not in said[1] and "fewer than" not in said[1], said[1]


def test_a_search_goes_on_in_both_processes(launched: tuple) -> None:
    (first, second), _, _, folder = launched
    whole = first["block_drop"]
    for found in (first["search resumed"], second["search resumed"]):
        assert found["stopped"] == "CalibrationError: stop"
        assert [len(left) for left in found["rounds"]] == [3, 2, 2], "the first round is not repeated"
        assert found["units"] == {**whole["units"], "scores": whole["scores"]}
        assert found["weights"].keys() == whole["weights"].keys()
        assert all(torch.equal(value, whole["weights"][name]) for name, value in found["weights"].items())
    assert sorted(path.stem for path in (folder / "rounds").glob("*.safetensors")) == [
        "pass-1-round-0000", "pass-1-round-0001"
    ]  # fmt: skip


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert current_ranks() is ALONE
    monkeypatch.setattr("optimum_ssm.calibration.ranks.distributed", None)  # any use would raise
    blocks = torch.arange(6).reshape(3, 2)
    assert ALONE.share(blocks).equal(blocks)
    assert ALONE.sums(1.5, 2) == (1.5, 2) and ALONE.gather("x") == ["x"]
    assert ALONE.sum_(blocks) is blocks and ALONE.broadcast_(blocks) is blocks
    ALONE.same("models", 1)
    ALONE.agree(None)
    assert ALONE.on_main(lambda: 3) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("samples", [4, 5, 7])
def test_every_block_is_read_once(samples: int, batch_size: int) -> None:
    blocks = torch.arange(samples)[:, None]
    parts = [Ranks(index, 3).share(blocks, batch_size) for index in range(3)]
    assert sorted(torch.cat(parts).flatten().tolist()) == list(range(samples))
    batches = [batch.flatten().tolist() for batch in blocks.split(batch_size)]
    if len(batches) >= 3:
        assert all(batch.flatten().tolist() in batches for part in parts for batch in part.split(batch_size))
        assert max(map(len, parts)) - min(map(len, parts)) <= batch_size
    else:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_costs_are_balanced() -> None:
    assert share_out([8, 1, 7, 1, 1], 2) == [0, 1, 1, 0, 1]
    assert share_out([3, 3, 3], 1) == [0, 0, 0]
    assert share_out([1, 5], 4) == [1, 0]


def test_sharded_models_are_refused(tiny_mamba: nn.Module) -> None:
    tiny_mamba.backbone.layers[1].mixer.D.ds_id = 3  # as DeepSpeed marks what it shards
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mixer\.D is sharded over processes \(FSDP, ZeRO"):
        check_model(tiny_mamba, ALONE)


def test_auto_means_the_own_device() -> None:
    gpu = torch.device("cuda", 3)
    assert own_device_map("auto", ALONE) == "auto"
    assert own_device_map("auto", Ranks(1, 2, gpu)) == {"": gpu}
    assert own_device_map({"": 1}, Ranks(1, 2, gpu)) == {"": 1}
    assert own_device_map("auto", Ranks(1, 2)) == {"": "cpu"}
