# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What S5 and S4D classifiers share: encoder, residual blocks with a prenorm, mean over the true length, head.

Model of the S5 paper (arXiv 2208.04933, App. G) for the Long Range Arena: one-hot tokens through a linear encoder, no
embedding table and no final norm.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .hippo import truncated_normal


NORMS = ("batch", "layer")


@strict
class DiagonalConfig(PreTrainedConfig):
    """Fields that S5 and S4D share.

    Args:
        vocab_size (`int`): width of the one-hot tokens.
        input_size (`int`, *optional*): channels of real-valued inputs; tokens where it is `None`.
        hidden_size, num_hidden_layers (`int`): model width H and number of blocks.
        layer_sizes (`list[int]`, *optional*): states that every layer stores, written by `prune_diagonal`. Default: all.
        dt_min, dt_max (`float`): range of the initial time steps.
        dropout (`float`): its mask is shared along the sequence.
        norm (`str`): `"batch"` (over batch and length) or `"layer"`.
        norm_momentum, norm_eps (`float`): of the batch norm in torch's sense, and of both.
        prenorm (`bool`): norm before the layer, or after the residual sum.
        mask_padding (`bool`): padding is neither seen by the layers nor counted by the batch norm. With `False`, as in the
            published training, it passes through both and only the mean over time leaves it out: results then depend on
            the length that sequences are padded to.
        pairs (`bool`): inputs are pairs (B, 2, L) whose features a and b are joined as [a, b, a - b, a ∘ b].
        **kwargs: fields of `PreTrainedConfig`, such as `num_labels`.
    """

    vocab_size: int = 20
    input_size: int | None = None
    hidden_size: int = 128
    num_hidden_layers: int = 6
    layer_sizes: list | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dropout: float = 0.0
    norm: str = "batch"
    norm_momentum: float = 0.05
    norm_eps: float = 1e-5
    prenorm: bool = True
    mask_padding: bool = False
    pairs: bool = False
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.layer_sizes is None:
            self.layer_sizes = [self.whole_size()] * self.num_hidden_layers
        self.validate_layer_sizes()

    def whole_size(self) -> int:
        """States that an unpruned layer stores (S4D: per channel)."""
        raise NotImplementedError

    def validate_layer_sizes(self):
        """Check `layer_sizes`; runs at construction and on saving."""
        sizes, whole = self.layer_sizes, self.whole_size()
        if sizes is None:  # not filled in yet
            return
        if len(sizes) != self.num_hidden_layers or not all(type(n) is int and 1 <= n <= whole for n in sizes):
            raise ValueError(
                f"layer_sizes must be num_hidden_layers = {self.num_hidden_layers} ints from 1 to {whole}, got {sizes}"
            )

    def validate_norm(self):
        """Check `norm`; runs at construction and on saving."""
        if self.norm not in NORMS:
            raise ValueError(f"unknown norm {self.norm!r}; allowed: {', '.join(NORMS)}")


class ResidualBlock(nn.Module):
    """x + layer(norm(x)), or norm(x + layer(x)). `layer` maps (B, L, H) to itself."""

    def __init__(self, config: DiagonalConfig, layer: nn.Module):
        super().__init__()
        self.prenorm, self.mask_padding = config.prenorm, config.mask_padding
        self.layer = layer
        if config.norm == "batch":
            self.norm = nn.BatchNorm1d(config.hidden_size, eps=config.norm_eps, momentum=config.norm_momentum)
        else:
            self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, L, H) and bool (B, L), true where there is no padding."""
        inputs = self._normed(hidden, mask) if self.prenorm else hidden
        if self.mask_padding:
            inputs = inputs * mask[..., None]
        hidden = hidden + self.layer(inputs)
        return hidden if self.prenorm else self._normed(hidden, mask)

    def _normed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        if self.mask_padding and self.training and isinstance(self.norm, nn.BatchNorm1d):
            normed = torch.zeros_like(hidden)
            normed[mask] = self.norm(hidden[mask]).to(hidden.dtype)
            return normed
        return self.norm(hidden.flatten(0, 1)).view_as(hidden)


class DiagonalPreTrainedModel(PreTrainedModel):
    """Initial values as in the published code: truncated normal of variance 1 / fan-in, biases zero."""

    config: DiagonalConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "initial_values"):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, nn.Linear):
            init.copy_(module.weight, truncated_normal(tuple(module.weight.shape), module.in_features**-0.5))


class DiagonalModel(DiagonalPreTrainedModel):
    """Encoder and blocks. A subclass says with `make_layer` what a block holds."""

    def __init__(self, config: DiagonalConfig):
        super().__init__(config)
        self.encoder = nn.Linear(config.input_size or config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            ResidualBlock(config, self.make_layer(config, size)) for size in config.layer_sizes
        )
        self.post_init()

    def make_layer(self, config: DiagonalConfig, size: int) -> nn.Module:
        """The layer of one block, with `size` states."""
        raise NotImplementedError

    def note_sizes(self) -> None:
        """Write the sizes of the layers as they are into the config, from which a reload builds them."""
        self.config.layer_sizes = [
            next(m.state_size for m in block.modules() if hasattr(m, "initial_values")) for block in self.layers
        ]

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, input_values: Tensor | None = None
    ) -> BaseModelOutput:
        """Hidden states (B, L, H) after the last block.

        Args:
            input_ids (`Tensor`): (B, L), ids below `vocab_size`.
            attention_mask (`Tensor`, *optional*): (B, L), 0 where there is padding. Default: where `input_ids` is not
                `pad_token_id`; nowhere padding in `input_values`.
            input_values (`Tensor`): (B, L, input_size) instead of ids.
        """
        mask = true_tokens(self.config, input_ids, attention_mask, input_values)
        if input_values is None:
            hidden = F.embedding(input_ids, self.encoder.weight.t()) + self.encoder.bias  # one-hot times the weight
        else:
            hidden = self.encoder(input_values)
        for block in self.layers:
            hidden = block(hidden, mask)
        return BaseModelOutput(last_hidden_state=hidden)


class DiagonalClassifier(DiagonalPreTrainedModel):
    """Mean over the true length, then a linear map to the classes; for pairs a hidden layer before it."""

    def __init__(self, config: DiagonalConfig, backbone: DiagonalModel):
        super().__init__(config)
        self.backbone = backbone
        width = config.hidden_size
        if config.pairs:
            self.join = nn.Linear(4 * width, width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_values: Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """Logits (B, classes), with `labels` (B) also the cross entropy. Arguments as in the backbone; pairs are (B, 2, L)."""
        if self.config.pairs:
            inputs = input_ids, attention_mask, input_values
            input_ids, attention_mask, input_values = (None if x is None else x.flatten(0, 1) for x in inputs)
        mask = true_tokens(self.config, input_ids, attention_mask, input_values)
        hidden = self.backbone(input_ids, mask, input_values).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        features = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        if self.config.pairs:
            a, b = features.unflatten(0, (-1, 2)).unbind(1)
            features = F.gelu(self.join(torch.cat([a, b, a - b, a * b], -1)), approximate="tanh")
        logits = self.classifier(features)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def true_tokens(
    config: DiagonalConfig, input_ids: Tensor | None, attention_mask: Tensor | None, input_values: Tensor | None
) -> Tensor:
    """bool (B, L), true where there is no padding.

    Raises:
        ValueError: not exactly one of ids and values is given, or not the one that the config names.
    """
    if (input_ids is None) == (input_values is None) or (input_values is None) != (config.input_size is None):
        wanted = "input_ids" if config.input_size is None else f"input_values with {config.input_size} channels"
        raise ValueError(f"this model takes {wanted} and nothing else")
    if attention_mask is not None:
        return attention_mask.bool()
    if input_values is not None:
        return torch.ones(input_values.shape[:2], dtype=torch.bool, device=input_values.device)
    return input_ids != config.pad_token_id if config.pad_token_id is not None else torch.ones_like(input_ids).bool()


def dropout_along(hidden: Tensor, rate: float, training: bool) -> Tensor:
    """Dropout of whole channels of (B, L, H): the mask is shared along L."""
    if not training or rate == 0:
        return hidden
    return hidden * F.dropout(hidden.new_ones(len(hidden), 1, hidden.shape[-1]), rate)
