# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""On real activations of trained models a better method has a smaller error, weight by weight (oracle 17)."""

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from optimum_ssm.methods.alps import ALPS
from optimum_ssm.methods.magnitude import Magnitude
from optimum_ssm.methods.sparsegpt import SparseGPT
from optimum_ssm.methods.wanda import Wanda
from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import Selection

from ..reference import relative_error


SAMPLES, LENGTH = 4, 256


@pytest.fixture(scope="module")
def calibration_ids(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "mamba-tiny", local_files_only=True)
    text = (assets / "wikitext-2" / "calibration.txt").read_text(encoding="utf-8")[:20_000]
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"][: SAMPLES * LENGTH]).reshape(SAMPLES, LENGTH)


def problems(model, ids):
    """Every linear weight of the model with the Gram matrix of its inputs, seen by plain forward hooks."""
    grams, handles = {}, []

    def add(name, x):
        rows = x.detach().double().reshape(-1, x.shape[-1])
        grams[name] = grams.get(name, 0) + rows.T @ rows / rows.shape[0]

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "mixer" in name:
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: add(name, args[0])))
        if name.endswith("x_proj"):  # dt_proj is used as a matrix: its input is what x_proj gives first
            rank = model.config.time_step_rank
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, name=name: add(name.replace("x_proj", "dt_proj"), out[..., :rank])
                )
            )
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (model.get_submodule(name).weight.detach(), gram) for name, gram in grams.items()}


@pytest.mark.parametrize("name, weights", [("mamba-tiny", 24), ("mamba2-tiny", 12)])
def test_sparsegpt_loses_no_more_than_wanda_and_wanda_no_more_than_magnitude(
    load_trained, calibration_ids, name, weights
):
    found = problems(load_trained(name), calibration_ids)
    assert len(found) == weights
    compared, violations = 0, []
    for parameter, (weight, gram) in found.items():
        statistics = {"gram": gram.float(), "col_energy": gram.diagonal().float()}
        for budget in ("0.5", "0.7", "2:4"):
            pattern = Pattern.parse(budget) if ":" in budget else Pattern()
            if not pattern.fits(weight.shape[1]):
                continue
            count = 0 if pattern.is_n_m else round(float(budget) * weight.numel())
            selection = Selection(count, "row", pattern)  # the same comparison group for wanda and magnitude
            errors = [
                relative_error(weight, method.prune(weight, statistics, "linear", chosen)[0], gram)
                for method, chosen in (
                    (SparseGPT(), Selection(count, "tensor", pattern)),  # as published: a block of 128 columns
                    (Wanda(), selection),
                    (Magnitude(), selection),
                )
            ]
            compared += 1
            if not 0 < errors[0] <= errors[1] <= errors[2]:
                violations.append((parameter, budget, errors))
    assert not violations
    assert compared == {"mamba-tiny": 66, "mamba2-tiny": 36}[name]  # dt_proj has 10 inputs: no 2:4 there


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_the_order_holds_on_tokens_that_no_method_has_seen(load_trained, assets, name):
    """On 18,432 tokens, and 6,144 others to measure on. On 4,096, SparseGPT fits one weight too closely to beat Wanda there."""
    tokenizer = AutoTokenizer.from_pretrained(assets / name, local_files_only=True)
    text = (assets / "wikitext-2" / "calibration.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 96 * LENGTH]).reshape(96, LENGTH)
    seen, held_out = (problems(load_trained(name), part) for part in (ids[:72], ids[72:]))
    violations = []
    for parameter, (weight, gram) in seen.items():
        statistics = {"gram": gram.float(), "col_energy": gram.diagonal().float()}
        for budget in ("0.5", "0.7", "2:4"):
            pattern = Pattern.parse(budget) if ":" in budget else Pattern()
            if not pattern.fits(weight.shape[1]):
                continue
            count = 0 if pattern.is_n_m else round(float(budget) * weight.numel())
            row, tensor = Selection(count, "row", pattern), Selection(count, "tensor", pattern)
            methods = ((ALPS(), tensor), (SparseGPT(), tensor), (Wanda(), row), (Magnitude(), row))
            errors = [
                relative_error(weight, method.prune(weight, statistics, "linear", chosen)[0], held_out[parameter][1])
                for method, chosen in methods
            ]
            if not 0 < errors[0] <= errors[1] <= errors[2] <= errors[3]:
                violations.append((parameter, budget, errors))
    assert not violations
