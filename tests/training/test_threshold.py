# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The global threshold against a plain sort of all scores."""

import pytest
import torch

from optimum_ssm import CalibrationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.training import GradualPruningCallback


TARGETS = ["in_proj.x", "conv1d", "A_log", "out_proj"]


def threshold_of(model, **changes):
    values = {"method": "gradient_magnitude", "sparsity": 0.9, "targets": TARGETS, "a_log_fill": "zero", **changes}
    return GradualPruningCallback(SSMPruner(model), SSMPrunerConfig(**values), end_step=10).threshold


def backward(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()


def by_sorting(threshold, gradients, removed, count):
    """(parameter, index) of the `count` lowest entries; what is removed goes first, equal scores in model order."""
    entries, place = [], 0
    for task in threshold.plan.tasks:
        name = task.target.parameter
        weight = threshold.masks.parameters[name].detach()
        score = weight.abs() * gradients[name] if gradients else weight.abs()
        rows = range(*task.target.rows.indices(len(weight)))
        width = weight[0].numel()
        for index in range(rows.start * width, rows.stop * width):
            known = bool(removed[name].reshape(-1)[index])
            entries.append((-1.0 if known else float(score.reshape(-1)[index]), place, name, index))
            place += 1
    return {(name, index) for _, _, name, index in sorted(entries)[:count]}


def as_pairs(threshold):
    masks = threshold.masks.masks
    return {
        (name, index) for name in threshold.names for index in masks[name].reshape(-1).nonzero().flatten().tolist()
    }


@pytest.mark.parametrize("method", ["gradient_magnitude", "magnitude"])
def test_masks_are_those_of_a_plain_sort_over_all_targets(either_tiny_model, token_ids, method):
    threshold = threshold_of(either_tiny_model, method=method)
    gradients = {}
    for count in (1, threshold.size // 3, threshold.size // 3 + 1, threshold.size // 2):
        removed = {name: mask.clone() for name, mask in threshold.masks.masks.items()}
        if method == "gradient_magnitude":
            threshold.reset()
            found = []
            for seed in range(2):
                backward(either_tiny_model, token_ids(seed=count + seed))
                threshold.add_gradients()
                found.append({name: threshold.masks.parameters[name].grad.abs() for name in threshold.names})
            gradients = {name: (found[0][name] + found[1][name]) / 2 for name in threshold.names}
        expected = by_sorting(threshold, gradients, removed, count)
        threshold.remove(count)
        assert threshold.removed == count
        assert as_pairs(threshold) == expected
        assert all((threshold.masks.masks[name] >= mask).all() for name, mask in removed.items())
        threshold.masks.apply()
        if method == "magnitude":  # what came back to life in between must not return
            with torch.no_grad():
                for name in threshold.names:
                    threshold.masks.parameters[name][threshold.masks.masks[name]] = 5.0


def test_alpha_0_is_global_magnitude(tiny_mamba, make_tiny_model):
    masks = []
    for model, method, kwargs in (
        (tiny_mamba, "magnitude", {}),
        (make_tiny_model("mamba"), "gradient_magnitude", {"alpha": 0.0}),
    ):
        threshold = threshold_of(model, method=method, method_kwargs=kwargs)
        assert not threshold.needs_gradients
        threshold.remove(1234)
        masks.append(threshold.masks.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_equal_scores_go_in_model_order_and_the_count_is_exact(tiny_mamba):
    threshold = threshold_of(tiny_mamba, method="magnitude", targets=["in_proj", "out_proj"])
    with torch.no_grad():
        for name in threshold.names:
            threshold.masks.parameters[name].fill_(0.5)
    threshold.remove(4100)
    sums = [int(threshold.masks.masks[name].sum()) for name in threshold.names]
    assert sums == [4096, 4, 0, 0]


def test_an_emptied_weight_is_named_once(tiny_mamba, monkeypatch):
    said = []
    monkeypatch.setattr("optimum_ssm.training.threshold.logger.warning", said.append)
    threshold = threshold_of(tiny_mamba, method="magnitude", targets=["in_proj", "out_proj"])
    with torch.no_grad():
        threshold.masks.parameters["backbone.layers.1.mixer.out_proj.weight"].mul_(1e-6)
    for count in (3000, 3100):
        threshold.remove(count)
    assert [text.split(":")[0] for text in said] == ["backbone.layers.1.mixer.out_proj"]


def test_gradients_that_are_not_finite_are_left_out(tiny_mamba, token_ids):
    threshold = threshold_of(tiny_mamba)
    backward(tiny_mamba, token_ids())
    threshold.add_gradients()
    sums = {name: value.clone() for name, value in threshold.sums.items()}
    threshold.masks.parameters[threshold.names[0]].grad[0, 0] = torch.inf
    threshold.add_gradients()
    assert threshold.batches == 1
    assert all(torch.equal(threshold.sums[name], value) for name, value in sums.items())
    threshold.reset()
    with pytest.raises(CalibrationError, match="no finite gradient"):
        threshold.remove(10)


def test_a_weight_without_gradient_is_named(tiny_mamba):
    with pytest.raises(CalibrationError, match="layers.0.mixer.in_proj.weight gets no gradient"):
        threshold_of(tiny_mamba).add_gradients()
