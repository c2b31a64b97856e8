# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a family says a unit owns is all that it owns: units can change places without changing the model."""

import copy
from collections import Counter

import pytest
import torch

from optimum_ssm.configuration_rules import AXES
from optimum_ssm.families import family_of
from optimum_ssm.families.axes import join, runs

from ..conftest import tiny_model
from ..growing import grown
from ..structured import PAIRS, axes_of, biased, exact, largest, logits


every_axis = pytest.mark.parametrize("model_type, axis", PAIRS)


def within_groups(axis, seed):
    """A permutation of the units of every group, another one in each."""
    draw = torch.Generator().manual_seed(seed)
    size = axis.group_size
    return torch.cat([g * size + torch.randperm(size, generator=draw) for g in range(axis.groups)])


def permuted(model, name, orders):
    """A copy of the model whose units stand in another order: unit i is what unit order[i] was."""
    model = copy.deepcopy(model)
    for block, axis, order in zip(model.base_model.layers, axes_of(model, name), orders):
        for part in axis.owned:
            parameter = block.get_parameter(part.parameter).data
            moved = parameter.index_select(part.dim, part.index[order].flatten())
            parameter.index_copy_(part.dim, part.index.flatten(), moved)
    return model


@every_axis
def test_units_that_change_places_change_nothing(model_type, axis, token_ids):
    """Channels, states, step ranks; dims of a head, heads of a group, states of a group, groups with their heads."""
    model, ids = biased(model_type), token_ids(2, 12)
    orders = [within_groups(declared, seed) for seed, declared in enumerate(axes_of(model, axis))]
    other = permuted(model, axis, orders)
    assert largest(exact(model, ids), exact(other, ids)) < 1e-11
    assert largest(logits(model, ids), logits(other, ids)) < 5e-6
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, other.get_parameter(name))]
    owned = {part.parameter for part in axes_of(model, axis)[0].owned}
    assert {name.split(".", 3)[-1] for name in changed} == owned


@pytest.mark.parametrize("axis", ["head", "state"])
def test_units_that_change_groups_change_the_model(axis, token_ids):
    """Heads across groups read another B and C, states another group's heads: the groups of an axis have a reason."""
    model, ids = biased("mamba2"), token_ids(2, 12)
    orders = []
    for declared in axes_of(model, axis):
        order = torch.arange(declared.units)
        order[0], order[-1] = declared.units - 1, 0
        orders.append(order)
    assert largest(exact(model, ids), exact(permuted(model, axis, orders), ids)) > 1e-3


@every_axis
def test_no_two_units_own_the_same_entry(model_type, axis):
    """Nor one twice. What is owned exists: an index beyond the tensor would be seen here."""
    model = biased(model_type)
    block = model.base_model.layers[0]
    taken = Counter()
    for part in axes_of(model, axis)[0].owned:
        assert part.index.shape[0] == axes_of(model, axis)[0].units
        size = block.get_parameter(part.parameter).shape[part.dim]
        assert 0 <= int(part.index.min()) and int(part.index.max()) < size
        taken.update((part.parameter, part.dim, int(i)) for i in part.index.flatten())
    assert set(taken.values()) == {1}


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
@pytest.mark.parametrize("use_bias, use_conv_bias", [(False, False), (True, False), (False, True)])
def test_only_what_is_there_is_declared(model_type, use_bias, use_conv_bias):
    model = tiny_model(model_type, use_bias=use_bias, use_conv_bias=use_conv_bias)
    family, block = family_of(model), model.base_model.layers[0]
    there = {name for name, _ in block.named_parameters()}
    axes = family.axes(block)
    named = {part.parameter for axis in axes.values() for part in axis.owned}
    assert named <= there and set(axes) <= set(AXES)
    assert ("mixer.in_proj.bias" in named) == use_bias and ("mixer.conv1d.bias" in named) == use_conv_bias
    # all of the mixer is owned along some axis, but for what leaves it
    assert named == {name for name in there if name.startswith("mixer.")} - {"mixer.out_proj.bias"}


@every_axis
def test_sizes_after_are_those_that_a_model_of_these_sizes_has(model_type, axis):
    """The family's own arithmetic against a model that is built with them."""
    model = tiny_model(model_type)
    family, block = family_of(model), model.base_model.layers[0]
    declared = family.axes(block)[axis]
    after = family.sizes_after(family.sizes(block), declared, declared.units // 2)
    changes = {name: value for name, value in after.items() if name != "norm_group_size"}
    if axis in ("head", "head_dim", "group"):
        changes["expand"] = 1
    built = tiny_model(model_type, **changes)
    assert family.sizes(built.base_model.layers[0]) == after
    assert family.stock_fields(model.config, after) is not None


def test_merged_groups_still_bind_heads_to_the_groups_of_their_norm():
    """One B and C for all heads, but two norms: heads are chosen in each of them, or channels would change norms."""
    from optimum_ssm.surgery.merge import merge
    from optimum_ssm.surgery.settle import settle

    model = tiny_model("mamba2")
    if not hasattr(model.base_model.layers[0].mixer.norm, "group_size"):
        pytest.skip("this transformers has one norm over all channels")
    family = family_of(model)
    for block in model.base_model.layers:
        axis, states = family.axes(block)["group"], block.mixer.ssm_state_size
        merge(family, block, axis, 1, torch.full((2,), 0.5), torch.arange(states).repeat(2, 1))
    settle(model, family)
    heads = axes_of(model, "head")[0]
    assert heads.groups == 2 and axes_of(model, "state")[0].groups == 1


def test_groups_that_go_need_no_rescale_where_the_norm_has_finer_groups():
    _, many = grown(4)
    family, block = family_of(many), many.base_model.layers[0]
    sizes = family.sizes(block)
    assert family.axes(block)["group"].norm == "mixer.norm.weight", "one norm over all groups"
    block.mixer.norm.group_size = sizes["num_heads"] * sizes["head_dim"] // 8
    assert family.axes(block)["group"].norm is None


def test_indices():
    assert runs(3, 2, 2).tolist() == [[3, 4], [5, 6]]
    assert join(runs(0, 2), runs(10, 2)).tolist() == [[0, 10], [1, 11]]
