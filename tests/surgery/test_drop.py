# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A deleted block is one that passes its input on; a muted SSM is one that passes its input on."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.models import with_sizes
from optimum_ssm.surgery.drop import is_muted, mute_ssm, muted, remove_blocks, renumbered
from optimum_ssm.surgery.settle import settle

from .. import reference


MODELS = ("mamba", "mamba2")


class Pass(nn.Module):
    """A block that gives its input."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def without_blocks(model, gone):
    """The model's own logits with identities in the place of blocks."""
    layers = model.base_model.layers
    for index in gone:
        layers[index] = Pass()
    return model


@pytest.mark.parametrize("gone", [[0], [3], [1, 2], [0, 2, 3]])
@pytest.mark.parametrize("kind", MODELS)
def test_a_removed_block_is_an_identity(kind, gone, make_tiny_model, token_ids):
    model, masked = (make_tiny_model(kind, num_hidden_layers=4) for _ in range(2))
    family, ids = family_of(model), token_ids()
    dense = logits(model, ids)
    remove_blocks(model, family, gone)
    settle(model, family)
    assert torch.equal(logits(model, ids), logits(without_blocks(masked, gone), ids))
    assert not torch.allclose(dense, logits(model, ids), atol=1e-3)
    assert len(model.base_model.layers) == model.config.num_hidden_layers == 4 - len(gone)
    for index, block in enumerate(model.base_model.layers):
        assert block.layer_idx == block.mixer.layer_idx == index


@pytest.mark.parametrize("kind", MODELS)
def test_stock_transformers_loads_and_generates_without_blocks(kind, make_tiny_model, token_ids, tmp_path):
    model = make_tiny_model(kind, num_hidden_layers=4)
    family, ids = family_of(model), token_ids(1, 5)
    remove_blocks(model, family, [1])
    settle(model, family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and type(loaded).__module__.startswith("transformers.")
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    grown = ids
    for _ in range(6):  # without a cache
        grown = torch.cat([grown, logits(model, grown)[:, -1:].argmax(-1)], dim=1)
    for each in (model, loaded):
        each.generation_config.eos_token_id = None
        assert torch.equal(
            each.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False), grown
        )


def test_sizes_of_the_remaining_blocks_stay_theirs(make_tiny_model, token_ids, tmp_path):
    model = make_tiny_model("mamba", num_hidden_layers=3)
    family, ids = family_of(model), token_ids()
    sizes = [family.sizes(block) for _, block in family.blocks(model)]
    for index, keep in enumerate((8, 3, 5)):
        axis = family.axes(model.base_model.layers[index])["state"]
        from optimum_ssm.surgery.cut import cut

        cut(family, model.base_model.layers[index], axis, torch.arange(8) >= keep)
        sizes[index] = {**sizes[index], "state_size": keep}
    with_sizes(model, sizes)
    remove_blocks(model, family, [0])
    assert [entry["state_size"] for entry in model.config.layer_sizes] == [3, 5]
    settle(model, family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [entry["state_size"] for entry in loaded.config.layer_sizes] == [3, 5]
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_lists_in_the_config_and_the_device_map_follow(make_tiny_model):
    model = make_tiny_model("mamba", num_hidden_layers=4)
    model.config.layer_kinds = ["a", "b", "c", "d"]
    model.hf_device_map = {"backbone.embeddings": 0, **{f"backbone.layers.{i}": i for i in range(4)}, "lm_head": 3}
    remove_blocks(model, family_of(model), [3, 1])
    assert model.config.layer_kinds == ["a", "c"]
    assert model.hf_device_map == {
        "backbone.embeddings": 0, "backbone.layers.0": 0, "backbone.layers.1": 2, "lm_head": 3
    }  # fmt: skip


@pytest.mark.parametrize("gone", [[0, 1], [2], [-1]])
def test_a_block_must_exist_and_one_must_stay(gone, tiny_mamba):
    with pytest.raises(ConfigurationError, match="of 2: allowed are 0 to 1"):
        remove_blocks(tiny_mamba, family_of(tiny_mamba), gone)
    assert len(tiny_mamba.base_model.layers) == 2


def test_names_are_renumbered():
    kept = [0, 2, 11]
    names = {"a.layers.2.D": "a.layers.1.D", "a.layers.11": "a.layers.2", "a.layers.1.D": None, "a.norm.2": "a.norm.2"}
    assert {name: renumbered(name, "a.layers", kept) for name in names} == names


def passed_through(block, hidden):
    """What a block gives in float64 if its scan gives its input: projections, convolution, gate and norm from the papers."""
    mixer = block.mixer
    seen = reference._mamba(mixer, hidden) if mixer.A_log.dim() == 2 else reference._mamba2(mixer, hidden)
    x = reference._convolved(mixer, seen["conv1d"])
    inner = mixer.out_proj.weight.shape[1]
    gate = seen["in_proj"] @ mixer.in_proj.weight.detach().double().T
    if mixer.A_log.dim() == 2:
        u = x * F.silu(gate[..., inner:])
    else:
        norm = mixer.norm
        group = getattr(norm, "group_size", inner)
        v = x[..., :inner] * F.silu(gate[..., :inner])
        u = reference._rms_norm(v, norm.weight.detach().double(), norm.variance_epsilon, group)
    return u @ mixer.out_proj.weight.detach().double().T


@pytest.mark.parametrize("kind", MODELS)
def test_a_muted_ssm_gives_its_input(kind, make_tiny_model):
    model = make_tiny_model(kind)
    family, block = family_of(model), model.base_model.layers[0]
    x = torch.randn(2, 20, 32)
    with torch.no_grad():
        dense = block.mixer(x)
        masks = mute_ssm(family, block)
        assert is_muted(family, block)
        found = block.mixer(x).double()
        wanted = passed_through(block, x.double())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found - dense).abs().max() > 1e-2
    assert set(masks) == ({"mixer.x_proj.weight"} if kind == "mamba" else {"mixer.conv1d.weight", "mixer.conv1d.bias"})
    for path, mask in masks.items():
        assert torch.equal(block.get_parameter(path) == 0, mask)


@pytest.mark.parametrize("kind", MODELS)
def test_muting_for_a_while_leaves_no_trace(kind, make_tiny_model):
    model = make_tiny_model(kind)
    family, block = family_of(model), model.base_model.layers[1]
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), muted(family, block):
        assert is_muted(family, block)
        raise RuntimeError("inside")
    assert not is_muted(family, block)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("entry", ["mixer.D", "C"])
def test_an_ssm_that_still_works_is_not_muted(entry, tiny_mamba):
    family, block = family_of(tiny_mamba), tiny_mamba.base_model.layers[0]
    mute_ssm(family, block)
    with torch.no_grad():
        if entry == "C":
            block.mixer.x_proj.weight[-1, 3] = 1e-3
        else:
            block.mixer.D[0] = 0.5
    assert not is_muted(family, block)
