# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 whose blocks have sizes of their own: state size N, heads H, head dim P, groups G, groups of the gated norm.

The blocks are those of transformers, each built from its own sizes; forward, cache and generation are unchanged. This file
needs torch, transformers and huggingface_hub only, so that a copy of it beside the weights loads where optimum_ssm is absent.
"""

from fractions import Fraction
from types import MethodType
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM, Mamba2Model
from transformers.models.mamba2.modeling_mamba2 import (
    Mamba2Block,
    Mamba2PreTrainedModel,
    Mamba2RMSNorm,
    MambaRMSNormGated,
)


SIZES = ("state_size", "num_heads", "head_dim", "n_groups")
NORM = "norm_group_size"


@strict
class PrunedMamba2Config(Mamba2Config):
    """`Mamba2Config` with the sizes of every block. The inner size of a block is I = num_heads · head_dim, whatever `expand` is.

    Args:
        layer_sizes (`list[dict[str, int]]`, *optional*): one entry per block with the keys `state_size`, `num_heads`,
            `head_dim`, `n_groups` and, if wanted, `norm_group_size`: channels of one group of the gated RMSNorm, a divisor
            of I. Without it the norm is the one of the installed transformers: groups of I / n_groups channels from 5.23
            on, one group of I channels before. Default: every block has the sizes that the scalar fields of the same names
            give. The blocks are built from this list alone; the scalar fields then hold the largest value of each.
        **kwargs: fields of `Mamba2Config`.

    Raises:
        ValueError: `layer_sizes` has not one entry per block, an unknown or missing key, a size below 1, or a number of
            heads or a norm that its groups do not divide.
    """

    model_type = "optimum_ssm_mamba2"

    layer_sizes: list | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.layer_sizes is None:
            alike = {name: int(getattr(self, name)) for name in SIZES}
            self.layer_sizes = [dict(alike) for _ in range(self.num_hidden_layers)]
        self.validate_layer_sizes()
        self.layer_sizes = [dict(sizes) for sizes in self.layer_sizes]
        for name in SIZES:
            setattr(self, name, max(sizes[name] for sizes in self.layer_sizes))

    def validate_architecture(self):
        """Nothing: the stock demand, hidden_size · expand = num_heads · head_dim, does not hold for pruned blocks."""

    def validate_layer_sizes(self):
        """Check `layer_sizes` against `num_hidden_layers`; runs at construction, when a model is built, and on saving."""
        found = len(self.layer_sizes or ())
        if found != self.num_hidden_layers:
            raise ValueError(
                f"layer_sizes must have num_hidden_layers = {self.num_hidden_layers} entries, got {found}"
            )
        for index, sizes in enumerate(self.layer_sizes):
            _check_keys(sizes, f"layer_sizes[{index}]")
            inner = sizes["num_heads"] * sizes["head_dim"]
            if sizes["num_heads"] % sizes["n_groups"]:
                raise ValueError(
                    f"layer_sizes[{index}]: num_heads = {sizes['num_heads']} must be a multiple of "
                    f"n_groups = {sizes['n_groups']}"
                )
            if inner % sizes.get(NORM, 1):
                raise ValueError(
                    f"layer_sizes[{index}]: {NORM} = {sizes[NORM]} must divide num_heads * head_dim = {inner}"
                )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self._auto_class is None:  # read from a directory with a copy of this file, which is not written again
            output.pop("auto_map", None)
        return output


class PrunedMamba2Model(Mamba2Model):
    """`Mamba2Model` with one `Mamba2Block` per entry of `config.layer_sizes`, each of its sizes."""

    config: PrunedMamba2Config

    def __init__(self, config: PrunedMamba2Config):
        Mamba2PreTrainedModel.__init__(self, config)  # Mamba2Model's own would build blocks that are all alike
        config.validate_layer_sizes()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Mamba2Block(_BlockConfig(config, sizes), layer_idx=index) for index, sizes in enumerate(config.layer_sizes)
        )
        for block, sizes in zip(self.layers, config.layer_sizes):
            fit_block(block, sizes)
        self.gradient_checkpointing = False
        self.norm_f = Mamba2RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()
        for module in self.layers.modules():  # they are initialised now and need the sizes no more
            if "config" in vars(module):
                module.config = config

    def train(self, mode: bool = True) -> "PrunedMamba2Model":
        """As `nn.Module.train`; mixers with norm groups of their own stay off the fused training kernel."""
        super().train(mode)
        for block, sizes in zip(self.layers, self.config.layer_sizes):
            avoid_fused_norm(block, sizes)
        return self


class PrunedMamba2ForCausalLM(Mamba2ForCausalLM):
    """`Mamba2ForCausalLM` on a `PrunedMamba2Model`."""

    config: PrunedMamba2Config

    def __init__(self, config: PrunedMamba2Config):
        Mamba2PreTrainedModel.__init__(self, config)
        self.backbone = PrunedMamba2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class PrunedMambaRMSNormGated(MambaRMSNormGated):
    """The gated norm over groups of `group_size` channels, v = x · silu(gate), the same on every version of transformers."""

    group_size: int

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        dtype = hidden_states.dtype
        values = hidden_states.to(torch.float32)
        if gate is not None:
            values = values * nn.functional.silu(gate.to(torch.float32))
        groups = values.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * groups.flatten(-2).to(dtype)


class _BlockConfig:
    """The config as one block sees it: the model's, but with the sizes of this block."""

    def __init__(self, config: PrunedMamba2Config, sizes: dict[str, int]):
        self._config = config
        vars(self).update({name: sizes[name] for name in SIZES})
        # The mixer takes int(expand * hidden_size) as its inner size; a float would round down to one less now and then.
        self.expand = Fraction(sizes["num_heads"] * sizes["head_dim"], config.hidden_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def fit_block(block: nn.Module, sizes: dict[str, int]) -> None:
    """Make a stock block of these sizes one of this model: its norm gets the groups that `sizes` name, if they do."""
    norm = block.mixer.norm
    if NORM in sizes:
        norm.__class__ = PrunedMambaRMSNormGated
        norm.group_size = sizes[NORM]
        if "_old_forward" in vars(norm):  # an accelerate hook calls the forward that it found
            norm._old_forward = MethodType(PrunedMambaRMSNormGated.forward, norm)
    avoid_fused_norm(block, sizes)


def avoid_fused_norm(block: nn.Module, sizes: dict[str, int]) -> None:
    """Keep the mixer in eval mode if its norm has groups that the fused training kernel would not respect.

    That kernel norms over the groups of B and C, I / n_groups channels each. In a mixer the mode decides nothing else.
    """
    own = sizes["num_heads"] * sizes["head_dim"] // sizes["n_groups"]
    if sizes.get(NORM, own) != own:
        block.mixer.training = False


def _check_keys(sizes: Any, where: str) -> None:
    if not isinstance(sizes, dict):
        raise ValueError(f"{where} must be a dict with the keys {', '.join(SIZES)}, got {sizes!r}")
    for name in sizes:
        if name not in (*SIZES, NORM):
            raise ValueError(f"{where}: unknown key {name!r}; allowed: {', '.join((*SIZES, NORM))}")
    for name in SIZES:
        if name not in sizes:
            raise ValueError(f"{where} lacks {name!r}; needed: {', '.join(SIZES)}")
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be an int of at least 1, got {value!r}")


STOCK_CLASS = Mamba2ForCausalLM
CLASSES = {
    "AutoConfig": PrunedMamba2Config,
    "AutoModel": PrunedMamba2Model,
    "AutoModelForCausalLM": PrunedMamba2ForCausalLM,
}

if __package__ == "optimum_ssm.models":  # transformers itself registers the classes of a copy beside the weights
    AutoConfig.register(PrunedMamba2Config.model_type, PrunedMamba2Config, exist_ok=True)
    AutoModel.register(PrunedMamba2Config, PrunedMamba2Model, exist_ok=True)
    AutoModelForCausalLM.register(PrunedMamba2Config, PrunedMamba2ForCausalLM, exist_ok=True)
