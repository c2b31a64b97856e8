# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A model that accelerate offloads is pruned as one in memory, and what comes of it is there to stay."""

import copy
import gc
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import current_thread, main_thread

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import has_offloaded_params
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_ssm import CalibrationError, CheckpointError, ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration import block_files, block_weights
from optimum_ssm.calibration.block_weights import BlockWeights
from optimum_ssm.calibration.offload import is_offloaded, read_parameter, work_device
from optimum_ssm.methods.wanda import Wanda


pytestmark = pytest.mark.usefixtures("temporary")

OTHERS = {"backbone.embeddings": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu"}
SOME = {**OTHERS, "backbone.layers.0": "disk", "backbone.layers.1": "cpu", "backbone.layers.2": "disk"}
MAPS = {"some blocks": SOME, "everything": {"": "disk"}, "the backbone": {"backbone": "disk", "lm_head": "disk"}}


@pytest.fixture(params=["mamba", "mamba2"])
def checkpoint(
    request: pytest.FixtureRequest, make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> Path:
    make_tiny_model(request.param, num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def mamba(make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    make_tiny_model("mamba", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(block_weights, "fits_memory", lambda _: False)


def load(source: Path, ids: Tensor | None = None, device_map: object = None, **options: object) -> SSMPruner:
    settings = {"method": "wanda", "sparsity": 0.5, "dataset": ids, "seq_len": 24, "batch_size": 2, **options}
    where = {} if device_map is None else {"device_map": dict(device_map)}
    return SSMPruner.from_pretrained(source, SSMPrunerConfig(**settings), **where)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def same_weights(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    return all(torch.equal(read_parameter(one, name), p.cpu()) for name, p in two.named_parameters())


def check_like(pruner: SSMPruner, expected: SSMPruner, ids: Tensor, folder: Path) -> None:
    """In memory, in a forward, in generate, and after a save and a reload: bit for bit."""
    assert pruner.masks.keys() == expected.masks.keys()
    assert all(torch.equal(pruner.masks[name], expected.masks[name]) for name in expected.masks)
    assert pruner.report.passes[-1].block_errors == expected.report.passes[-1].block_errors
    assert same_weights(pruner.model, expected.model)
    assert torch.equal(pruner.model(ids).logits, expected.model(ids).logits)
    new = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(pruner.model.generate(ids, **new), expected.model.generate(ids, **new))
    pruner.model.save_pretrained(folder)
    assert same_weights(AutoModelForCausalLM.from_pretrained(folder), expected.model)


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_an_offloaded_model_is_pruned_as_one_in_memory(
    checkpoint: Path, token_ids: Callable[..., Tensor], tmp_path: Path, device_map: dict[str, str]
) -> None:
    ids, before = token_ids(5), contents(checkpoint)
    expected, pruner = load(checkpoint, ids), load(checkpoint, ids, device_map)
    assert is_offloaded(pruner.model)
    expected.prune()
    pruner.prune()
    for index, block in enumerate(pruner.model.base_model.layers):
        assert not is_offloaded(block) and not any(map(has_offloaded_params, block.modules()))
        assert pruner.model.hf_device_map[f"backbone.layers.{index}"] == "cpu"
    check_like(pruner, expected, ids[:2], tmp_path / "pruned")
    assert contents(checkpoint) == before, "the original files are only read"


@pytest.mark.parametrize("options", [
    {"allocation": "owl"},
    {"reconstruction_epochs": 1, "targets": ["out_proj"]},
    {"method": "state_energy", "axis": "state", "multiple_of": 1},
])  # fmt: skip
def test_a_block_that_does_not_fit_in_memory_stays_on_disk(
    mamba: Path,
    token_ids: Callable[..., Tensor],
    tmp_path: Path,
    temporary: Path,
    short_of_memory: None,
    options: dict[str, object],
) -> None:
    ids, before = token_ids(5), contents(mamba)
    expected, pruner = load(mamba, ids, **options), load(mamba, ids, SOME, **options)
    expected.prune()
    pruner.prune()
    for index in (0, 2):
        block = pruner.model.base_model.layers[index]
        assert all(parameter.is_meta for parameter in block.parameters())
        assert isinstance(block.mixer.in_proj._hf_hook, AlignDevicesHook)
        assert pruner.model.hf_device_map[f"backbone.layers.{index}"] == "disk"
    assert len(list(temporary.rglob("*.safetensors"))) == 2
    check_like(pruner, expected, ids[:2], tmp_path / "pruned")
    assert contents(mamba) == before
    del pruner, block
    gc.collect()
    assert not list(temporary.iterdir()), "the files go with the model"


def test_a_second_pass_goes_on_from_the_first(
    mamba: Path, token_ids: Callable[..., Tensor], tmp_path: Path, short_of_memory: None
) -> None:
    ids = token_ids(5)
    expected, pruner = load(mamba, ids), load(mamba, ids, SOME)
    for one in (expected, pruner):
        one.prune()
        one.prune(SSMPrunerConfig(method="sparsessm", sparsity=0.5, targets=["A_log"], dataset=ids, seq_len=24))
    check_like(pruner, expected, ids[:2], tmp_path / "pruned")


def test_a_pruned_checkpoint_is_loaded_offloaded_with_its_masks(
    mamba: Path, token_ids: Callable[..., Tensor], tmp_path: Path, short_of_memory: None
) -> None:
    pruner = load(mamba, token_ids(5), SOME)
    pruner.prune()
    pruner.save_pretrained(tmp_path / "pruned")
    again = SSMPruner.from_pretrained(tmp_path / "pruned", device_map=dict(SOME))
    assert again.masks.keys() == pruner.masks.keys()
    assert all(torch.equal(again.masks[name], mask) for name, mask in pruner.masks.items())


def hooks(model: nn.Module) -> dict[str, object]:
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


def test_a_forward_before_the_pruner_changes_neither_report_nor_fingerprint(
    mamba: Path, token_ids: Callable[..., Tensor], tmp_path: Path
) -> None:
    """Hooks that bring values break the tie between embedding and head."""
    ids = token_ids(2, 24)
    first = load(mamba, ids, MAPS["everything"], resume_from=str(tmp_path / "pieces"))
    first.prune()
    model = load(mamba, None, MAPS["everything"]).model
    model(ids)
    again = SSMPruner(model, pruning_config=first.pruning_config)
    assert again.report.parameters == first.report.parameters
    model(ids)
    assert again.prune().passes[0].earlier_blocks == 3
    assert again.report.rows == first.report.rows


def test_a_copy_of_the_model_keeps_the_files_that_it_reads(
    mamba: Path, token_ids: Callable[..., Tensor], short_of_memory: None, temporary: Path
) -> None:
    ids = token_ids(2, 24)
    pruner = load(mamba, ids, MAPS["everything"])
    pruner.prune()
    twin, logits = copy.deepcopy(pruner.model), pruner.model(ids).logits
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.8))
    assert torch.equal(twin(ids).logits, logits) and not torch.equal(pruner.model(ids).logits, logits)
    del pruner
    gc.collect()
    assert torch.equal(twin(ids).logits, logits)
    del twin
    gc.collect()
    assert not list(temporary.iterdir())


def test_blocks_that_are_only_read_have_their_own_hooks_again(mamba: Path, token_ids: Callable[..., Tensor]) -> None:
    model = load(mamba, token_ids(1), SOME).model
    before, block = hooks(model), model.base_model.layers[0]
    parameters = dict(block.named_parameters())
    with BlockWeights(model).at_hand("backbone.layers.0", block, edit=False):
        assert not is_offloaded(block)
        block.mixer.out_proj.weight.data.zero_()
    assert hooks(model) == before
    assert all(parameter is parameters[name] for name, parameter in block.named_parameters())
    assert read_parameter(model, "backbone.layers.0.mixer.out_proj.weight").any(), "what was written is forgotten"


def test_the_next_block_comes_while_one_is_worked_on(
    mamba: Path, token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(mamba, token_ids(1), SOME).model
    (first, one), (second, two) = ((f"backbone.layers.{i}", model.base_model.layers[i]) for i in (0, 2))
    parts = {module: name for name, module in model.named_modules()}
    dense, read, original = dict(two.named_parameters()), [], block_weights._values

    def values(module: nn.Module) -> dict[str, Tensor]:
        read.append((parts[module].rpartition(".mixer")[0] or parts[module].rpartition(".")[0], current_thread()))
        return original(module)

    monkeypatch.setattr(block_weights, "_values", values)
    weights = BlockWeights(model)
    with weights.at_hand(first, one, edit=False, following=two):
        before = {name for name, thread in read if thread is main_thread()}
        weights._coming[1].result()  # it is read without being asked for again
        ahead = {name for name, thread in read if thread is not main_thread()}
        assert all(two.get_parameter(name) is parameter for name, parameter in dense.items()), "and is as it was"
    assert before == {first} and ahead == {second}
    count = len(read)
    with weights.at_hand(second, two, edit=False):
        assert not is_offloaded(two)
    assert len(read) == count, "what came ahead is used"


def test_a_block_that_came_ahead_is_whole_after_an_exception(mamba: Path, token_ids: Callable[..., Tensor]) -> None:
    model = load(mamba, token_ids(1), SOME).model
    one, _, two = model.base_model.layers
    before, parameters = hooks(model), dict(two.named_parameters())
    with pytest.raises(RuntimeError, match="stop"):
        with BlockWeights(model).at_hand("backbone.layers.0", one, edit=False, following=two):
            raise RuntimeError("stop")
    assert hooks(model) == before
    assert all(two.get_parameter(name) is parameter for name, parameter in parameters.items())


def test_values_in_main_memory_are_copied_not_lent(tiny_mamba: PreTrainedModel) -> None:
    """Hooks of `cpu_offload` hold the tensors themselves."""
    name, block = "backbone.layers.0", tiny_mamba.base_model.layers[0]
    dense = block.mixer.out_proj.weight.detach().clone()
    cpu_offload(tiny_mamba, torch.device("cpu"))
    store = block.mixer.out_proj._hf_hook.weights_map.dataset
    for edit in (False, True):
        with BlockWeights(tiny_mamba).at_hand(name, block, edit=edit):
            assert torch.equal(block.mixer.out_proj.weight, dense)
            block.mixer.out_proj.weight.data.mul_(2)
        found = read_parameter(tiny_mamba, f"{name}.mixer.out_proj.weight")
        assert torch.equal(found, 2 * dense if edit else dense)
    assert f"{name}.mixer.out_proj.weight" not in store, "the values before the change are let go"
    assert "backbone.layers.1.mixer.out_proj.weight" in store


def test_hooks_are_whole_after_an_exception(
    mamba: Path, token_ids: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch, short_of_memory: None
) -> None:
    pruner, ids, calls = load(mamba, token_ids(5), SOME), token_ids(2), []
    original, names = Wanda.prune, set(hooks(pruner.model))

    def fail(self: Wanda, *rest: object) -> object:
        calls.append(1)
        if len(calls) == 3:  # in the first block
            raise RuntimeError("stop")
        return original(self, *rest)

    monkeypatch.setattr(Wanda, "prune", fail)
    with pytest.raises(RuntimeError, match="stop"):
        pruner.prune()
    assert set(hooks(pruner.model)) == names
    assert all(parameter.is_meta for parameter in pruner.model.base_model.layers[0].parameters())
    assert pruner.model(ids).logits.isfinite().all()


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), PermissionError(13, "denied")])
def test_a_disk_that_takes_no_block_is_told_and_the_block_stays_in_memory(
    mamba: Path,
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    temporary: Path,
    short_of_memory: None,
    error: Exception,
) -> None:
    def fail(_: object, path: Path) -> None:
        path.write_bytes(b"a part")
        raise error

    pruner, ids = load(mamba, token_ids(5), SOME), token_ids(2)
    monkeypatch.setattr(block_files, "save_file", fail)
    with pytest.raises(CalibrationError, match=rf"layers\.0: main memory is short.*{temporary}.*Set TMPDIR"):
        pruner.prune()
    assert not list(temporary.rglob("*.safetensors")), "no part is left to take the room"
    blocks = pruner.model.base_model.layers
    assert not is_offloaded(blocks[0]) and is_offloaded(blocks[2])
    assert pruner.model.hf_device_map["backbone.layers.0"] == "cpu"
    assert pruner.model(ids).logits.isfinite().all()


def test_no_directory_for_a_block_is_told_too(
    mamba: Path,
    token_ids: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    short_of_memory: None,
) -> None:
    pruner = load(mamba, token_ids(5), SOME)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(CalibrationError, match=r"no directory can be made in .*missing.*Set TMPDIR"):
        pruner.prune()
    assert not is_offloaded(pruner.model.base_model.layers[0])


@pytest.mark.parametrize("options, message", [
    ({"method": "gradient_magnitude"}, "takes gradients through the whole model"),
    ({"method": "state_energy", "axis": "state", "multiple_of": 1, "compensation": "bias"}, "adds parameters"),
])  # fmt: skip
def test_what_an_offloaded_model_does_not_allow_is_said_before_the_work(
    mamba: Path, token_ids: Callable[..., Tensor], options: dict[str, object], message: str
) -> None:
    pruner = load(mamba, token_ids(5), SOME, **options)
    with pytest.raises(ConfigurationError, match=message):
        pruner.prune()
    assert not pruner.report.passes


def test_an_offloaded_model_is_not_saved_over_the_files_it_reads(
    mamba: Path, token_ids: Callable[..., Tensor]
) -> None:
    pruner, before = load(mamba, token_ids(5), SOME), contents(mamba)
    with pytest.raises(CheckpointError, match="the offloaded model still reads"):
        pruner.save_pretrained(mamba, overwrite=True)
    assert contents(mamba) == before


def test_max_memory_of_the_config_is_handed_to_from_pretrained(
    mamba: Path, token_ids: Callable[..., Tensor], tmp_path: Path
) -> None:
    ids, options = token_ids(5), {"max_memory": {"cpu": 80_000}, "targets": ["out_proj"]}
    settings = SSMPrunerConfig(method="wanda", sparsity=0.5, dataset=ids, seq_len=24, batch_size=2, **options)
    pruner = SSMPruner.from_pretrained(mamba, settings, offload_folder=tmp_path / "offload")
    assert "disk" in pruner.model.hf_device_map.values() and is_offloaded(pruner.model)
    expected = load(mamba, ids, targets=["out_proj"])
    expected.prune()
    pruner.prune()
    check_like(pruner, expected, ids[:2], tmp_path / "pruned")


def test_the_device_is_the_parameters_or_the_hooks(mamba: Path, token_ids: Callable[..., Tensor]) -> None:
    model = load(mamba, token_ids(1), SOME).model
    assert work_device(model.base_model.layers[0]) == work_device(model.base_model.layers[1]) == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("fits", [True, False])
def test_blocks_offloaded_from_a_gpu(
    checkpoint: Path, token_ids: Callable[..., Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    """Blocks 1 and 2 come to the GPU one after the other, from main memory and from disk."""
    monkeypatch.setattr(block_weights, "fits_memory", lambda _: fits)
    ids = token_ids(5).cuda()
    places = {
        **dict.fromkeys(OTHERS, 0),
        "backbone.layers.0": 0,
        "backbone.layers.1": "cpu",
        "backbone.layers.2": "disk",
    }
    expected, pruner = load(checkpoint, ids, {"": 0}), load(checkpoint, ids, places)
    expected.prune()
    pruner.prune()
    assert pruner.model.hf_device_map["backbone.layers.1"] == "cpu"
    assert pruner.model.hf_device_map["backbone.layers.2"] == ("cpu" if fits else "disk")
    assert all(parameter.is_meta for parameter in pruner.model.base_model.layers[1].parameters())
    check_like(pruner, expected, ids[:2], tmp_path / "pruned")
