# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Facts about targets, made up for tests of allocations."""

import torch

from optimum_ssm.sparsity.allocations.base import Evidence, Item


def item(name="in_proj", block=0, size=1000, kind="linear"):
    return Item(name, block, size, kind)


def evidence(weight, name="in_proj", block=0, kind="linear", score=None, **statistics):
    facts = Item(name, block, weight.numel(), kind)
    return Evidence(facts, weight, statistics, score or (lambda: weight.abs()))


def summaries_of(allocation, blocks, sparsity=0.5):
    """Items and summaries of `blocks`, lists of evidence, in the order in which the plan pass gives them."""
    items = [entry.item for block in blocks for entry in block]
    return items, [summary for block in blocks for summary in allocation.summarise(block, sparsity)]


def linear(block, name="in_proj", shape=(20, 12), scale=1.0):
    weight, energy = torch.randn(shape), scale * torch.rand(shape[1])
    return evidence(weight, name, block, col_energy=energy, gram=torch.diag(energy))
