# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Removed entries stay removed while the others are tuned; without the callback they do not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, TrainerCallback

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.training import ModelMasks, SparsityCallback
from optimum_ssm.training.masks import parameters_by_name

from .runs import train


TARGETS = ["in_proj", "conv1d", "out_proj", "A_log"]


def pruned(model, fill="memoryless", **changes):
    pruner = SSMPruner(model)
    values = {"method": "magnitude", "sparsity": 0.5, "targets": TARGETS, "a_log_fill": fill, **changes}
    pruner.prune(SSMPrunerConfig(**values))
    return pruner


def removed_values(pruner):
    """For every mask the values that its removed entries hold now."""
    return {name: pruner.model.get_parameter(name).detach()[mask] for name, mask in pruner.masks.items()}


def expected(pruner, fill):
    return {
        name: torch.full((int(mask.sum()),), 38.0 if name.endswith("A_log") and fill == "memoryless" else 0.0)
        for name, mask in pruner.masks.items()
    }


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


class Watcher(TrainerCallback):
    """The sparsity after every optimiser step."""

    def __init__(self, masks):
        self.masks, self.seen = masks, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.masks.sparsity())


@pytest.mark.parametrize("fill", ["memoryless", "zero"])
def test_masks_and_fills_survive_weight_decay_and_accumulation(either_tiny_model, tmp_path, fill):
    pruner = pruned(either_tiny_model, fill)
    before = copy.deepcopy(either_tiny_model.state_dict())
    callback = pruner.sparsity_callback()
    watcher = Watcher(callback.masks)
    train(either_tiny_model, tmp_path, [callback, watcher])
    assert_same(removed_values(pruner), expected(pruner, fill))
    for name, mask in pruner.masks.items():  # and the others did learn
        assert not torch.equal(either_tiny_model.get_parameter(name)[~mask], before[name][~mask]), name
    removed = sum(int(mask.sum()) for mask in pruner.masks.values())
    assert callback.masks.sparsity() == removed / sum(mask.numel() for mask in pruner.masks.values())
    assert watcher.seen == [callback.masks.sparsity()] * 6
    assert 0.49 < watcher.seen[0] < 0.51


@pytest.mark.parametrize("fill", ["memoryless", "zero"])
def test_masks_survive_bf16_autocast(either_tiny_model, tmp_path, fill):
    pruner = pruned(either_tiny_model, fill)
    train(either_tiny_model, tmp_path, [pruner.sparsity_callback()], bf16=True)
    assert either_tiny_model.dtype == torch.float32
    assert_same(removed_values(pruner), expected(pruner, fill))


def test_masks_survive_in_a_bf16_model(either_tiny_model, tmp_path):
    pruner = pruned(either_tiny_model.bfloat16())
    train(either_tiny_model, tmp_path, [pruner.sparsity_callback()])
    wanted = {name: value.bfloat16() for name, value in expected(pruner, "memoryless").items()}
    assert_same(removed_values(pruner), wanted)


def test_without_the_callback_nothing_stays_removed(either_tiny_model, tmp_path):
    pruner = pruned(either_tiny_model)
    masks = pruner.sparsity_callback().masks
    assert 0.49 < masks.sparsity() < 0.51
    train(either_tiny_model, tmp_path, max_steps=3)
    assert masks.sparsity() < 0.01
    # The gradient of a memoryless entry is exactly 0: it is the weight decay alone that moves it.
    moved = [name for name, value in removed_values(pruner).items() if name.endswith("A_log") and (value < 38).all()]
    assert len(moved) == 2


def test_what_was_tuned_is_what_plain_transformers_loads(either_tiny_model, tmp_path):
    pruner = pruned(either_tiny_model)
    train(either_tiny_model, tmp_path / "run", [pruner.sparsity_callback()])
    pruner.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, mask in pruner.masks.items():
        fill = 38.0 if name.endswith("A_log") else 0.0
        assert (loaded.get_parameter(name)[mask] == fill).all(), name
        row = next(row for row in pruner.report.rows if row.name == name)
        assert row.pruned == int((loaded.get_parameter(name) == fill).sum()), name


def test_a_loaded_checkpoint_goes_on_with_its_masks(tiny_mamba, tmp_path):
    pruned(tiny_mamba).save_pretrained(tmp_path / "sparse")
    pruner = SSMPruner.from_pretrained(tmp_path / "sparse")
    train(pruner.model, tmp_path / "run", [pruner.sparsity_callback()], max_steps=3)
    assert_same(removed_values(pruner), expected(pruner, "memoryless"))


def test_passes_with_different_fills_keep_each_its_own(tiny_mamba, tmp_path):
    pruner = pruned(tiny_mamba, "zero", targets=["A_log"], sparsity=0.2)
    pruner.prune(SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["A_log"], method_kwargs={"largest": True}))
    before = removed_values(pruner)
    assert all(set(value.tolist()) == {0.0, 38.0} for value in before.values())
    train(tiny_mamba, tmp_path, [pruner.sparsity_callback()], max_steps=3)
    assert_same(removed_values(pruner), before)


def test_applying_to_a_model_after_a_dense_merge_restores_the_sparsity(tiny_mamba):
    pruner = pruned(tiny_mamba)
    masks = pruner.sparsity_callback().masks
    merged = copy.deepcopy(tiny_mamba)  # what merging low-rank adapters does: every entry of a weight moves
    with torch.no_grad():
        for name in pruner.masks:
            weight = merged.get_parameter(name)
            weight.add_(0.01 * torch.randn_like(weight))
    kept = {name: merged.get_parameter(name).detach()[~mask].clone() for name, mask in pruner.masks.items()}
    masks.bind(merged)
    assert masks.sparsity() == 0
    masks.apply(merged)
    assert 0.49 < masks.sparsity() < 0.51
    for name, mask in pruner.masks.items():
        assert torch.equal(merged.get_parameter(name)[~mask], kept[name])


class LowRank(nn.Module):
    """W + A B: what an adapter adds to a weight that stays as it is."""

    def __init__(self, weight, rank=2):
        super().__init__()
        self.A = nn.Parameter(0.1 * torch.randn(weight.shape[0], rank))
        self.B = nn.Parameter(torch.zeros(rank, weight.shape[1]))

    def forward(self, weight):
        return weight + self.A @ self.B


def test_low_rank_adapters_that_were_trained_and_merged_fill_the_zeros_and_the_masks_bring_them_back(
    either_tiny_model, tmp_path
):
    pruner = pruned(either_tiny_model, targets=["in_proj", "A_log"])
    masks, model = pruner.sparsity_callback().masks, either_tiny_model
    model.requires_grad_(False)
    for block in model.base_model.layers:
        parametrize.register_parametrization(block.mixer.in_proj, "weight", LowRank(block.mixer.in_proj.weight))
    train(model, tmp_path, max_steps=3)
    for block in model.base_model.layers:
        parametrize.remove_parametrizations(block.mixer.in_proj, "weight", leave_parametrized=True)
    names = [name for name in pruner.masks if "in_proj" in name]
    merged = copy.deepcopy(model)
    assert len(names) == 2 and all((merged.get_parameter(name)[pruner.masks[name]] != 0).all() for name in names)
    masks.apply(merged)
    for name, mask in pruner.masks.items():
        found, dense = merged.get_parameter(name), model.get_parameter(name)
        assert (found[mask] == (38 if name.endswith("A_log") else 0)).all() and torch.equal(found[~mask], dense[~mask])
    assert masks.sparsity() == sum(int(m.sum()) for m in pruner.masks.values()) / sum(
        m.numel() for m in pruner.masks.values()
    )


def test_parameters_are_found_in_wrapped_and_larger_models(tiny_mamba):
    name = "backbone.layers.1.mixer.in_proj.weight"
    weight = tiny_mamba.get_parameter(name)
    larger = nn.ModuleDict({"module": tiny_mamba, "head": nn.Linear(2, 2)})
    for model in (tiny_mamba, torch.compile(tiny_mamba), larger):
        assert parameters_by_name(model, [name])[name] is weight
    tiny_mamba.backbone.layers[1].mixer.in_proj = nn.ModuleDict(
        {"base_layer": tiny_mamba.backbone.layers[1].mixer.in_proj}
    )
    assert parameters_by_name(larger, [name])[name] is weight


def test_what_does_not_fit_is_refused_by_name(tiny_mamba, tiny_mamba2):
    name = "backbone.layers.0.mixer.in_proj.weight"
    mask = torch.zeros_like(tiny_mamba.get_parameter(name), dtype=torch.bool)
    with pytest.raises(ConfigurationError, match=r"several parameters end with it: a\.backbone"):
        ModelMasks(nn.ModuleDict({"a": tiny_mamba, "b": copy.deepcopy(tiny_mamba)}), {name: mask})
    with pytest.raises(ConfigurationError, match="backbone.layers.9.*no such parameter"):
        ModelMasks(tiny_mamba, {name.replace("0", "9"): mask})
    with pytest.raises(ConfigurationError, match=rf"{name} .* another shape"):
        ModelMasks(tiny_mamba2, {name: mask})
    with pytest.raises(ConfigurationError, match="nothing was removed"):
        SSMPruner(tiny_mamba).sparsity_callback()


def test_a_model_of_other_names_is_refused_before_training(tiny_mamba, tmp_path):
    name = "backbone.layers.0.mixer.in_proj.weight"
    mask = torch.zeros_like(tiny_mamba.get_parameter(name), dtype=torch.bool)
    callback = SparsityCallback(ModelMasks(tiny_mamba, {name: mask}))
    other = copy.deepcopy(tiny_mamba)
    other.backbone.layers = other.backbone.layers[:0]
    with pytest.raises(ConfigurationError, match="no such parameter"):
        train(other, tmp_path, [callback])
