# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Random units: a control that is the same every time."""

import torch

from ...conftest import tiny_model
from ...structured import prune, scores_of


def removed(**values):
    return (
        prune(tiny_model("mamba2", num_hidden_layers=3), method="random", axis="state", **values)
        .report.passes[0]
        .units["removed"]
    )


def test_the_seed_decides_and_blocks_differ():
    once = removed()
    assert once == removed()
    assert once != removed(seed=1) == removed(method_kwargs={"seed": 1})
    assert once[0] != once[1] != once[2]
    assert [n for n in once[0] if n < 8] != [n - 8 for n in once[0] if n >= 8], "groups differ too"


def test_draws_are_uniform():
    model = tiny_model("mamba", intermediate_size=256)
    scores = torch.cat([torch.cat(scores_of(model, "random", "channel", None, seed=s)) for s in range(8)])
    assert len(scores) == 4096 and len(scores.unique()) > 4000
    assert abs(float(scores.mean()) - 0.5) < 0.02 and abs(float(scores.var()) - 1 / 12) < 0.005
