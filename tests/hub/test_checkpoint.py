# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: everything is in it, and whatever is wrong with one is told in a single line."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from matplotlib.image import imread
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from optimum_ssm import CheckpointError, PruningReport, SSMPruner
from optimum_ssm.hub.checkpoint import load_license, load_model, load_settings, load_tokenizer, read_json


FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "pruning.png", "report.json",
    "ssm_pruner_config.json",
}  # fmt: skip


@pytest.fixture
def pruner(tiny_mamba: PreTrainedModel) -> SSMPruner:
    pruner = SSMPruner(
        tiny_mamba, pruning_config={"method": "magnitude", "sparsity": 0.5, "targets": ["in_proj", "A_log"]}
    )
    pruner.prune()
    return pruner


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PruningReport, "plot", lambda self, path: Path(path).write_bytes(b"no picture"))


def test_everything_that_belongs_to_a_pruned_model_is_saved(pruner: SSMPruner, tmp_path: Path) -> None:
    pruner.save_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    settings = json.loads((tmp_path / "out" / "ssm_pruner_config.json").read_text())
    assert settings["format_version"] == 1
    (only,) = settings["passes"]
    assert (only["method"], only["sparsity"], only["a_log_fill"]) == ("magnitude", 0.5, "memoryless")
    assert PruningReport.from_json((tmp_path / "out" / "report.json").read_text()) == pruner.report
    assert imread(tmp_path / "out" / "pruning.png").std() > 0.05
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"


def test_config_json_stays_a_plain_model_config(pruner: SSMPruner, tmp_path: Path, no_picture: None) -> None:
    """A sparsity or quantization entry would stop other readers, or run code in them."""
    before = pruner.model.config.to_dict()
    pruner.save_pretrained(tmp_path / "out")
    after = pruner.model.config.to_dict()
    named_by_transformers = {"dtype", "architectures"}
    assert {
        key for key in before if before[key] != after[key]
    } <= named_by_transformers and before.keys() == after.keys()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {key for key in saved if "sparsity" in key or "quantization" in key or "prun" in key}
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {n for n, _ in pruner.model.named_parameters()}


def test_the_tokenizer_is_saved_beside_the_model(assets: Path, tmp_path: Path, no_picture: None) -> None:
    pruner = SSMPruner.from_pretrained(assets / "mamba-tiny", {"method": "magnitude", "sparsity": 0.5})
    pruner.save_pretrained(tmp_path / "out")
    text = "The valkyria chronicles @-@ 3 , été"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == pruner.tokenizer(text)


# ------------------------------------------------------------------ saving, whole or not at all


def test_a_directory_that_holds_something_is_refused_and_untouched(
    pruner: SSMPruner, tmp_path: Path, no_picture: None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match="out is not empty"):
        pruner.save_pretrained(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="file is a file; give a directory"):
            pruner.save_pretrained(tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_overwrite_replaces_what_was_there(pruner: SSMPruner, tmp_path: Path, no_picture: None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_text("of another model")
    (tmp_path / "out" / "config.json").write_text("{}")
    pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    pruner.prune({"method": "magnitude", "sparsity": 0.75, "targets": ["out_proj"]})
    pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert PruningReport.from_json((tmp_path / "out" / "report.json").read_text()) == pruner.report
    assert 'method: "magnitude"\nsparsity: 0.75' in (tmp_path / "out" / "README.md").read_text(), "no stale card"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_may_be_saved_over_the_directory_it_came_from(
    pruner: SSMPruner, tmp_path: Path, token_ids: Callable[..., Tensor], no_picture: None
) -> None:
    pruner.save_pretrained(tmp_path / "out")
    back = SSMPruner.from_pretrained(tmp_path / "out")
    back.prune({"method": "magnitude", "sparsity": 0.5, "targets": ["out_proj"]})
    back.save_pretrained(tmp_path / "out", overwrite=True)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(reloaded(token_ids()).logits, back.model(token_ids()).logits)


FAILURES = {
    "model": ("transformers.PreTrainedModel.save_pretrained", SafetensorError("I/O error: No space left on device")),
    "picture": ("optimum_ssm.report.PruningReport.plot", OSError(errno.ENOSPC, "No space left on device")),
    "card": ("optimum_ssm.hub.checkpoint.write_card", OSError(errno.ENOSPC, "No space left on device")),
    "settings": ("pathlib.Path.write_text", OSError(errno.ENOSPC, "No space left on device")),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_leaves_the_old_checkpoint_whole(
    pruner: SSMPruner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_picture: None,
    where: str,
    existing: bool,
) -> None:
    if existing:
        pruner.save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out/*")}
    name, error = FAILURES[where]

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(name, fail)
        with pytest.raises(CheckpointError, match="^cannot write .*/out: .*No space left on device") as caught:
            pruner.save_pretrained(tmp_path / "out", overwrite=True)
    assert caught.value.__cause__ is error and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out/*")} == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    pruner.save_pretrained(tmp_path / "out", overwrite=True)


# ------------------------------------------------------------------ loading what is not right


def one_line(message: str, action: Callable[[], object]) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.fixture
def folder(pruner: SSMPruner, tmp_path: Path, no_picture: None) -> Path:
    pruner.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_a_directory_that_is_missing_or_holds_no_model(tmp_path: Path) -> None:
    one_line(f"^{tmp_path}/nowhere is not a directory$", lambda: SSMPruner.from_pretrained(tmp_path / "nowhere"))
    one_line(r"^\./nowhere is not a directory$", lambda: SSMPruner.from_pretrained("./nowhere"))
    one_line("has no config.json", lambda: SSMPruner.from_pretrained(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    one_line("cannot be loaded: .*no file named model.safetensors", lambda: SSMPruner.from_pretrained(tmp_path))


def test_a_hub_id_that_is_not_in_the_cache_is_one_line_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_line("nobody/nothing", lambda: SSMPruner.from_pretrained("nobody/nothing", cache_dir=tmp_path))


@pytest.mark.parametrize("text, message", [
    ("{", "config.json of .* cannot be read"),
    ("[]", "config.json of .* is a JSON list, not an object"),
    ("{}", "cannot be loaded: Unrecognized model"),
    ('{"model_type": "mamba3000"}', "cannot be loaded: .*`mamba3000`"),
])  # fmt: skip
def test_a_config_that_describes_no_model(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    one_line(message, lambda: load_model(folder))


def test_a_truncated_weight_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    for part in (data[: len(data) // 2], b"", b"no header"):
        (folder / "model.safetensors").write_bytes(part)
        one_line("out/model.safetensors cannot be loaded: ", lambda: load_model(folder))


def test_a_truncated_shard_is_named(pruner: SSMPruner, tmp_path: Path, no_picture: None) -> None:
    pruner.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    shard = sorted((tmp_path / "out").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    one_line(f"out/{shard.name} cannot be loaded: ", lambda: load_model(tmp_path / "out"))


def test_missing_weights_are_named_and_never_drawn_at_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.layers.1.mixer.A_log"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one_line(r"lacks weights of MambaForCausalLM: backbone\.layers\.1\.mixer\.A_log$", lambda: load_model(folder))


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.1.mixer.A_log"] = tensors["backbone.layers.1.mixer.A_log"][:, :4].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    one_line("out cannot be loaded: ", lambda: load_model(folder))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("change, message", [
    (lambda v: v.update(format_version=2), "was written in format 2 of ssm_pruner_config.json; .* reads format 1"),
    (lambda v: v.pop("format_version"), "was written in format None"),
    (lambda v: v.pop("passes"), "ssm_pruner_config.json of .* cannot be read: 'passes'"),
    (lambda v: v.update(passes=["wanda"]), "ssm_pruner_config.json of .* cannot be read"),
])  # fmt: skip
def test_settings_that_do_not_fit(folder: Path, change: Callable[[dict], object], message: str) -> None:
    edit(folder / "ssm_pruner_config.json", change)
    one_line(message, lambda: SSMPruner.from_pretrained(folder))


def test_past_passes_are_history_whatever_is_registered_now(folder: Path, tmp_path: Path, no_picture: None) -> None:
    """A method of the user's own is not there in every process that opens what it pruned."""
    edit(folder / "ssm_pruner_config.json", lambda v: v["passes"][0].update(method="gone", colour="red"))
    pruner = SSMPruner.from_pretrained(folder)
    pruner.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "ssm_pruner_config.json").read_text())["passes"][0]["method"] == "gone"


def test_settings_without_their_report(folder: Path) -> None:
    (folder / "report.json").write_text("{}")
    named = f"^report.json of {folder}: the pruning report cannot be read: it has no 'version'$"
    one_line(named, lambda: SSMPruner.from_pretrained(folder))
    (folder / "report.json").unlink()
    one_line("reads format 1 with its report.json", lambda: SSMPruner.from_pretrained(folder))


def test_a_dense_checkpoint_has_no_settings(tiny_mamba: PreTrainedModel, tmp_path: Path) -> None:
    tiny_mamba.save_pretrained(tmp_path)
    assert load_settings(tmp_path) is None and load_license(tmp_path) is None
    assert read_json(tmp_path, "report.json", {}) is None
    assert load_tokenizer(tmp_path, {"model_type": "mamba"}) is None


def test_a_dataset_in_memory_is_described_and_comes_back_as_that(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], tmp_path: Path, no_picture: None
) -> None:
    pruner = SSMPruner(tiny_mamba)
    pruner.prune({"method": "wanda", "sparsity": 0.5, "dataset": token_ids(), "seq_len": 24})
    pruner.save_pretrained(tmp_path / "out")
    (config,), report = load_settings(tmp_path / "out")
    assert config.dataset == "<Tensor in memory>" == report.passes[0].config["dataset"]
