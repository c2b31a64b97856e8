# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Mamba whose blocks have sizes of their own: state size N, inner size I, time step rank R.

The blocks are those of transformers, each built from its own sizes; forward, cache and generation are unchanged. This file
needs torch, transformers and huggingface_hub only, so that a copy of it beside the weights loads where optimum_ssm is absent.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaPreTrainedModel, MambaRMSNorm


SIZES = ("state_size", "intermediate_size", "time_step_rank")


@strict
class PrunedMambaConfig(MambaConfig):
    """`MambaConfig` with the sizes of every block.

    Args:
        layer_sizes (`list[dict[str, int]]`, *optional*): one entry per block with exactly the keys `state_size`,
            `intermediate_size` and `time_step_rank`. Default: every block has the sizes that the scalar fields of the same
            names give. The blocks are built from this list alone; the scalar fields then hold the largest value of each.
        **kwargs: fields of `MambaConfig`.

    Raises:
        ValueError: `layer_sizes` has not one entry per block, an unknown or missing key, or a size below 1.
    """

    model_type = "optimum_ssm_mamba"

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

    def validate_layer_sizes(self):
        """Check `layer_sizes` against `num_hidden_layers`; runs at construction, when a model is built, and on saving."""
        found = len(self.layer_sizes or ())
        if found != self.num_hidden_layers:
            raise ValueError(
                f"layer_sizes must have num_hidden_layers = {self.num_hidden_layers} entries, got {found}"
            )
        for index, sizes in enumerate(self.layer_sizes):
            _check_keys(sizes, f"layer_sizes[{index}]")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self._auto_class is None:  # read from a directory with a copy of this file, which is not written again
            output.pop("auto_map", None)
        return output


class PrunedMambaModel(MambaModel):
    """`MambaModel` with one `MambaBlock` per entry of `config.layer_sizes`, each of its sizes."""

    config: PrunedMambaConfig

    def __init__(self, config: PrunedMambaConfig):
        MambaPreTrainedModel.__init__(self, config)  # MambaModel's own would build blocks that are all alike
        config.validate_layer_sizes()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MambaBlock(_BlockConfig(config, sizes), layer_idx=index) for index, sizes in enumerate(config.layer_sizes)
        )
        self.gradient_checkpointing = False
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()
        for module in self.layers.modules():  # they are initialised now and need the sizes no more
            if "config" in vars(module):
                module.config = config


class PrunedMambaForCausalLM(MambaForCausalLM):
    """`MambaForCausalLM` on a `PrunedMambaModel`."""

    config: PrunedMambaConfig

    def __init__(self, config: PrunedMambaConfig):
        MambaPreTrainedModel.__init__(self, config)
        self.backbone = PrunedMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class _BlockConfig:
    """The config as one block sees it: the model's, but with the sizes of this block."""

    def __init__(self, config: PrunedMambaConfig, sizes: dict[str, int]):
        self._config = config
        vars(self).update(sizes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def fit_block(block: nn.Module, sizes: dict[str, int]) -> None:
    """What a stock block of these sizes needs besides to be one of this model: nothing."""


def _check_keys(sizes: Any, where: str) -> None:
    if not isinstance(sizes, dict):
        raise ValueError(f"{where} must be a dict with the keys {', '.join(SIZES)}, got {sizes!r}")
    for name in sizes:
        if name not in SIZES:
            raise ValueError(f"{where}: unknown key {name!r}; allowed: {', '.join(SIZES)}")
    for name in SIZES:
        if name not in sizes:
            raise ValueError(f"{where} lacks {name!r}; needed: {', '.join(SIZES)}")
        if isinstance(sizes[name], bool) or not isinstance(sizes[name], int) or sizes[name] < 1:
            raise ValueError(f"{where}: {name} must be an int of at least 1, got {sizes[name]!r}")


STOCK_CLASS = MambaForCausalLM
CLASSES = {
    "AutoConfig": PrunedMambaConfig,
    "AutoModel": PrunedMambaModel,
    "AutoModelForCausalLM": PrunedMambaForCausalLM,
}

if __package__ == "optimum_ssm.models":  # transformers itself registers the classes of a copy beside the weights
    AutoConfig.register(PrunedMambaConfig.model_type, PrunedMambaConfig, exist_ok=True)
    AutoModel.register(PrunedMambaConfig, PrunedMambaModel, exist_ok=True)
    AutoModelForCausalLM.register(PrunedMambaConfig, PrunedMambaForCausalLM, exist_ok=True)
