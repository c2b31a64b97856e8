# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Tiny S5 and S4D classifiers, and the rule of LAST written with a double loop."""

import torch

from optimum_ssm.models.s4d import S4DConfig, S4DForSequenceClassification, S4DLayer
from optimum_ssm.models.s5 import S5Config, S5ForSequenceClassification, S5Layer


VARIANTS = {
    "s5": {},
    "s5 one direction": {"bidirectional": False},
    "s5 one joint C": {"c_init": "complex_normal"},
    "s5 bilinear, no pairs": {"discretization": "bilinear", "conjugate_symmetry": False, "step_rescale": 0.5},
    "s4d": None,
}


def make(variant="s5", seed=0, layers=3):
    """A tiny classifier whose parameters all matter, and whose layers differ in scale."""
    torch.manual_seed(seed)
    common = {"hidden_size": 10, "num_hidden_layers": layers, "num_labels": 5}
    options = VARIANTS[variant]
    if options is None:
        model = S4DForSequenceClassification(S4DConfig(**common, ssm_size=16)).eval()
    else:
        model = S5ForSequenceClassification(S5Config(**common, ssm_size_base=16, num_blocks=2, **options)).eval()
    with torch.no_grad():
        for index, layer in enumerate(found(model)):
            real = layer.log_A_real if isinstance(layer, S4DLayer) else layer.Lambda_re
            real.add_(0.4 * torch.randn(real.shape).clamp(max=1))
            (layer.D if isinstance(layer, S4DLayer) else layer.B).mul_(1 + 3 * index)
    return model


def found(model):
    return [part for part in model.modules() if isinstance(part, (S5Layer, S4DLayer))]


def ids(seed=0):
    return torch.randint(1, 20, (3, 21), generator=torch.Generator().manual_seed(seed))


def slow_counts(scores, keep):
    """The rule as it is written, with a double loop."""
    table = []
    for layer, energies in enumerate(scores):
        ordered = sorted(energies.tolist(), reverse=True)
        for k in range(1, len(ordered) + 1):
            table.append((ordered[k - 1] / sum(ordered[j] for j in range(k)), -layer))
    best = sorted(table, reverse=True)[:keep]
    return [sum(-entry[1] == layer for entry in best) for layer in range(len(scores))]
