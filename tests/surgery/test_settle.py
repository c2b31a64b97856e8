# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The config of a cut model: a stock one wherever a stock class can build the sizes, of the library's class otherwise."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaForCausalLM

from optimum_ssm.families import family_of
from optimum_ssm.models.pruned_mamba import PrunedMambaForCausalLM
from optimum_ssm.models.pruned_mamba2 import PrunedMamba2ForCausalLM
from optimum_ssm.surgery.cut import cut
from optimum_ssm.surgery.settle import is_stock, settle

from ..conftest import tiny_model
from ..structured import PAIRS, biased, decoded, logits, some_units


def settled(model, axis, keep=None, blocks=None):
    family = family_of(model)
    for seed, (_, block) in enumerate(family.blocks(model)):
        if blocks is None or seed in blocks:
            declared = family.axes(block)[axis]
            cut(family, block, declared, some_units(declared, seed, keep))
    settle(model, family)
    return model


def reloaded(model, directory):
    model.save_pretrained(directory)
    other, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return other.eval()


@pytest.mark.parametrize("model_type, axis", PAIRS)
def test_half_of_any_axis_is_a_stock_model(model_type, axis, token_ids, tmp_path):
    model, ids = settled(biased(model_type), axis), token_ids(2, 8)
    assert is_stock(model) and model.config.model_type == model_type
    other = reloaded(model, tmp_path)
    assert type(other) is type(model)
    assert torch.equal(logits(other, ids), logits(model, ids))
    ours, theirs = (m.config.to_dict() | {"_name_or_path": None} for m in (model, other))
    assert {key: value for key, value in ours.items() if theirs.get(key) != value} == {}


@pytest.mark.parametrize(
    "model_type, axis, keep, blocks",
    [
        ("mamba", "state", None, [1]), ("mamba", "channel", None, [0]), ("mamba", "dt_rank", None, [0]),
        ("mamba2", "state", None, [0]), ("mamba2", "head", 3, None), ("mamba2", "head_dim", 6, None),
    ],
)  # fmt: skip
def test_sizes_that_differ_or_fit_no_expand_need_the_own_class(model_type, axis, keep, blocks, token_ids, tmp_path):
    model, ids = settled(biased(model_type), axis, keep, blocks), token_ids(2, 8)
    assert type(model) is {"mamba": PrunedMambaForCausalLM, "mamba2": PrunedMamba2ForCausalLM}[model_type]
    assert model.config.layer_sizes == [family_of(model).sizes(block) for block in model.base_model.layers]
    other = reloaded(model, tmp_path)
    assert type(other) is type(model) and torch.equal(logits(other, ids), logits(model, ids))
    torch.testing.assert_close(decoded(other, ids), logits(model, ids), atol=1e-4, rtol=0)


def test_every_module_holds_the_new_config_and_what_the_user_set_stays():
    model = tiny_model("mamba")
    model.config._name_or_path, model.config.use_cache, model.config.rescale_prenorm_residual = (
        "someone/base",
        False,
        True,
    )
    old = model.config
    settled(model, "state")
    holders = [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    assert holders and all(config is model.config for config in holders) and model.config is not old
    assert model.config._name_or_path == "someone/base" and model.config.use_cache is False
    assert model.config.rescale_prenorm_residual is True
    assert (
        model.config.state_size == 4 and model.config.intermediate_size == 64 and model.config.num_hidden_layers == 2
    )
    assert model.config.architectures == ["MambaForCausalLM"]


def test_infinite_limits_of_the_step_survive(tmp_path):
    model = reloaded(settled(tiny_model("mamba2"), "state"), tmp_path)
    assert tuple(model.config.time_step_limit) == (0.0, float("inf"))
    assert tuple(model.base_model.layers[0].mixer.time_step_limit) == (0.0, float("inf"))


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_one_bias_makes_all_of_them(model_type, token_ids, tmp_path):
    """`use_bias` is one field for in_proj and out_proj of every block: the others become zero and change nothing."""
    model, ids = tiny_model(model_type), token_ids(2, 8)
    before = logits(model, ids)
    out_proj = model.base_model.layers[1].mixer.out_proj
    out_proj.bias = nn.Parameter(torch.randn(32))
    with_bias = logits(model, ids)
    assert not torch.equal(before, with_bias)
    settle(model, family_of(model))
    assert torch.equal(logits(model, ids), with_bias)
    other = reloaded(model, tmp_path)
    assert other.config.use_bias is True and torch.equal(logits(other, ids), with_bias)
    assert torch.equal(other.base_model.layers[1].mixer.out_proj.bias, out_proj.bias)
    assert not other.base_model.layers[0].mixer.out_proj.bias.any()


def test_subclasses_are_not_called_stock():
    class Mine(MambaForCausalLM):
        pass

    assert is_stock(tiny_model("mamba")) and not is_stock(Mine(tiny_model("mamba").config))
