# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba with different state sizes, inner sizes and time step ranks per block."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.models import with_sizes
from optimum_ssm.models.pruned_mamba import PrunedMambaConfig, PrunedMambaForCausalLM, PrunedMambaModel
from tests.conftest import tiny_model
from tests.models import checks


# No two numbers alike, nor any of them that of the dense model.
DIFFERENT = [
    {"state_size": 5, "intermediate_size": 24, "time_step_rank": 3},
    {"state_size": 3, "intermediate_size": 40, "time_step_rank": 2},
    {"state_size": 12, "intermediate_size": 9, "time_step_rank": 1},
]


@pytest.fixture
def model():
    return checks.build("mamba", DIFFERENT)


def test_blocks_have_the_sizes_of_their_entries(model):
    assert isinstance(model, PrunedMambaForCausalLM) and isinstance(model.backbone, PrunedMambaModel)
    for block, sizes in zip(model.backbone.layers, DIFFERENT, strict=True):
        assert block.mixer.A_log.shape == (sizes["intermediate_size"], sizes["state_size"])
        assert block.mixer.dt_proj.weight.shape == (sizes["intermediate_size"], sizes["time_step_rank"])
    assert all(config is model.config for config in checks.holders(model))


def test_round_trip_with_tied_head(model, token_ids, tmp_path):
    loaded = checks.check_round_trip(model, token_ids(), tmp_path)
    assert loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert isinstance(AutoModel.from_pretrained(tmp_path), PrunedMambaModel)


def test_round_trip_with_untied_head_in_bfloat16(token_ids, tmp_path):
    model = checks.build("mamba", DIFFERENT, tie_word_embeddings=False, use_bias=True).bfloat16()
    loaded = checks.check_round_trip(model, token_ids(), tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is not loaded.backbone.embeddings.weight


def test_logits_are_those_of_the_recurrence(model, token_ids):
    checks.check_against_reference(model, token_ids(2, 12))


def test_decoding_padding_and_training(model, token_ids):
    checks.check_decoding(model, token_ids(3, 12))
    checks.check_left_padding(model, token_ids(2, 14))
    checks.check_training(model, token_ids(2, 12))


def test_scalar_fields_are_the_largest_and_the_default_is_alike():
    config = PrunedMambaConfig(num_hidden_layers=3, layer_sizes=DIFFERENT)
    assert (config.state_size, config.intermediate_size, config.time_step_rank) == (12, 40, 3)
    alike = PrunedMambaConfig(num_hidden_layers=2, hidden_size=32, state_size=4)
    assert alike.layer_sizes == [{"state_size": 4, "intermediate_size": 64, "time_step_rank": 2}] * 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (DIFFERENT[:2], "num_hidden_layers = 3 entries, got 2"),
        ([], "num_hidden_layers = 3 entries, got 0"),
        (
            [*DIFFERENT[:2], {**DIFFERENT[2], "stat_size": 3}],
            r"layer_sizes\[2\]: unknown key 'stat_size'; allowed: state",
        ),
        ([DIFFERENT[0], {"state_size": 3}, DIFFERENT[2]], r"layer_sizes\[1\] lacks 'intermediate_size'"),
        (
            [{**DIFFERENT[0], "state_size": 0}, *DIFFERENT[1:]],
            r"layer_sizes\[0\]: state_size must be an int of at least 1",
        ),
        ([{**DIFFERENT[0], "state_size": "4"}, *DIFFERENT[1:]], "must be an int of at least 1, got '4'"),
        ([None, *DIFFERENT[1:]], r"layer_sizes\[0\] must be a dict"),
    ],
)
def test_config_refuses(sizes, message):
    with pytest.raises(ValueError, match=message):
        PrunedMambaConfig(num_hidden_layers=3, layer_sizes=sizes)


def test_config_that_no_longer_fits_is_neither_built_nor_saved(model, tmp_path):
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="num_hidden_layers = 2 entries, got 3"):
        PrunedMambaForCausalLM(model.config)
    with pytest.raises(Exception, match="num_hidden_layers = 2 entries, got 3"):
        model.save_pretrained(tmp_path)


def keep_states(block, kept):
    """States of one block of a stock model, sliced by hand: rows of x_proj, columns of A_log."""
    mixer, rank, states = block.mixer, block.mixer.time_step_rank, block.mixer.ssm_state_size
    rows = [*range(rank), *(rank + n for n in kept), *(rank + states + n for n in kept)]
    mixer.x_proj.weight = torch.nn.Parameter(mixer.x_proj.weight[rows].detach())
    mixer.x_proj.out_features = len(rows)
    mixer.A_log = torch.nn.Parameter(mixer.A_log[:, kept].detach())
    mixer.ssm_state_size = len(kept)
    return {"state_size": len(kept), "intermediate_size": mixer.intermediate_size, "time_step_rank": rank}


@pytest.fixture
def cut():
    """A stock model whose blocks keep other numbers of states, and the sizes that it has then."""
    model = tiny_model("mamba")
    blocks = model.backbone.layers
    return model, [keep_states(blocks[0], [1, 2, 6]), keep_states(blocks[1], [0, 3, 4, 5, 7])]


def test_a_cut_stock_model_becomes_one_that_reloads(cut, token_ids, tmp_path):
    model, sizes = cut
    ids, generation = token_ids(), model.generation_config
    before, tokens = checks.logits(model, ids), checks.generate(model, ids)
    masked = tiny_model("mamba")  # zero rows of C in x_proj are what removal means
    for block, gone in zip(masked.backbone.layers, ([0, 3, 4, 5, 7], [1, 2, 6])):
        with torch.no_grad():
            block.mixer.x_proj.weight[[6 + 8 + n for n in gone]] = 0
    torch.testing.assert_close(before, checks.logits(masked, ids))
    state = torch.get_rng_state()

    with_sizes(model, sizes)

    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is PrunedMambaForCausalLM and model.generation_config is generation
    assert checks.holders(model) and all(config is model.config for config in checks.holders(model))
    assert model.config.model_type == "optimum_ssm_mamba" and not model.training
    assert torch.equal(checks.logits(model, ids), before)
    assert torch.equal(checks.generate(model, ids), tokens)
    checks.check_round_trip(model, ids, tmp_path)
    assert model.lm_head.weight is model.backbone.embeddings.weight


def test_a_pruned_model_can_be_cut_and_shortened_again(model, token_ids, tmp_path):
    with pytest.raises(ConfigurationError, match="sizes has 2 entries, but the model has 3 blocks"):
        with_sizes(model, DIFFERENT[1:])
    del model.backbone.layers[0]
    with pytest.raises(ConfigurationError, match=r"layers.0.layer_idx is 1, but with these sizes it is 0"):
        with_sizes(model, DIFFERENT[1:])
    for index, block in enumerate(model.backbone.layers):
        block.layer_idx = block.mixer.layer_idx = index
    sizes = [DIFFERENT[1], keep_states(model.backbone.layers[1], [0, 2, 5, 11])]
    with_sizes(model, sizes)
    assert model.config.num_hidden_layers == 2 and model.config.state_size == 4
    checks.check_round_trip(model, token_ids(), tmp_path)


def test_what_a_model_does_not_have_is_refused_and_nothing_changes(cut, tiny_mamba):
    model, sizes = cut
    config = model.config
    with pytest.raises(
        ConfigurationError, match=r"layers.0.mixer.A_log is \(64, 3\), but with these sizes it is \(64, 4\)"
    ):
        with_sizes(model, [{**sizes[0], "state_size": 4}, sizes[1]])
    model.backbone.layers[1].mixer.ssm_state_size = 8
    with pytest.raises(ConfigurationError, match="layers.1.mixer.ssm_state_size is 8, but with these sizes it is 5"):
        with_sizes(model, sizes)
    with pytest.raises(ConfigurationError, match=r"layer_sizes\[0\]: unknown key 'heads'"):
        with_sizes(model, [{**sizes[0], "heads": 4}, sizes[1]])
    assert type(model) is type(tiny_mamba) and model.config is config
    with pytest.raises(ConfigurationError, match="MambaModel.*allowed: MambaForCausalLM or PrunedMambaForCausalLM"):
        with_sizes(model.backbone, sizes)
    model.config.model_type = "gpt2"
    with pytest.raises(ConfigurationError, match="'gpt2'.*Allowed: mamba, mamba2"):
        with_sizes(model, sizes)


def test_device_map_loads_it(model, token_ids, tmp_path):
    model.save_pretrained(tmp_path)
    blocks = {f"backbone.layers.{index}": "cpu" for index in range(3)}
    where = {
        **blocks,
        "backbone.layers.1": "disk",
        "backbone.embeddings": "cpu",
        "backbone.norm_f": "cpu",
        "lm_head": "cpu",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "offload")
    ids = token_ids()
    assert torch.equal(checks.logits(loaded, ids), checks.logits(model, ids))
