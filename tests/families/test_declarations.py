# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What every family declares fits its models; the segments of the two Mambas are those of their published layouts."""

import pytest
import torch
import transformers.models.mamba2.modeling_mamba2 as modelling
from torch import nn

from optimum_ssm import ConfigurationError, SSMPruner, register_family
from optimum_ssm.families import FAMILIES, family_of
from optimum_ssm.families.base import Family, PrunableWeight, Site
from optimum_ssm.families.matching import declared_targets
from optimum_ssm.methods.base import KINDS


MODEL_TYPES = [(name, kind) for name, family in FAMILIES.items() for kind in family.model_types]


@pytest.fixture(params=MODEL_TYPES, ids=lambda pair: pair[1])
def model_and_family(request, make_tiny_model):
    name, model_type = request.param
    return make_tiny_model(model_type), FAMILIES.get(name)()


def test_every_model_type_finds_its_family(model_and_family):
    model, family = model_and_family
    assert type(family_of(model)) is type(family)


def test_blocks_come_in_order_under_their_qualified_names(model_and_family):
    model, family = model_and_family
    blocks = family.blocks(model)
    assert len(blocks) == model.config.num_hidden_layers
    for name, block in blocks:
        assert model.get_submodule(name) is block


def test_the_base_model_alone_has_the_same_blocks(model_and_family):
    model, family = model_and_family
    for name, block in family.blocks(model.base_model):
        assert model.base_model.get_submodule(name) is block


def test_declared_weights_have_the_shape_of_their_kind(model_and_family):
    model, family = model_and_family
    for target in declared_targets(family, model):
        weight, parameter = target.weight, model.get_parameter(target.parameter)
        assert weight.kind in KINDS
        if weight.kind == "linear":
            assert parameter.dim() == 2
        elif weight.kind == "conv":
            assert parameter.dim() == 3 and parameter.shape[1] == 1
        else:
            assert target.name == "A_log" and weight.site.end == "scan"


def test_segments_partition_the_rows_without_gap_or_overlap(model_and_family):
    model, family = model_and_family
    for target in declared_targets(family, model):
        ranges = sorted(target.weight.segments.values())
        if ranges:
            assert ranges[0][0] == 0 and ranges[-1][1] == len(model.get_parameter(target.parameter))
            assert all(stop == start for (_, stop), (start, _) in zip(ranges, ranges[1:]))


def test_names_in_a_block_are_unique_and_no_parameter_is_declared_twice(model_and_family):
    model, family = model_and_family
    targets = declared_targets(family, model)
    assert len({(target.block, target.name) for target in targets}) == len(targets)
    assert len({target.parameter for target in targets}) == len(targets)


def test_every_site_is_a_module_of_the_block_as_wide_as_the_weight_reads(model_and_family):
    model, family = model_and_family
    _, block = family.blocks(model)[0]
    for weight in family.weights(block):
        module = block.get_submodule(weight.site.module)
        assert weight.site.end in ("input", "output", "scan")
        if weight.site.end == "scan":
            assert module is family.mixer(block)
            continue
        assert isinstance(module, nn.Linear)
        width = module.in_features if weight.site.end == "input" else module.out_features
        start, stop = weight.site.columns or (0, width)
        parameter = block.get_parameter(weight.parameter)
        assert stop <= width
        assert stop - start == (parameter.shape[0] if weight.kind == "conv" else parameter.shape[1])


def test_every_parameter_is_declared_or_kept_for_a_reason(model_and_family):
    model, family = model_and_family
    declared = {target.parameter for target in declared_targets(family, model)}
    for name, _ in model.named_parameters():
        if name not in declared:
            assert family.kept_reason(name) != "not declared prunable by the family", name


@pytest.mark.parametrize(
    "parameter, reason",
    [
        ("backbone.layers.0.mixer.D", "skip connection"),
        ("backbone.layers.0.mixer.dt_bias", "bias"),
        ("backbone.layers.0.mixer.conv1d.bias", "bias"),
        ("backbone.layers.0.norm.weight", "norm"),
        ("backbone.norm_f.weight", "norm"),
        ("backbone.layers.0.mixer.norm.weight", "norm"),
        ("backbone.embeddings.weight", "embedding"),
        ("lm_head.weight", "output head"),
        ("backbone.something", "not declared"),
    ],
)
def test_the_reason_for_keeping_a_parameter_follows_from_its_name(parameter, reason):
    assert FAMILIES.get("mamba")().kept_reason(parameter).startswith(reason)


def test_state_elements_are_the_sizes_of_the_caches(tiny_mamba, tiny_mamba2):
    for model, recurrent, conv in ((tiny_mamba, 64 * 8, 64 * 4), (tiny_mamba2, 8 * 8 * 8, 96 * 4)):
        family = family_of(model)
        assert [family.state_elements(block) for _, block in family.blocks(model)] == [(recurrent, conv)] * 2


def test_a_block_without_a_mixer_declares_and_carries_nothing(tiny_mamba):
    family = family_of(tiny_mamba)
    del tiny_mamba.backbone.layers[0].mixer
    assert {target.block for target in declared_targets(family, tiny_mamba)} == {1}
    assert family.state_elements(tiny_mamba.backbone.layers[0]) == (0, 0)


def test_mamba_segments_follow_the_published_layout(tiny_mamba):
    weights = {weight.name: weight for weight in family_of(tiny_mamba).weights(tiny_mamba.backbone.layers[0])}
    assert weights["in_proj"].segments == {"x": (0, 64), "z": (64, 128)}
    assert weights["x_proj"].segments == {"dt": (0, 6), "B": (6, 14), "C": (14, 22)}
    assert weights["conv1d"].site == Site("mixer.in_proj", "output", (0, 64))
    assert weights["dt_proj"].site == Site("mixer.x_proj", "output", (0, 6))


def test_mamba2_segments_follow_the_published_layout(tiny_mamba2):
    weights = {weight.name: weight for weight in family_of(tiny_mamba2).weights(tiny_mamba2.backbone.layers[0])}
    assert weights["in_proj"].segments == {
        "z": (0, 64), "x": (64, 128), "B": (128, 144), "C": (144, 160), "dt": (160, 168),
    }  # fmt: skip
    assert weights["conv1d"].segments == {"x": (0, 64), "B": (64, 80), "C": (80, 96)}
    assert weights["conv1d"].site == Site("mixer.in_proj", "output", (64, 160))


@pytest.mark.parametrize("segment", ["z", "x", "B", "C", "dt"])
def test_the_rows_of_a_mamba2_segment_are_what_its_name_says(tiny_mamba2, token_ids, segment):
    """Zeroing a segment's rows of in_proj silences that quantity, and no other, at the scan or the gate."""
    seen = {}
    original = modelling.mamba2_chunk_scan

    def spy(x, dt, A, B, C, *args, **kwargs):
        seen.setdefault("scan", {"x": x, "dt": dt, "B": B, "C": C})
        return original(x, dt, A, B, C, *args, **kwargs)

    mixer = tiny_mamba2.backbone.layers[0].mixer
    mixer.conv1d.bias.data.zero_()
    weight = next(w for w in family_of(tiny_mamba2).weights(tiny_mamba2.backbone.layers[0]) if w.name == "in_proj")
    mixer.in_proj.weight.data[slice(*weight.segments[segment])] = 0
    handle = mixer.norm.register_forward_hook(lambda m, args, out: seen.setdefault("z", args[1]))
    modelling.mamba2_chunk_scan = spy
    try:
        with torch.no_grad():
            tiny_mamba2(token_ids(1, 8), use_cache=False)
    finally:
        modelling.mamba2_chunk_scan = original
        handle.remove()
    silent = {name: not value.any() for name, value in {**seen["scan"], "z": seen["z"]}.items()}
    assert silent == {name: name == segment for name in ("x", "dt", "B", "C", "z")}


def test_an_unknown_model_type_is_refused_with_the_supported_ones(tiny_mamba):
    tiny_mamba.config.model_type = "mamba3"
    with pytest.raises(ConfigurationError) as caught:
        family_of(tiny_mamba)
    assert str(caught.value).startswith("unknown model type 'mamba3'. Did you mean 'mamba")
    assert "mamba, mamba2" in str(caught.value)


def test_a_model_without_a_config_type_is_refused():
    model = nn.Linear(2, 2)
    model.config = object()
    with pytest.raises(ConfigurationError, match="unknown model type None"):
        family_of(model)


def test_two_families_cannot_describe_one_model_type(tiny_mamba, clean_registries):
    @register_family("rival")
    class Rival(Family):
        model_types = ("mamba",)
        scan = "mamba_selective_scan"
        recurrence = "mamba"

        def weights(self, block):
            return []

    with pytest.raises(ConfigurationError, match="'mamba' is declared by more than one family: mamba, rival"):
        family_of(tiny_mamba)


def test_a_users_family_is_one_class(tiny_mamba, token_ids, clean_registries):
    """A declaration from outside is enough to prune, calibrated, with the budget of its own choice of weights."""

    @register_family("narrow_mamba")
    class NarrowMamba(Family):
        model_types = ("narrow_mamba",)
        scan = "mamba_selective_scan"
        recurrence = "mamba"

        def weights(self, block):
            return [PrunableWeight("out_proj", "mixer.out_proj.weight", "linear", Site("mixer.out_proj", "input"))]

    tiny_mamba.config.model_type = "narrow_mamba"
    report = SSMPruner(tiny_mamba).prune(
        {"method": "sparsegpt", "sparsity": 0.5, "dataset": token_ids(), "seq_len": 24}
    )
    assert report.pruned == 2 * 1024
    assert {row.component for row in report.rows if row.pruned} == {"out_proj"}
