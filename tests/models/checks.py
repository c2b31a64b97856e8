# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What every model with sizes per block must pass, whatever its family."""

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import optimum_ssm  # noqa: F401  (registers the classes)
from tests import reference
from tests.conftest import COMMON, SIZES, randomise


def build(model_type: str, layer_sizes: list[dict[str, int]], **changes: object) -> PreTrainedModel:
    """A random model of a pruned class from its config, in eval mode."""
    fields = {**COMMON, **SIZES[model_type], "num_hidden_layers": len(layer_sizes), "pad_token_id": 1, **changes}
    config = AutoConfig.for_model(f"optimum_ssm_{model_type}", **fields, layer_sizes=layer_sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    return model


def logits(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def generate(model: PreTrainedModel, ids: Tensor, **kwargs: object) -> Tensor:
    """Eight greedy tokens."""
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    return model.generate(ids, attention_mask=kwargs.pop("attention_mask", torch.ones_like(ids)), **settings, **kwargs)


def reload(model: PreTrainedModel, directory) -> PreTrainedModel:
    model.save_pretrained(directory)
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return loaded


def check_round_trip(model: PreTrainedModel, ids: Tensor, directory) -> PreTrainedModel:
    """Everything is bit for bit what it was before saving; the reloaded model is returned."""
    loaded = reload(model, directory)
    assert type(loaded) is type(model) and type(loaded.base_model) is type(model.base_model)
    assert loaded.config.layer_sizes == model.config.layer_sizes
    assert loaded.config.architectures == [type(model).__name__]
    found, wanted = dict(loaded.named_parameters()), dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(generate(loaded, ids), generate(model, ids))
    return loaded


def check_against_reference(model: PreTrainedModel, ids: Tensor) -> None:
    """The logits are those of the papers' recurrences in float64, block by block of its own sizes."""
    torch.testing.assert_close(logits(model, ids).double(), reference.trace(model, ids)[1], atol=2e-5, rtol=2e-5)


def check_decoding(model: PreTrainedModel, ids: Tensor) -> None:
    """A prefill and then one token after the other gives the logits of the whole sequence."""
    whole, steps, cache = logits(model, ids), [], None
    with torch.no_grad():
        for piece in (ids[:, :5], *ids[:, 5:].split(1, dim=1)):
            out = model(piece, cache_params=cache, use_cache=True)
            cache = out.cache_params
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=2e-5, rtol=2e-5)
    for layer, sizes in zip(cache.layers, model.config.layer_sizes):
        assert layer.recurrent_states[0].shape[-1] == sizes["state_size"]


def check_left_padding(model: PreTrainedModel, ids: Tensor) -> None:
    """A short sequence that is padded on the left continues as it does alone."""
    short = ids[:1, 6:]
    padded = torch.cat([torch.full((1, 6), model.config.pad_token_id), short], dim=1)
    mask = torch.cat([torch.zeros(1, 6, dtype=torch.int64), torch.ones_like(short)], dim=1)
    both = generate(model, torch.cat([padded, ids[1:2]]), attention_mask=torch.cat([mask, torch.ones_like(mask)]))
    assert torch.equal(both[0, 6:], generate(model, short)[0])
    assert torch.equal(both[1], generate(model, ids[1:2])[0])


def check_training(model: PreTrainedModel, ids: Tensor) -> None:
    """Every parameter gets a gradient, the same with and without gradient checkpointing."""
    model.train()
    found = []
    for checkpointing in (False, True):
        (model.gradient_checkpointing_enable if checkpointing else model.zero_grad)()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        torch.testing.assert_close(found[1][name], gradient)


def holders(model: PreTrainedModel) -> list:
    """Every config that a module of the model holds."""
    return [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
