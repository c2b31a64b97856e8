# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba-2: `Mamba2ForCausalLM`. Heads H of dimension P (inner size I = H·P), states N, groups G."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from . import register_family
from .axes import Axis, Owned, present, runs
from .base import Family, PrunableWeight, Site


@register_family("mamba2")
class Mamba2(Family):
    """Rows of in_proj are [z, x, B, C, dt], channels of conv1d are [x, B, C]. A_log is (H)."""

    model_types: ClassVar[tuple[str, ...]] = ("mamba2",)
    scan: ClassVar[str] = "mamba2_chunk_scan"
    recurrence: ClassVar[str] = "mamba2"

    def weights(self, block: nn.Module) -> list[PrunableWeight]:
        inner = block.mixer.out_proj.weight.shape[1]
        conv = block.mixer.conv1d.weight.shape[0]
        bc = (conv - inner) // 2  # G·N rows each of B and C
        edges = [0, inner, 2 * inner, 2 * inner + bc, 2 * inner + 2 * bc, block.mixer.in_proj.weight.shape[0]]
        return [
            PrunableWeight(
                "in_proj",
                "mixer.in_proj.weight",
                "linear",
                Site("mixer.in_proj", "input"),
                dict(zip(("z", "x", "B", "C", "dt"), zip(edges, edges[1:]))),
            ),
            # The conv1d module is never called: its weight meets the x, B, C columns of what in_proj gives.
            PrunableWeight(
                "conv1d",
                "mixer.conv1d.weight",
                "conv",
                Site("mixer.in_proj", "output", (inner, inner + conv)),
                {"x": (0, inner), "B": (inner, inner + bc), "C": (inner + bc, conv)},
            ),
            PrunableWeight("A_log", "mixer.A_log", "a_log", Site("mixer", "scan")),
            PrunableWeight("out_proj", "mixer.out_proj.weight", "linear", Site("mixer.out_proj", "input")),
        ]

    def axes(self, block: nn.Module) -> dict[str, Axis]:
        sizes = self.sizes(block)
        heads, width, groups, states = (sizes[n] for n in ("num_heads", "head_dim", "n_groups", "state_size"))
        inner, bc = heads * width, groups * states
        norm = "mixer.norm.weight"
        # from 5.23 on transformers normalises every group by itself, and a group that goes leaves the others alone; groups
        # that were merged have kept norms of their own, which heads must not change
        norm_size = getattr(block.mixer.norm, "group_size", inner)
        apart, norms = (inner // groups) % norm_size == 0, inner // norm_size
        channels = runs(0, inner)
        of_heads = _heads(runs(0, heads), inner, bc)
        state = _states(runs(0, bc), inner, bc, masks=True)
        head = _channels(runs(0, heads, width), inner) + of_heads
        group = (
            _channels(runs(0, groups, inner // groups), inner)
            + _heads(runs(0, groups, heads // groups), inner, bc)
            + _states(runs(0, groups, states), inner, bc)
        )
        read = tuple(
            owned
            for owned in (*_channels(channels, inner), *of_heads)
            if owned.name in ("in_proj.z", "out_proj", "A_log")
        )
        axes = (
            Axis("state", bc, groups, state, read, multiple=16),
            Axis("head", heads, math.lcm(groups, norms), head, multiple=_head_multiple(sizes, norms), norm=norm),
            Axis("head_dim", inner, heads, _channels(channels, inner), multiple=8, norm=norm),
            Axis("group", groups, 1, group, norm=None if apart else norm),
        )
        return {axis.name: present(axis, block) for axis in axes}

    def sizes(self, block: nn.Module) -> dict[str, int]:
        mixer = block.mixer
        sizes = {
            "state_size": mixer.ssm_state_size,
            "num_heads": mixer.num_heads,
            "head_dim": mixer.head_dim,
            "n_groups": mixer.n_groups,
        }
        if hasattr(mixer.norm, "group_size"):
            sizes["norm_group_size"] = mixer.norm.group_size
        return sizes

    def sizes_after(self, sizes: dict[str, int], axis: Axis, kept: int) -> dict[str, int]:
        after = dict(sizes)
        if axis.name == "state":
            after["state_size"] = kept // sizes["n_groups"]
        elif axis.name == "head":
            after["num_heads"] = kept
        elif axis.name == "head_dim":
            after["head_dim"] = kept // sizes["num_heads"]
        else:
            after["n_groups"] = kept
            after["num_heads"] = kept * sizes["num_heads"] // sizes["n_groups"]
        inner, left = (of["num_heads"] * of["head_dim"] for of in (sizes, after))
        if "norm_group_size" in sizes and axis.name in ("head", "head_dim"):
            after["norm_group_size"] = left * sizes["norm_group_size"] // inner
        elif sizes.get("norm_group_size", 0) > left:  # a norm over all channels, of which there are fewer now
            after["norm_group_size"] = left
        return after

    def set_sizes(self, block: nn.Module, sizes: dict[str, int]) -> None:
        mixer = block.mixer
        mixer.ssm_state_size, mixer.n_groups = sizes["state_size"], sizes["n_groups"]
        mixer.num_heads, mixer.head_dim = sizes["num_heads"], sizes["head_dim"]
        mixer.intermediate_size = sizes["num_heads"] * sizes["head_dim"]
        mixer.conv_dim = mixer.intermediate_size + 2 * sizes["n_groups"] * sizes["state_size"]
        conv = mixer.conv1d
        conv.in_channels = conv.out_channels = conv.groups = mixer.conv_dim
        if "norm_group_size" in sizes:
            mixer.norm.group_size = sizes["norm_group_size"]

    def stock_fields(self, config: Any, sizes: dict[str, int]) -> dict[str, Any] | None:
        inner = sizes["num_heads"] * sizes["head_dim"]
        alone = inner // sizes["n_groups"]
        if inner % config.hidden_size or sizes.get("norm_group_size", alone) != alone:
            return None  # the stock class wants a whole expand, and norms over the groups of B and C
        fields = {name: sizes[name] for name in ("state_size", "num_heads", "head_dim", "n_groups")}
        return {**fields, "expand": inner // config.hidden_size}


def _rows(name: str, index: Tensor, site: tuple[int, int] | None = None, masks: bool = False) -> tuple[Owned, ...]:
    """Rows of in_proj, with its bias."""
    seen = Site("mixer.in_proj", "output", site) if site else None
    return (
        Owned(f"in_proj.{name}", "mixer.in_proj.weight", 0, index, site=seen, masks=masks),
        Owned(f"in_proj.bias.{name}", "mixer.in_proj.bias", 0, index, "vector", masks=masks),
    )


def _conv(name: str, index: Tensor, masks: bool = False) -> tuple[Owned, ...]:
    """Channels of conv1d, with its bias."""
    return (
        Owned(f"conv1d.{name}", "mixer.conv1d.weight", 0, index, "conv", masks=masks),
        Owned(f"conv1d.bias.{name}", "mixer.conv1d.bias", 0, index, "vector", masks=masks),
    )


def _channels(index: Tensor, inner: int) -> tuple[Owned, ...]:
    """What channels of the inner size own: one index set from z and x to out_proj, so that nothing is paired anew."""
    return (
        *_rows("z", index, (0, inner), masks=True),
        *_rows("x", index + inner, (inner, 2 * inner)),
        *_conv("x", index),
        Owned("norm", "mixer.norm.weight", 0, index, "vector"),
        Owned("out_proj", "mixer.out_proj.weight", 1, index, site=Site("mixer.out_proj", "input")),
    )


def _heads(index: Tensor, inner: int, bc: int) -> tuple[Owned, ...]:
    """What heads own besides their channels."""
    return (
        *_rows("dt", index + 2 * inner + 2 * bc),
        Owned("A_log", "mixer.A_log", 0, index, "a_log"),
        Owned("D", "mixer.D", 0, index, "vector"),
        Owned("dt_bias", "mixer.dt_bias", 0, index, "vector"),
    )


def _states(index: Tensor, inner: int, bc: int, masks: bool = False) -> tuple[Owned, ...]:
    """What states of a group own: their rows and channels in B and C. Zero rows of C alone would leave silu(bias)."""
    return (
        *_rows("B", index + 2 * inner),
        *_rows("C", index + 2 * inner + bc),
        *_conv("B", index + inner),
        *_conv("C", index + inner + bc, masks=masks),
    )


def _head_multiple(sizes: dict[str, int], norms: int) -> int:
    """Kept heads of a group come in such numbers that rows of in_proj and channels of conv1d are multiples of 8."""
    width, bc = sizes["head_dim"], sizes["n_groups"] * sizes["state_size"]
    for count in (1, 2, 4):
        heads = count * math.lcm(sizes["n_groups"], norms)
        if (heads * (2 * width + 1)) % 8 == 0 and (heads * width) % 8 == 0 and (2 * bc) % 8 == 0:
            return count
    return 8
