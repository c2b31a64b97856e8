# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Cutting a unit out equals muting it, for every axis, with other units gone in every layer, group and head."""

import copy

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.surgery.cut import cut, kept_indices, zero_masks

from ..conftest import tiny_model
from ..structured import PAIRS, axes_of, biased, cut_and_masked, exact, largest, logits, some_units


BIASES = {"none": (False, False), "conv": (False, True), "all": (True, True)}

every_axis = pytest.mark.parametrize("model_type, axis", PAIRS)


def all_removed(model, name, keep=None):
    family = family_of(model)
    for seed, (_, block) in enumerate(family.blocks(model)):
        axis = family.axes(block)[name]
        cut(family, block, axis, some_units(axis, seed, keep))


@pytest.mark.parametrize("biases", BIASES)
@every_axis
def test_cutting_equals_muting(model_type, axis, biases, token_ids):
    """In float64 to rounding, with the norm's eps in step; in float32 as the model computes it, without."""
    use_bias, use_conv_bias = BIASES[biases]
    model, ids = tiny_model(model_type, use_bias=use_bias, use_conv_bias=use_conv_bias), token_ids(2, 12)
    sliced, masked = cut_and_masked(model, axis, eps=True)
    assert largest(logits(sliced, ids), logits(masked, ids)) < 5e-6
    sliced, masked = cut_and_masked(model.double(), axis, eps=True)
    assert largest(exact(sliced, ids), exact(masked, ids)) < 1e-12
    assert largest(exact(model, ids), exact(masked, ids)) > 1e-3, "the units matter"
    sliced, masked = cut_and_masked(model, axis)
    left = (exact(sliced, ids) - exact(masked, ids)).abs().mean()
    assert left < 2e-3, "the eps of the norm is what is left: 1e-5 beside mean squares around 1e-2"


@every_axis
def test_one_unit_may_be_all_that_is_left(model_type, axis, token_ids):
    model, ids = biased(model_type).double(), token_ids(2, 8)
    sliced, masked = cut_and_masked(model, axis, eps=True, keep=1)
    assert largest(exact(sliced, ids), exact(masked, ids)) < 1e-11


@every_axis
def test_the_model_computes_what_its_tensors_and_sizes_say(model_type, axis, token_ids):
    model, ids = biased(model_type), token_ids(2, 12)
    all_removed(model, axis)
    assert largest(logits(model, ids).double(), exact(model, ids)) < 2e-5


# What a cut that forgets something would give: each differs, so the oracle above has teeth.


def test_states_muted_by_rows_of_in_proj_alone_leave_the_bias_of_the_convolution(token_ids):
    model, ids = tiny_model("mamba2"), token_ids(2, 12)
    sliced, other = cut_and_masked(model, "state")[0], copy.deepcopy(model)
    for seed, (block, axis) in enumerate(zip(other.base_model.layers, axes_of(other, "state"))):
        rows = next(part.index for part in axis.owned if part.name == "in_proj.C")[some_units(axis, seed)].flatten()
        block.mixer.in_proj.weight.data[rows] = 0
    assert largest(exact(sliced, ids), exact(other, ids)) > 1e-3


def test_channels_of_mamba_muted_in_out_proj_alone_still_feed_x_proj(token_ids):
    model, ids = tiny_model("mamba"), token_ids(2, 12)
    sliced, other = cut_and_masked(model, "channel")[0], copy.deepcopy(model)
    for seed, (block, axis) in enumerate(zip(other.base_model.layers, axes_of(other, "channel"))):
        block.mixer.out_proj.weight.data[:, some_units(axis, seed)] = 0
    assert largest(exact(sliced, ids), exact(other, ids)) > 1e-3


@pytest.mark.parametrize("axis", ["head", "head_dim"])
def test_without_the_norm_factor_heads_that_go_change_the_others(axis, token_ids):
    model, ids = tiny_model("mamba2"), token_ids(2, 12)
    sliced, masked = cut_and_masked(model, axis, rescale="none")
    assert largest(exact(sliced, ids), exact(masked, ids)) > 1e-3


def test_heads_muted_in_x_alone_still_pass_the_bias_of_the_convolution(token_ids):
    model, ids = tiny_model("mamba2"), token_ids(2, 12)
    sliced, other = cut_and_masked(model, "head", eps=True)[0], copy.deepcopy(model)
    for seed, (block, axis) in enumerate(zip(other.base_model.layers, axes_of(other, "head"))):
        rows = next(part.index for part in axis.owned if part.name == "in_proj.x")[some_units(axis, seed)].flatten()
        block.mixer.in_proj.weight.data[rows] = 0
    assert largest(exact(sliced, ids), exact(other, ids)) > 1e-3


# Bookkeeping.


@every_axis
def test_parameters_left_are_what_the_closed_form_says(model_type, axis):
    model = biased(model_type)
    all_removed(model, axis)
    for block in model.base_model.layers:
        mixer = block.mixer
        d, taps = 32, 4
        if model_type == "mamba":
            i, n, r = 64, 8, 6
            i, n, r = {"channel": (32, n, r), "state": (i, 4, r), "dt_rank": (i, n, 3)}[axis]
            wanted = 2 * i * (d + 1) + i * (taps + 1) + (r + 2 * n) * i + i * (r + 1) + i * n + i + d * (i + 1)
        else:
            h, p, g, n = 8, 8, 2, 8
            h, p, g, n = {
                "state": (h, p, g, 4), "head": (4, p, g, n), "head_dim": (h, 4, g, n), "group": (4, p, 1, n)
            }[axis]  # fmt: skip
            i, bc = h * p, 2 * g * n
            wanted = (2 * i + bc + h) * (d + 1) + (i + bc) * (taps + 1) + 3 * h + i + d * (i + 1)
        assert sum(parameter.numel() for parameter in mixer.parameters()) == wanted
        assert mixer.in_proj.out_features == len(mixer.in_proj.weight) == len(mixer.in_proj.bias)
        assert mixer.out_proj.in_features == mixer.out_proj.weight.shape[1] == mixer.intermediate_size
        conv = mixer.conv1d
        assert conv.in_channels == conv.out_channels == conv.groups == len(conv.weight) == len(conv.bias)
        if model_type == "mamba2":
            assert mixer.conv_dim == len(conv.weight)
            assert (mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size) == (h, p, g, n)
        else:
            assert (mixer.time_step_rank, mixer.ssm_state_size) == (r, n)
        for tensor in mixer.parameters():
            assert tensor.is_contiguous()


def planted(model, name):
    """Every entry of what units own says whose it is: its place among the unit's indices, then the unit."""
    family = family_of(model)
    block = family.blocks(model)[0][1]
    axis = family.axes(block)[name]
    for part in axis.owned:
        parameter = block.get_parameter(part.parameter).data
        for unit, index in enumerate(part.index):
            parameter.index_fill_(part.dim, index, float(unit))
    return family, block, axis


@pytest.mark.parametrize("model_type, axis", [p for p in PAIRS if p[1] not in ("state", "group", "dt_rank")])
def test_all_tensors_keep_the_same_units_in_the_old_order(model_type, axis):
    """z, x, convolution, norm and out_proj of a head keep one set of dims: nothing is paired anew."""
    family, block, declared = planted(biased(model_type), axis)
    removed = some_units(declared, 3)
    cut(family, block, declared, removed)
    kept = (~removed).nonzero().flatten().float()
    for part in family.axes(block)[axis].owned:
        tensor = block.get_parameter(part.parameter).data
        found = tensor.index_select(part.dim, part.index.flatten()).movedim(part.dim, 0)
        found = found.reshape(*part.index.shape, -1)
        assert torch.equal(found, kept[:, None, None].expand_as(found)), part.name


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_b_and_c_keep_the_same_states(model_type):
    family, block, declared = planted(biased(model_type), "state")
    removed = some_units(declared, 3)
    cut(family, block, declared, removed)
    kept = (~removed).nonzero().flatten().float()
    for part in family.axes(block)["state"].owned:
        rows = block.get_parameter(part.parameter).data.index_select(part.dim, part.index.flatten())
        rows = rows.movedim(part.dim, 0).reshape(len(kept), -1)
        assert torch.equal(rows, kept[:, None].expand_as(rows)), part.name


def test_flags_and_dtype_stay(token_ids):
    model = tiny_model("mamba").to(torch.bfloat16)
    model.base_model.layers[0].mixer.A_log.requires_grad_(False)
    all_removed(model, "channel")
    mixer = model.base_model.layers[0].mixer
    assert not mixer.A_log.requires_grad and mixer.D.requires_grad
    assert {parameter.dtype for parameter in mixer.parameters()} == {torch.bfloat16}


def test_kept_indices_are_those_of_the_slice():
    model = tiny_model("mamba2")
    family, (_, block) = family_of(model), family_of(model).blocks(model)[0]
    axis = family.axes(block)["head"]
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    kept = cut(family, block, axis, some_units(axis, 0))
    for name, parameter in block.named_parameters():
        wanted = before[name]
        for dim, index in kept.get(name, {}).items():
            assert (index.diff() > 0).all()
            wanted = wanted.index_select(dim, index)
        assert torch.equal(parameter, wanted), name


@pytest.mark.parametrize(
    "removed, message",
    [
        (torch.tensor([1, 1, 0, 0, 0, 0, 0, 1], dtype=torch.bool), "same number of units, not \\[2, 3\\]"),
        (torch.ones(8, dtype=torch.bool), "nothing would be left"),
        (torch.zeros(7, dtype=torch.bool), "shape \\(8,\\)"),
        (torch.zeros(8), "must be bool"),
    ],
)
def test_what_cannot_be_cut_is_refused_and_nothing_changes(removed, message):
    model = tiny_model("mamba2")
    family, (_, block) = family_of(model), family_of(model).blocks(model)[0]
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        cut(family, block, family.axes(block)["head"], removed)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert kept_indices(block, family.axes(block)["head"], torch.zeros(8, dtype=torch.bool))["mixer.D"][0].numel() == 8


def test_muting_leaves_other_entries_alone():
    model = biased("mamba2")
    other = copy.deepcopy(model)
    block, axis = other.base_model.layers[0], axes_of(other, "state")[0]
    removed = some_units(axis, 0)
    zero_masks(block, axis, removed)
    for name, parameter in model.base_model.layers[0].named_parameters():
        gone = block.get_parameter(name).data == 0
        assert torch.equal(block.get_parameter(name).data[~gone], parameter.data[~gone])
        assert bool(gone.any()) == any(part.parameter == name for part in axis.owned if part.masks)
