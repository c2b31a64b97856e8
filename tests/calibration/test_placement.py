# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where the residual stream is kept changes nothing in what a pass does, and leaves nothing behind."""

import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import CalibrationError, ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration import placement
from optimum_ssm.calibration.activations import Activations, inference_state
from optimum_ssm.calibration.placement import PLACES, Batches, Pairs, Placement, choose_place
from optimum_ssm.families import family_of
from optimum_ssm.methods.wanda import Wanda


CPU = torch.device("cpu")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def mapped(folder: Path) -> list[str]:
    """Files below a folder that this process has mapped, also those without a name by now."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]


def prune(model: PreTrainedModel, ids: Tensor, **options: object) -> SSMPruner:
    settings = {
        "method": "wanda",
        "sparsity": 0.5,
        "dataset": ids,
        "seq_len": ids.shape[1],
        "batch_size": 2,
        **options,
    }
    pruner = SSMPruner(model, pruning_config=SSMPrunerConfig(**settings))
    pruner.prune()
    return pruner


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_give_back_what_was_written(place: str, dtype: torch.dtype, temporary: Path) -> None:
    values = [torch.randn(samples, 3, 4).to(dtype) for samples in (2, 2, 1)]
    with Placement(place) as where:
        batches = where.batches(3)
        for index, value in enumerate(values):
            batches[index] = value
        assert [batches.samples(index) for index in range(3)] == [2, 2, 1]
        assert batches.nbytes == sum(value.numel() * value.element_size() for value in values)
        assert all(torch.equal(a, b) and a.dtype is dtype for a, b in zip(batches, values))
        assert torch.equal(batches.rows(1, 1, 2), values[1][1:])
        handed = []
        for index, batch in enumerate(batches.read(CPU)):  # written over while it is read, in other types too
            handed.append(batch)
            batches[index] = batch.float() * 2
        assert all(torch.equal(a, 2 * b.float()) for a, b in zip(batches, values))
        assert all(torch.equal(a, b) for a, b in zip(handed, values)), "what was handed out stays"
    assert not list(temporary.iterdir())


def test_pairs_are_the_splits_of_the_batches() -> None:
    with Placement("cpu") as where:
        inputs, wishes = where.batches(2), where.batches(2)
        values = [torch.randn(5, 2, 3), torch.randn(2, 2, 3)]
        for index, value in enumerate(values):
            inputs[index], wishes[index] = value, -value
        pairs = Pairs(inputs, wishes, 2, CPU)
        expected = [part for value in values for part in value.split(2)]
        assert len(pairs) == len(expected) == 4
        assert all(torch.equal(x, part) and torch.equal(wish, -part) for (x, wish), part in zip(pairs, expected))


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("options", [
    {"targets": ["in_proj", "out_proj"]},
    {"allocation": "owl", "sequential": False},
    {"targets": ["out_proj"], "reconstruction_epochs": 1},
])  # fmt: skip
def test_the_place_of_the_stream_changes_no_bit(
    make_tiny_model: Callable[..., PreTrainedModel],
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    temporary: Path,
    place: str,
    options: dict[str, object],
) -> None:
    ids, used = token_ids(5), []
    here = prune(make_tiny_model("mamba"), ids, offload="device", **options)
    monkeypatch.setattr("optimum_ssm.calibration.placement.choose_place", lambda *_: place)
    original = Placement.room
    monkeypatch.setattr(Placement, "room", lambda self, like: used.append(self.place) or original(self, like))
    there = prune(make_tiny_model("mamba"), ids, **options)
    assert set(used) == {place}
    for name, value in here.model.state_dict().items():
        assert torch.equal(value, there.model.state_dict()[name]), name
    assert here.masks.keys() == there.masks.keys()
    assert all(torch.equal(here.masks[name], there.masks[name]) for name in here.masks)
    assert here.report.passes[0].block_errors == there.report.passes[0].block_errors
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_disk(
    tiny_mamba: PreTrainedModel,
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    temporary: Path,
    fails: bool,
) -> None:
    original, seen = Wanda.prune, []

    def look(self: Wanda, *rest: object) -> object:
        seen.append((len(mapped(temporary)), len(list(temporary.rglob("*.bin")))))
        if fails and len(seen) == 3:
            raise RuntimeError("stop")
        return original(self, *rest)

    monkeypatch.setattr(Wanda, "prune", look)
    try:
        prune(tiny_mamba, token_ids(5), offload="disk")
    except RuntimeError as error:
        assert fails and str(error) == "stop"
    assert all(maps >= 6 for maps, _ in seen), "inputs and dense outputs of three batches"
    assert all(files == 0 for _, files in seen), "a killed process would leave no file"
    assert not list(temporary.iterdir())
    gc.collect()
    assert not mapped(temporary), "and no space is held"


def test_a_full_disk_is_an_error_and_not_a_signal(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(placement.os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match=r"no room for 6,144 bytes .*No space left.*TMPDIR"):
        prune(tiny_mamba, token_ids(5), offload="disk")
    assert not list(temporary.iterdir())


def test_a_pass_holds_two_copies_of_the_stream(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its inputs and its dense outputs; with reconstruction the goal too. One batch more may be on its way."""
    stores: list[Batches] = []
    held: list[int] = []
    original, write = Placement.batches, Batches.__setitem__

    def batches(self: Placement, count: int) -> Batches:
        stores.append(original(self, count))
        return stores[-1]

    def watch(self: Batches, index: int, value: Tensor) -> None:
        write(self, index, value)
        kept = {tensor.data_ptr(): tensor.nbytes for store in stores for tensor in store._kept if tensor is not None}
        held.append(sum(kept.values()))

    monkeypatch.setattr(Placement, "batches", batches)
    monkeypatch.setattr(Batches, "__setitem__", watch)
    ids = token_ids(8)
    one = ids.numel() * 32 * 4
    for options, copies in (({}, 2), ({"sequential": False}, 2), ({"reconstruction_epochs": 1}, 3)):
        stores.clear(), held.clear()
        prune(tiny_mamba, ids, **options)
        assert max(held) == copies * one


@pytest.mark.parametrize("place", PLACES)
def test_replay_is_the_relative_error_over_all_tokens(
    tiny_mamba2: PreTrainedModel, token_ids: Callable[..., Tensor], place: str
) -> None:
    (name, block), ids = family_of(tiny_mamba2).blocks(tiny_mamba2)[0], token_ids(5)
    with inference_state(tiny_mamba2), Placement(place) as where:
        stream = Activations(tiny_mamba2, block, ids, 2, where)
        x, dense = torch.cat(list(stream.hidden)), stream.through(block, name)
        d = torch.cat(list(dense))
        block.mixer.out_proj.weight.mul_(0.5)
        p = torch.cat(list(stream.outputs(block, name)))
        assert torch.equal(torch.cat(list(stream.hidden)), x)
        lost, whole = stream.replay(block, name, dense, keep=True)
        assert torch.equal(torch.cat(list(stream.hidden)), p)
    assert lost == pytest.approx(float((p - d).double().square().sum()), rel=1e-5)
    assert whole == pytest.approx(float((d - x).double().square().sum()), rel=1e-5)
    assert lost / whole == pytest.approx(0.25, rel=1e-4), "half of a linear map is lost: a quarter of its energy"


@pytest.mark.parametrize("options, pruned", [
    ({"targets": ["backbone.layers.2.mixer.out_proj"]}, [2]),
    ({"targets": ["out_proj"], "sequential": False}, [0, 1, 2]),
])  # fmt: skip
def test_errors_are_those_on_the_dense_models_own_stream(
    make_tiny_model: Callable[..., PreTrainedModel],
    token_ids: Callable[..., Tensor],
    options: dict[str, object],
    pruned: list[int],
) -> None:
    """Room that is taken over from block to block must not be that of the inputs."""
    dense, ids = make_tiny_model("mamba", num_hidden_layers=3), token_ids(4)
    found = prune(make_tiny_model("mamba", num_hidden_layers=3), ids, **options)
    with torch.no_grad():
        stream = [dense.base_model.embeddings(ids)]
        for block in dense.base_model.layers:
            stream.append(block(stream[-1]))
        for index in pruned:
            x, d = stream[index : index + 2]
            p = found.model.base_model.layers[index](x)
            expected = float((p - d).square().sum() / (d - x).square().sum())
            assert found.report.passes[0].block_errors[index] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("device, free, offload, expected", [
    ("cuda", {"cuda": 100, "cpu": 100}, None, "device"),
    ("cuda", {"cuda": 39, "cpu": 100}, None, "cpu"),
    ("cuda", {"cuda": 39, "cpu": 39}, None, "disk"),
    ("cuda", {"cuda": 39, "cpu": 39}, "cpu", "cpu"),
    ("cuda", {"cuda": 100, "cpu": 100}, "disk", "disk"),
    ("cpu", {"cpu": 40}, None, "device"),
    ("cpu", {"cpu": 39}, None, "disk"),
    ("cpu", {"cpu": 39}, "cpu", "device"),
])  # fmt: skip
def test_the_first_place_with_room_is_chosen(
    monkeypatch: pytest.MonkeyPatch, device: str, free: dict[str, int], offload: str | None, expected: str
) -> None:
    """Of what is free at most a half is taken."""
    monkeypatch.setattr(placement, "free_bytes", lambda where: free[where.type])
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda _: SimpleNamespace(free=25))
    assert choose_place(offload, 20, torch.device(device)) == expected


def test_no_room_anywhere_is_said_before_the_work(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "free_bytes", lambda _: 0)
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda _: SimpleNamespace(free=30_719))
    with pytest.raises(CalibrationError, match=r"activations take 30,720 bytes.*has \(30,719\)"):
        prune(tiny_mamba, token_ids(5))


def test_a_disk_that_was_asked_for_and_is_short_is_told_as_that(
    monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setattr(placement.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_999))
    with pytest.raises(CalibrationError) as caught:
        choose_place("disk", 2_000, CPU)
    assert str(caught.value) == (
        f"offload='disk': the calibration activations take 2,000 bytes, and {temporary}, where temporary files go, has "
        "1,999. Set TMPDIR to a larger disk, use fewer or shorter samples, leave offload out, or say offload='cpu'"
    )


@pytest.mark.parametrize("kind, use", [
    ("a file", lambda: Placement("disk")),
    ("missing", lambda: Placement("disk")),
    ("missing", lambda: choose_place("disk", 1, CPU)),
    ("none", lambda: choose_place("disk", 1, CPU)),
])  # fmt: skip
def test_a_temporary_directory_that_cannot_be_used_is_named(
    kind: str, use: Callable[[], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.write_text("")
    monkeypatch.setattr(tempfile, "tempdir", None if kind == "none" else str(place))
    if kind == "none":
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(place)])
    with pytest.raises(CalibrationError, match=rf"{place}.*Set TMPDIR to a directory that can be written to"):
        use()


@pytest.mark.parametrize("options, message", [
    ({"offload": "gpu"}, "offload 'gpu'"),
    ({"device": "cudda"}, "device='cudda' is no device"),
    ({"device": "meta"}, "computes nothing"),
    ({"max_memory": {"gpu": "2GiB"}}, "by the number of an accelerator"),
    ({"max_memory": {"cpu": [1]}}, "must give sizes"),
])  # fmt: skip
def test_the_config_refuses_places_that_do_not_exist(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SSMPrunerConfig(sparsity=0.5, **options)


def test_devices_in_max_memory_are_numbers_also_from_the_command_line() -> None:
    config = SSMPrunerConfig(sparsity=0.5, max_memory={"0": "20GiB", "cpu": "60GiB"})
    assert config.max_memory == {0: "20GiB", "cpu": "60GiB"}


@pytest.fixture
def gpu() -> Iterator[str]:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    yield "cuda"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_place_changes_no_bit_on_a_gpu(
    make_tiny_model: Callable[..., PreTrainedModel], token_ids: Callable[..., Tensor], gpu: str, place: str
) -> None:
    here = prune(make_tiny_model("mamba2").to(gpu), token_ids(9), offload="device")
    there = prune(make_tiny_model("mamba2").to(gpu), token_ids(9), offload=place)
    brought = prune(make_tiny_model("mamba2"), token_ids(9), offload=place, device=gpu)
    for name, value in here.model.state_dict().items():
        assert torch.equal(value, there.model.state_dict()[name]), name
        assert torch.equal(value.cpu(), brought.model.state_dict()[name]), name
    assert all(not parameter.is_cuda for parameter in brought.model.parameters())
