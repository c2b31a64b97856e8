# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 with several groups whose B and C are known copies of each other."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optimum_ssm.models import with_sizes

from .conftest import tiny_model


def grown(groups: int, seed: int = 0, **changes: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model with one group, and the same function with B and C repeated for `groups` of them.

    The norm of the second averages over all channels, as that of the first.
    """
    one = tiny_model("mamba2", seed, n_groups=1, **changes)
    many = tiny_model("mamba2", seed, n_groups=groups, **changes)
    states = one.config.state_size
    with torch.no_grad():
        for (name, parameter), other in zip(many.named_parameters(), one.parameters()):
            if parameter.shape == other.shape:
                parameter.copy_(other)
                continue
            inner = one.config.num_heads * one.config.head_dim
            start = 2 * inner if "in_proj" in name else inner
            before, b, c, after = other.split([start, states, states, len(other) - start - 2 * states])
            parameter.copy_(torch.cat([before, *[b] * groups, *[c] * groups, after]))
    sizes = []
    for block in many.base_model.layers:
        mixer = block.mixer
        sizes.append(
            {
                "state_size": mixer.ssm_state_size,
                "num_heads": mixer.num_heads,
                "head_dim": mixer.head_dim,
                "n_groups": groups,
                "norm_group_size": mixer.intermediate_size,
            }
        )
        mixer.norm.group_size = mixer.intermediate_size
    with_sizes(many, sizes)
    return one, many


def heads_of(block: torch.nn.Module) -> Iterator[Tensor]:
    """Views on B and on C of a block's parameters, (G, N, …) each: writing to them writes to the block."""
    mixer = block.mixer
    groups, states = mixer.n_groups, mixer.ssm_state_size
    starts = {mixer.in_proj: 2 * mixer.intermediate_size, mixer.conv1d: mixer.intermediate_size}
    for module, start in starts.items():
        for parameter in (module.weight, module.bias):
            if parameter is not None:
                for side in range(2):
                    first = start + side * groups * states
                    yield parameter.data[first : first + groups * states].unflatten(0, (groups, states))
