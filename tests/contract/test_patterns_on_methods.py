# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""N:M holds for every method in the registry: in every group, in the weights themselves, with what does not fit named."""

from collections.abc import Callable

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm import SSMPruner, SSMPrunerConfig
from optimum_ssm.families import family_of
from optimum_ssm.families.matching import declared_targets
from optimum_ssm.methods import METHODS


@pytest.mark.parametrize("pattern, least", [("1:4", 3), ("4:8", 4)])  # 2:4 is in test_methods_on_families
@pytest.mark.parametrize("method", METHODS.names())
def test_every_group_of_every_weight_has_its_zeros(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor], method: str, pattern: str, least: int
) -> None:
    size = int(pattern[-1])
    kinds = METHODS.get(method).kinds
    targets = [t for t in declared_targets(family_of(tiny_mamba), tiny_mamba) if t.weight.kind in kinds]
    config = SSMPrunerConfig(
        method=method,
        pattern=pattern,
        targets=sorted({t.name for t in targets}),
        dataset=token_ids(),
        seq_len=24,
        reconstruction_epochs=0,
    )
    report = SSMPruner(tiny_mamba).prune(config)
    rows = {row.name: row for row in report.rows}
    fitted = 0
    for target in targets:
        weight = tiny_mamba.get_parameter(target.parameter).detach()
        row = rows[target.parameter]
        if weight.shape[-1] % size:
            assert row.pruned == 0 and f"do not split into groups of {size}" in row.reason, target.label
            continue
        fill = 38.0 if target.weight.kind == "a_log" else 0.0
        gone = (weight.reshape(-1, size) == fill).sum(1)
        assert (gone >= least).all(), target.label
        assert row.pruned == least * weight.numel() // size
        fitted += 1
    assert fitted >= 4  # two blocks
