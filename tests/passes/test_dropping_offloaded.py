# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Blocks and SSMs are dropped from a model that accelerate offloads as from one in memory, and stay dropped."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import has_offloaded_params
from torch import Tensor

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration import block_weights
from optimum_ssm.calibration.activations import Activations
from optimum_ssm.calibration.offload import is_offloaded
from optimum_ssm.passes import dropping
from tests.calibration.test_offload import OTHERS, check_like, contents, same_weights
from tests.conftest import VOCABULARY, tiny_model


pytestmark = pytest.mark.usefixtures("temporary")

LAYERS = 4
SOME = {**OTHERS, **{f"backbone.layers.{i}": place for i, place in enumerate(("disk", "cpu", "disk", "disk"))}}
EVERYTHING = {"": "disk"}
IDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(5))


def config(method: str = "block_drop", **options: object) -> SSMPrunerConfig:
    common = {"sparsity": 0.5, "dataset": IDS, "seq_len": 24, "batch_size": 2}
    return SSMPrunerConfig(**{"method": method, **common, **options})


def pair(kind: str, folder: Path, device_map: dict) -> tuple[SSMPruner, SSMPruner]:
    """The same model in memory and offloaded."""
    source = folder / "dense"
    tiny_model(kind, seed=3, num_hidden_layers=LAYERS).save_pretrained(source)
    one = SSMPruner.from_pretrained(source), SSMPruner.from_pretrained(source, device_map=dict(device_map))
    assert is_offloaded(one[1].model) and not is_offloaded(one[0].model)
    return one


def check_report(pruner: SSMPruner, expected: SSMPruner) -> None:
    assert pruner.report.rows == expected.report.rows
    assert [done.units for done in pruner.report.passes] == [done.units for done in expected.report.passes]


@pytest.mark.parametrize("kind, device_map, kwargs", [
    ("mamba", SOME, {}),
    ("mamba2", EVERYTHING, {}),
    ("mamba", EVERYTHING, {"unit": "ssm"}),
    ("mamba2", SOME, {"unit": "ssm", "score": "influence"}),
])  # fmt: skip
def test_an_offloaded_model_loses_what_one_in_memory_does(
    kind: str, device_map: dict[str, str], kwargs: dict[str, str], tmp_path: Path
) -> None:
    expected, pruner = pair(kind, tmp_path, device_map)
    before = contents(tmp_path / "dense")
    for one in (expected, pruner):
        one.prune(config(method_kwargs=kwargs))
    if "unit" not in kwargs:
        assert is_offloaded(pruner.model), "what was only read is still away"
        assert len(pruner.model.base_model.layers) == LAYERS // 2
    check_report(pruner, expected)
    check_like(pruner, expected, IDS[:2], tmp_path / "once")
    for one in (expected, pruner):  # a block pass that writes, then the search on what is left, muted SSMs among it
        one.prune(
            [config("wanda", targets=["in_proj"]), config(method_kwargs=kwargs, sparsity=0.75 if kwargs else 0.5)]
        )
    assert pruner.report.passes[-1].removed
    check_report(pruner, expected)
    check_like(pruner, expected, IDS[:2], tmp_path / "twice")
    assert contents(tmp_path / "dense") == before, "the original files are only read"


def test_files_of_blocks_do_not_get_mixed_up(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later block takes the name of a dropped one, and is written under it while an earlier one still reads its own."""
    monkeypatch.setattr(block_weights, "fits_memory", lambda _: False)
    expected, pruner = pair("mamba", tmp_path, SOME | {"backbone.layers.1": "disk"})
    files = []
    for one in (expected, pruner):
        monkeypatch.setattr(dropping, "greedy", lambda *_: [(1, 0.5)])
        one.prune([config("wanda", targets=["in_proj"]), config(sparsity=0.25)])
        gc.collect()
        files.append(len(list(temporary.rglob("*.safetensors"))))
        one.prune(config("wanda", targets=["backbone.layers.2.mixer.out_proj"]))
        gc.collect()
        files.append(len(list(temporary.rglob("*.safetensors"))))
    assert files == [0, 0, 3, 3], "those of the dropped block and those that were written anew are gone"
    assert pruner.model.hf_device_map["backbone.layers.2"] == "disk"
    assert "backbone.layers.3" not in pruner.model.hf_device_map
    check_report(pruner, expected)
    check_like(pruner, expected, IDS[:2], tmp_path / "pruned")


@pytest.mark.parametrize("unit", ["block", "ssm"])
def test_values_in_main_memory_go_with_their_block(unit: str) -> None:
    expected, model = (tiny_model("mamba", seed=3, num_hidden_layers=LAYERS) for _ in range(2))
    cpu_offload(model, torch.device("cpu"))
    store = model.base_model.layers[0].mixer.out_proj._hf_hook.weights_map.dataset
    one, two = SSMPruner(expected), SSMPruner(model)
    for pruner in (one, two):
        pruner.prune(config(method_kwargs={"unit": unit}))
    assert two.report.passes[0].units == one.report.passes[0].units
    gone = two.report.passes[0].units["removed"][0]
    there = {int(name.split(".")[2]) for name in store if ".layers." in name}
    assert there == set(range(LAYERS)) - set(gone), "of a muted one, the values before the change"
    assert same_weights(model, expected)
    assert torch.equal(model(IDS).logits, expected(IDS).logits)


def test_an_interrupted_search_goes_on_offloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, pruner = pair("mamba", tmp_path, EVERYTHING)
    recipe = [
        config(method_kwargs={"unit": "ssm"}, resume_from=tmp_path / "pieces"),
        config("wanda", targets=["in_proj"], resume_from=tmp_path / "pieces"),
    ]
    expected.prune([replace(entry, resume_from=None) for entry in recipe])
    measure, asked = dropping._Search._scores, []

    def until_the_second(self: dropping._Search, left: list[int]) -> list[float]:
        asked.append(left)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(self, left)

    monkeypatch.setattr(dropping._Search, "_scores", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune(recipe)
    assert same_weights(pruner.model, SSMPruner.from_pretrained(tmp_path / "dense").model)
    # the second time nothing is computed, and a model through which nothing ran is the same; so is one in memory
    for where in ({"device_map": EVERYTHING}, {"device_map": EVERYTHING}, {}):
        pruner = SSMPruner.from_pretrained(tmp_path / "dense", **where)
        pruner.prune(recipe)
        assert len(asked) == 3
        check_report(pruner, expected)
        assert same_weights(pruner.model, expected.model)
        monkeypatch.setattr(Activations, "__init__", None)


def test_the_search_leaves_hooks_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pruner = pair("mamba", tmp_path, EVERYTHING)
    hooks = {name: module._hf_hook for name, module in pruner.model.named_modules() if hasattr(module, "_hf_hook")}
    monkeypatch.setattr(dropping, "remove_blocks", None)
    with pytest.raises(TypeError):
        pruner.prune(config())
    assert hooks == {name: m._hf_hook for name, m in pruner.model.named_modules() if hasattr(m, "_hf_hook")}
    assert all(parameter.is_meta for parameter in pruner.model.parameters())
    assert has_offloaded_params(pruner.model.get_output_embeddings())


@pytest.mark.parametrize("kwargs", [{}, {"unit": "ssm"}])
def test_values_that_nothing_brings_are_said_before_the_work(kwargs: dict[str, str]) -> None:
    model = tiny_model("mamba")
    model.base_model.norm_f.to("meta")
    with pytest.raises(ConfigurationError, match=r"backbone\.norm_f\.weight is offloaded, and no hook of accelerate"):
        SSMPruner(model).prune(config(method_kwargs=kwargs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("unit", ["block", "ssm"])
@pytest.mark.parametrize("fits", [True, False])
def test_dropped_from_a_model_that_a_gpu_holds_in_part(
    unit: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks, final norm and head come to the GPU, from main memory and from disk."""
    monkeypatch.setattr(block_weights, "fits_memory", lambda _: fits)
    places = {"backbone.embeddings": 0, "backbone.norm_f": "cpu", "lm_head": 0}
    places |= {f"backbone.layers.{i}": place for i, place in enumerate((0, "cpu", "disk", "cpu"))}
    tiny_model("mamba2", seed=3, num_hidden_layers=LAYERS).save_pretrained(tmp_path / "dense")
    expected, pruner = (SSMPruner.from_pretrained(tmp_path / "dense", device_map=where) for where in ({"": 0}, places))
    for one in (expected, pruner):
        one.prune([config(method_kwargs={"unit": unit}), config("wanda", targets=["in_proj"])])
    check_report(pruner, expected)
    ids: Tensor = IDS[:2].cuda()
    check_like(pruner, expected, ids, tmp_path / "pruned")
