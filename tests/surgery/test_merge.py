# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Groups that are alike merge without loss, and everything of a group is pooled alike."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.surgery.merge import check_groups, merge
from optimum_ssm.surgery.settle import settle

from ..growing import grown, heads_of


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def merge_all(model, groups, shares=None, order=None):
    family, merged = family_of_stock(), []
    for block in model.base_model.layers:
        axis = family.axes(block)["group"]
        run = axis.units // groups
        states = block.mixer.ssm_state_size
        share = torch.full((axis.units,), 1 / run) if shares is None else shares
        plain = torch.arange(states).repeat(axis.units, 1)
        merged.append(merge(family, block, axis, groups, share, plain if order is None else order))
    settle(model, family)
    return merged


def family_of_stock():
    from optimum_ssm.families.mamba2 import Mamba2

    return Mamba2()


def test_growing_groups_changes_nothing(token_ids):
    one, many = grown(4)
    torch.testing.assert_close(logits(many, token_ids()), logits(one, token_ids()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("use_bias", [False, True])
def test_groups_that_are_alike_merge_without_loss(kept, use_bias, token_ids):
    one, many = grown(4, use_bias=use_bias)
    before = logits(many, token_ids())
    merge_all(many, kept)
    assert {block.mixer.n_groups for block in many.base_model.layers} == {kept}
    torch.testing.assert_close(logits(many, token_ids()), before, atol=1e-5, rtol=1e-5)
    if kept == 1:
        for (name, parameter), other in zip(many.named_parameters(), one.parameters()):
            assert torch.equal(parameter, other), name


def test_the_norm_keeps_its_groups_and_must(make_tiny_model, token_ids, tmp_path):
    model, ids = make_tiny_model("mamba2", n_groups=4), token_ids()
    for block in model.base_model.layers:
        for heads in heads_of(block):
            heads[:] = heads[:1].clone()
    before, size = logits(model, ids), getattr(model.base_model.layers[0].mixer.norm, "group_size", None)
    merge_all(model, 2)
    torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    if size is None:
        pytest.skip("this transformers normalises all channels at once")
    norms = [block.mixer.norm for block in loaded.base_model.layers]
    assert {norm.group_size for norm in norms} == {size}
    for norm in norms:
        norm.group_size = 2 * size
    assert (logits(loaded, ids) - before).abs().max() > 1e-2


def test_the_mean_is_taken_of_consecutive_groups_everywhere(make_tiny_model):
    model = make_tiny_model("mamba2", n_groups=4, use_bias=True)
    wanted = [
        torch.stack([heads[:2].double().mean(0), heads[2:].double().mean(0)])
        for heads in heads_of(model.base_model.layers[0])
    ]
    others = {name: value.clone() for name, value in model.base_model.layers[0].named_parameters()}
    merge_all(model, 2)
    found = list(heads_of(model.base_model.layers[0]))
    assert len(found) == len(wanted) == 8
    for head, mean in zip(found, wanted):
        torch.testing.assert_close(head.double(), mean, atol=1e-7, rtol=1e-6)
    for name, value in model.base_model.layers[0].named_parameters():
        if "in_proj" not in name and "conv1d" not in name:
            assert torch.equal(value, others[name]), name
    rows = model.base_model.layers[0].mixer.in_proj.weight
    assert torch.equal(rows[:128], others["mixer.in_proj.weight"][:128])  # z and x
    assert torch.equal(rows[-8:], others["mixer.in_proj.weight"][-8:])  # dt


def test_recurrent_decoding_goes_on(token_ids):
    _, model = grown(4)
    for block in model.base_model.layers:
        for heads in heads_of(block):
            heads += 0.1 * torch.randn(heads.shape)
    merge_all(model, 2)
    ids = token_ids(1, 5)
    longer = ids
    for _ in range(6):
        longer = torch.cat([longer, logits(model, longer)[:, -1:].argmax(-1)], dim=1)
    model.generation_config.eos_token_id = None
    assert torch.equal(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False), longer
    )


def test_a_pooled_entry_is_gone_where_all_its_parts_were(make_tiny_model):
    model = make_tiny_model("mamba2", n_groups=4)
    block = model.base_model.layers[0]
    weight = block.mixer.in_proj.weight
    mask = torch.rand(weight.shape) < 0.7
    with torch.no_grad():
        weight[mask] = 0
    shares = torch.tensor([0.5, 0.5, 0, 1])
    order = torch.stack([torch.arange(8), torch.randperm(8), torch.arange(8), torch.arange(8)])
    merged = merge_all(model, 2, shares, order)[0].mask("mixer.in_proj.weight", mask)
    assert torch.equal(merged, block.mixer.in_proj.weight == 0)
    assert merged[128:160].any() and not merged[128:160].all()
    assert torch.equal(merge_all(model, 2)[0].mask("mixer.A_log", mask), mask)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((1, 1, 8), "n_groups = 1"),
        ((8, 6, 8), r"8 groups cannot be merged to 6.*Allowed: 1, 2, 4 \(sparsity 0.5, 0.75, 0.875\)"),
        ((8, 0, 8), "merged to 0"),
        ((4, 2, 9), "9 heads cannot share 2 groups"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(numbers, message):
    with pytest.raises(ConfigurationError, match=message):
        check_groups(*numbers)


def test_a_family_knows_the_merged_sizes(make_tiny_model):
    model = make_tiny_model("mamba2", n_groups=4)
    family = family_of(model)
    before = family.sizes(model.base_model.layers[0])
    merge_all(model, 2)
    assert family.sizes(model.base_model.layers[0]) == {**before, "n_groups": 2}
