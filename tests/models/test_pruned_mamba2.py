# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 with different state sizes, heads, head dims, groups and norm groups per block."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers.models.mamba2 import modeling_mamba2

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.models import with_sizes
from optimum_ssm.models.pruned_mamba2 import PrunedMamba2Config, PrunedMamba2ForCausalLM, PrunedMamba2Model
from tests.conftest import tiny_model
from tests.models import checks


# Inner sizes 30, 24 and 28; the first norm has the groups of B and C, the second merged ones, the third the stock norm.
DIFFERENT = [
    {"state_size": 5, "num_heads": 6, "head_dim": 5, "n_groups": 3, "norm_group_size": 10},
    {"state_size": 3, "num_heads": 8, "head_dim": 3, "n_groups": 1, "norm_group_size": 6},
    {"state_size": 12, "num_heads": 4, "head_dim": 7, "n_groups": 2},
]
GROUPED = hasattr(tiny_model("mamba2").backbone.layers[0].mixer.norm, "group_size")  # transformers >= 5.23


@pytest.fixture
def model():
    return checks.build("mamba2", DIFFERENT)


def test_blocks_have_the_sizes_of_their_entries(model):
    assert isinstance(model, PrunedMamba2ForCausalLM) and isinstance(model.backbone, PrunedMamba2Model)
    for block, sizes in zip(model.backbone.layers, DIFFERENT, strict=True):
        inner, bc = sizes["num_heads"] * sizes["head_dim"], sizes["n_groups"] * sizes["state_size"]
        assert block.mixer.A_log.shape == (sizes["num_heads"],)
        assert block.mixer.in_proj.weight.shape == (2 * inner + 2 * bc + sizes["num_heads"], 32)
        assert block.mixer.conv1d.groups == block.mixer.conv_dim == inner + 2 * bc
        assert block.mixer.out_proj.in_features == block.mixer.intermediate_size == inner
        assert getattr(block.mixer.norm, "group_size", None) == (
            sizes.get("norm_group_size") or (inner // sizes["n_groups"] if GROUPED else None)
        )


def test_inner_size_is_exact_where_a_float_expand_would_round_down():
    hidden, heads = 22, 15
    assert int(heads / hidden * hidden) == heads - 1
    sizes = [{"state_size": 2, "num_heads": heads, "head_dim": 1, "n_groups": 1}]
    assert checks.build("mamba2", sizes, hidden_size=hidden).backbone.layers[0].mixer.intermediate_size == heads


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(token_ids, tmp_path, tied):
    model = checks.build("mamba2", DIFFERENT, tie_word_embeddings=tied, use_bias=tied)
    loaded = checks.check_round_trip(model, token_ids(), tmp_path)
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) is tied
    assert loaded.config.time_step_limit[1] == float("inf")


def test_logits_are_those_of_the_recurrence_with_the_given_norm_groups(model, token_ids):
    # the same truth on every version of transformers, so the versions agree where norm_group_size is given
    checks.check_against_reference(model, token_ids(2, 12))
    ids, before = token_ids(2, 12), checks.logits(model, token_ids(2, 12))
    model.backbone.layers[1].mixer.norm.group_size = 24
    assert (checks.logits(model, ids) - before).abs().max() > 1e-3


def test_decoding_padding_and_training(model, token_ids):
    checks.check_decoding(model, token_ids(3, 12))
    checks.check_left_padding(model, token_ids(2, 14))
    checks.check_training(model, token_ids(2, 12))


def test_the_fused_training_kernel_is_left_out_where_its_norm_would_differ(model, token_ids, monkeypatch):
    seen = []

    def fused(*args, headdim, **kwargs):  # where the kernel is absent, its place holder gives None like this one
        seen.append(headdim)

    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", fused)
    model.eval()
    checks.logits(model, token_ids(1, 4))
    assert seen == []
    model.train()
    checks.logits(model, token_ids(1, 4))
    assert seen == [5, 7]  # not the second block, whose norm has four groups and B and C one


def test_scalar_fields_are_the_largest():
    config = PrunedMamba2Config(hidden_size=32, num_hidden_layers=3, layer_sizes=DIFFERENT)
    assert (config.state_size, config.num_heads, config.head_dim, config.n_groups) == (12, 8, 7, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_groups": 4}, r"layer_sizes\[0\]: num_heads = 6 must be a multiple of n_groups = 4"),
        ({"norm_group_size": 20}, r"norm_group_size = 20 must divide num_heads \* head_dim = 30"),
        ({"norm_group_size": 0}, "norm_group_size must be an int of at least 1, got 0"),
        ({"heads": 3}, r"unknown key 'heads'; allowed: .*norm_group_size"),
    ],
)
def test_config_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        PrunedMamba2Config(num_hidden_layers=3, layer_sizes=[{**DIFFERENT[0], **change}, *DIFFERENT[1:]])


def test_config_refuses_missing_entries_and_keys():
    with pytest.raises(ValueError, match="num_hidden_layers = 2 entries, got 3"):
        PrunedMamba2Config(num_hidden_layers=2, layer_sizes=DIFFERENT)
    with pytest.raises(ValueError, match=r"layer_sizes\[1\] lacks 'n_groups'"):
        PrunedMamba2Config(
            num_hidden_layers=2, layer_sizes=[DIFFERENT[0], {"state_size": 2, "num_heads": 2, "head_dim": 1}]
        )


def take(module, name, index):
    """Keep these rows of a parameter."""
    setattr(module, name, nn.Parameter(getattr(module, name).detach()[index]))


def keep(block, states, heads):
    """States (the same in every group) and heads of one block of a stock model, sliced by hand."""
    mixer = block.mixer
    P, G, N, inner = mixer.head_dim, mixer.n_groups, mixer.ssm_state_size, mixer.intermediate_size
    norm_groups = inner // getattr(mixer.norm, "group_size", inner)
    channels = [h * P + p for h in heads for p in range(P)]
    bc = [part * G * N + g * N + n for part in (0, 1) for g in range(G) for n in states]
    conv = channels + [inner + i for i in bc]
    take(mixer.in_proj, "weight", channels + [inner + i for i in conv] + [2 * inner + 2 * G * N + h for h in heads])
    take(mixer.conv1d, "weight", conv)
    take(mixer.conv1d, "bias", conv)
    take(mixer.norm, "weight", channels)
    mixer.out_proj.weight = nn.Parameter(mixer.out_proj.weight.detach()[:, channels])
    for name in ("A_log", "D", "dt_bias"):
        take(mixer, name, heads)
    mixer.in_proj.out_features, mixer.out_proj.in_features = len(mixer.in_proj.weight), len(channels)
    conv1d = mixer.conv1d
    mixer.conv_dim = conv1d.in_channels = conv1d.out_channels = conv1d.groups = len(conv)
    mixer.num_heads, mixer.ssm_state_size, mixer.intermediate_size = len(heads), len(states), len(channels)
    sizes = {"state_size": len(states), "num_heads": len(heads), "head_dim": P, "n_groups": G}
    if GROUPED:
        sizes["norm_group_size"] = mixer.norm.group_size = len(channels) // norm_groups
    return sizes


@pytest.fixture
def cut():
    """A stock model with 8 heads in 2 groups whose blocks keep other states and heads, and the sizes it has then."""
    model = tiny_model("mamba2")
    blocks = model.backbone.layers
    return model, [keep(blocks[0], [1, 2, 6], list(range(8))), keep(blocks[1], list(range(7)), [0, 2, 3, 5, 6, 7])]


def test_a_cut_stock_model_becomes_one_that_reloads(cut, token_ids, tmp_path):
    model, sizes = cut
    ids, generation = token_ids(), model.generation_config
    before, tokens, state = checks.logits(model, ids), checks.generate(model, ids), torch.get_rng_state()

    with_sizes(model, sizes)

    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is PrunedMamba2ForCausalLM and model.generation_config is generation
    assert checks.holders(model) and all(config is model.config for config in checks.holders(model))
    assert torch.equal(checks.logits(model, ids), before)
    assert torch.equal(checks.generate(model, ids), tokens)
    checks.check_round_trip(model, ids, tmp_path)
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_removed_states_are_masked_states(token_ids, tmp_path):
    masked, model, ids = tiny_model("mamba2"), tiny_model("mamba2"), token_ids()
    with torch.no_grad():
        gone = [64 + 16 + g * 8 + n for g in range(2) for n in (0, 3, 4)]  # channels of C in conv1d
        masked.backbone.layers[1].mixer.conv1d.weight[gone] = 0
        masked.backbone.layers[1].mixer.conv1d.bias[gone] = 0
    blocks, heads = model.backbone.layers, list(range(8))
    with_sizes(model, [keep(blocks[0], list(range(8)), heads), keep(blocks[1], [1, 2, 5, 6, 7], heads)])
    loaded = checks.check_round_trip(model, ids, tmp_path)
    torch.testing.assert_close(checks.logits(loaded, ids), checks.logits(masked, ids))


@pytest.mark.parametrize("offloaded", [False, True])
def test_equal_groups_merge_without_loss_if_the_norm_keeps_its_groups(token_ids, tmp_path, offloaded):
    model, ids = tiny_model("mamba2"), token_ids()
    mixer = model.backbone.layers[0].mixer
    first, second = slice(0, 8), slice(8, 16)  # the two groups of B, then of C, behind z and x
    with torch.no_grad():
        for start in (0, 16):
            for weight, offset in ((mixer.in_proj.weight, 128), (mixer.conv1d.weight, 64), (mixer.conv1d.bias, 64)):
                rows = weight[offset + start : offset + start + 16]
                rows[second] = rows[first]
    dense = checks.logits(model, ids)
    kept = [*range(64), *range(64, 72), *range(80, 88)]  # channels of conv1d: x, B, C
    take(mixer.in_proj, "weight", [*range(64), *(64 + row for row in kept), *range(160, 168)])
    take(mixer.conv1d, "weight", kept)
    take(mixer.conv1d, "bias", kept)
    conv1d = mixer.conv1d
    mixer.conv_dim = conv1d.in_channels = conv1d.out_channels = conv1d.groups = len(kept)
    mixer.in_proj.out_features, mixer.n_groups = len(mixer.in_proj.weight), 1
    dense_groups = 32 if GROUPED else 64  # before 5.23 the dense norm is over all channels
    uncut = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}
    if offloaded:
        cpu_offload(model, torch.device("cpu"))
    with_sizes(model, [{**uncut, "n_groups": 1, "norm_group_size": dense_groups}, uncut])
    torch.testing.assert_close(checks.logits(model, ids), dense)
    if not offloaded:
        checks.check_round_trip(model, ids, tmp_path)


def test_norm_groups_take_effect_in_a_model_with_hooks(token_ids):
    uncut, ids = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}, token_ids()
    plain, hooked = tiny_model("mamba2"), tiny_model("mamba2")
    for model in (plain, hooked):
        for block in model.backbone.layers:
            block.mixer.norm.group_size = 16
    cpu_offload(hooked, torch.device("cpu"))
    for model in (plain, hooked):
        with_sizes(model, [{**uncut, "norm_group_size": 16}] * 2)
    checks.check_against_reference(plain, ids)
    assert torch.equal(checks.logits(hooked, ids), checks.logits(plain, ids))


def test_sizes_that_leave_out_the_groups_of_the_norm_are_refused(cut):
    model, sizes = cut
    if not GROUPED:
        pytest.skip("before transformers 5.23 the stock norm has no groups that could be left out")
    model.backbone.layers[0].mixer.norm.group_size = 16
    with pytest.raises(ConfigurationError, match="mixer.norm.group_size is 16, but with these sizes it is 32"):
        with_sizes(model, [{k: v for k, v in sizes[0].items() if k != "norm_group_size"}, sizes[1]])
