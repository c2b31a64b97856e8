# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The words in which a family describes its models: blocks, prunable weights and where the input of each is seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn


if TYPE_CHECKING:
    from .axes import Axis


@dataclass(frozen=True)
class Site:
    """Where in a block the input of a weight can be observed.

    Some weights are used without calling their module (`dt_proj`, `conv1d`), so the site may be a slice of another
    module's output. Scan sites are arguments of the selective scan.

    Args:
        module (`str`): path inside the block; for scan sites the mixer.
        end (`str`): `"input"`, `"output"` or `"scan"`.
        columns (`tuple[int, int]`, *optional*): slice of the last dimension; default all of it.
    """

    module: str
    end: str
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class PrunableWeight:
    """One weight of a block that methods can prune.

    Args:
        name (`str`): short name in configs and reports, such as `in_proj`.
        parameter (`str`): path inside the block, such as `mixer.in_proj.weight`.
        kind (`str`): `"linear"`, `"conv"` or `"a_log"`.
        site (`Site`): where its input is seen.
        segments (`dict[str, tuple[int, int]]`): named row ranges with a meaning of their own, such as `z`, `x`, `B`;
            addressed as `in_proj.B`.
    """

    name: str
    parameter: str
    kind: str
    site: Site
    segments: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False)


class Family(ABC):
    """Declares what the models of one or more `model_type`s look like. Holds no maths and knows no method.

    Class attributes:
        model_types: values of `config.model_type` that the family describes.
        scan: name of the selective scan in the modelling module, and
        recurrence: `"mamba"` (per channel and state decay) or `"mamba2"` (per head decay), which decides the sums that
            the scan can give.
        layers: name of the list of blocks in the base model.
        mixer_name: name of the state-space mixer in a block.
        output: the projection that leaves the mixer, a path inside the block.
        final_norm: name of the norm in the base model between the last block and the output head.
        default_axis: structural axis that is cut when a config names none.
    """

    model_types: ClassVar[tuple[str, ...]]
    scan: ClassVar[str]
    recurrence: ClassVar[str]
    layers: ClassVar[str] = "layers"
    mixer_name: ClassVar[str] = "mixer"
    output: ClassVar[str] = "mixer.out_proj"
    final_norm: ClassVar[str] = "norm_f"
    default_axis: ClassVar[str] = "state"

    def blocks(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The blocks in the order in which activations pass them, as (qualified name, module)."""
        base = model.base_model
        prefix = self.layers if base is model else f"{model.base_model_prefix}.{self.layers}"
        return [(f"{prefix}.{i}", block) for i, block in enumerate(getattr(base, self.layers))]

    def mixer(self, block: nn.Module) -> nn.Module | None:
        """The state-space mixer of a block, or `None` where the block has none."""
        return getattr(block, self.mixer_name, None)

    @abstractmethod
    def weights(self, block: nn.Module) -> list[PrunableWeight]:
        """The prunable weights of a block, in the order of the computation."""

    def axes(self, block: nn.Module) -> dict[str, Axis]:
        """The structural axes inside a block, by name. Whole blocks (`axis="block"`) need no declaration."""
        return {}

    def sizes(self, block: nn.Module) -> dict[str, int]:
        """The sizes of a block that its axes can change, by the name of the config field."""
        return {}

    def sizes_after(self, sizes: dict[str, int], axis: Axis, kept: int) -> dict[str, int]:
        """`sizes` of a block that keeps `kept` units of `axis`."""
        raise NotImplementedError(f"{type(self).__name__} declares no axes")

    def set_sizes(self, block: nn.Module, sizes: dict[str, int]) -> None:
        """Bring the attributes of a block's modules in step with tensors that were cut to `sizes`."""
        raise NotImplementedError(f"{type(self).__name__} declares no axes")

    def stock_fields(self, config: Any, sizes: dict[str, int]) -> dict[str, Any] | None:
        """Config fields with which the stock class builds blocks of these sizes, all alike; `None` where it cannot."""
        return None

    def state_elements(self, block: nn.Module) -> tuple[int, int]:
        """Numbers that one sequence carries from token to token in a block: (recurrent state, convolution state)."""
        mixer = self.mixer(block)
        if mixer is None:
            return 0, 0
        return mixer.intermediate_size * mixer.ssm_state_size, mixer.conv1d.weight.numel()

    def kept_reason(self, parameter: str) -> str:
        """Why a parameter that no weight declares is kept, from its qualified name."""
        leaf = parameter.rsplit(".", 1)[-1]
        if leaf == "D":
            return "skip connection D, one number per channel or head"
        if leaf.endswith("bias"):
            return "bias"
        if "norm" in parameter:
            return "norm"
        if "embed" in parameter:
            return "embedding"
        if "lm_head" in parameter:
            return "output head"
        return "not declared prunable by the family"
