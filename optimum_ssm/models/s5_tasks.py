# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The published settings of S5 on the Long Range Arena and Speech Commands, as LAST trains them (arXiv 2411.02824)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConfigurationError
from .s5 import S5Layer


# What each kind of parameter groups takes out of the regular group: (no decay at ssm_lr, with decay at ssm_lr).
GROUPS = {
    "standard": (("B", "Lambda_re", "Lambda_im", "log_step"), ()),
    "BfastandCdecay": (("Lambda_re", "Lambda_im", "log_step"), ()),
    "BandCdecay": (("Lambda_re", "Lambda_im", "log_step"), ("B",)),
    "noBCdecay": (("B", "C", "C1", "C2", "D", "Lambda_re", "Lambda_im", "log_step"), ()),
}


@dataclass(frozen=True)
class S5Task:
    """One column of the table.

    Args:
        config (`dict`): fields of `S5Config`.
        batch_size, epochs, warmup (`int`): the last in epochs, linear; then cosine to 0.
        ssm_lr, lr_factor, weight_decay (`float`): see `parameter_groups`.
        groups (`str`), dt_global (`bool`): see `parameter_groups`.
    """

    config: dict[str, Any] = field(hash=False)
    batch_size: int
    epochs: int
    ssm_lr: float
    lr_factor: float
    weight_decay: float
    warmup: int
    groups: str
    dt_global: bool = False


def _config(
    layers: int, width: int, size: int, blocks: int, c_init: str, activation: str, **more: Any
) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "ssm_size_base": size, "num_blocks": blocks}
    return sizes | {"c_init": c_init, "activation": activation} | more


_LECUN, _TRUNCATED, _COMPLEX = "lecun_normal", "trunc_standard_normal", "complex_normal"
_SLOW_NORM = {"norm_momentum": 0.1}
S5_TASKS = {
    "listops": S5Task(
        _config(8, 128, 16, 8, _LECUN, "half_glu2", vocab_size=20, num_labels=10),
        *(50, 40, 1e-3, 3, 0.04, 1, "BfastandCdecay"),
    ),
    "imdb": S5Task(
        _config(6, 256, 192, 12, _LECUN, "half_glu2", vocab_size=135, num_labels=2, dropout=0.1),
        *(50, 35, 1e-3, 4, 0.07, 0, "standard", True),
    ),
    "cifar": S5Task(
        _config(6, 512, 384, 3, _LECUN, "half_glu1", input_size=1, num_labels=10, dropout=0.1, clip_eigenvalues=True),
        *(50, 250, 1e-3, 4.5, 0.07, 1, "BfastandCdecay"),
    ),
    "pathfinder": S5Task(
        _config(6, 192, 256, 8, _TRUNCATED, "half_glu1", input_size=1, num_labels=2, dropout=0.05, **_SLOW_NORM),
        *(64, 200, 9e-4, 5, 0.03, 1, "standard"),
    ),
    "pathx": S5Task(
        _config(6, 128, 256, 16, _COMPLEX, "half_glu1", input_size=1, num_labels=2, dt_min=1e-4, **_SLOW_NORM),
        *(32, 75, 6e-4, 3, 0.06, 1, "BandCdecay"),
    ),
    "aan": S5Task(
        _config(6, 128, 256, 16, _TRUNCATED, "half_glu1", num_labels=2, pairs=True),
        *(32, 5, 1e-3, 2, 0.05, 1, "standard", True),
    ),
    "speech": S5Task(
        _config(6, 96, 128, 16, _LECUN, "half_glu1", input_size=1, num_labels=35, dropout=0.1),
        *(16, 40, 2e-3, 4, 0.04, 1, "noBCdecay"),
    ),
}


def parameter_groups(
    model: nn.Module,
    ssm_lr: float,
    lr_factor: float,
    weight_decay: float,
    groups: str = "standard",
    dt_global: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups for `torch.optim.AdamW`: S5's own parameters at `ssm_lr`, the rest at `lr_factor · ssm_lr` with decay.

    Args:
        model (`nn.Module`): holds S5 layers.
        ssm_lr, lr_factor, weight_decay (`float`): of the table.
        groups (`str`): which of S5's parameters train at `ssm_lr` without decay: `"standard"`: B, Λ and log_step;
            `"BfastandCdecay"`: Λ and log_step; `"BandCdecay"`: the same, and B at `ssm_lr` with decay; `"noBCdecay"`: B, C, D,
            Λ and log_step.
        dt_global (`bool`): log_step trains with the rest.

    Raises:
        ConfigurationError: `groups` is unknown.
    """
    if groups not in GROUPS:
        raise ConfigurationError(f"unknown groups {groups!r}; allowed: {', '.join(GROUPS)}")
    plain, decayed = GROUPS[groups]
    found: dict[str, list[nn.Parameter]] = {"plain": [], "decayed": [], "rest": []}
    own: dict[int, str] = {}
    for layer in model.modules():
        if isinstance(layer, S5Layer):
            own |= {id(parameter): name for name, parameter in layer.named_parameters()}
    for parameter in model.parameters():
        name = own.get(id(parameter))
        if name in plain and not (dt_global and name == "log_step"):
            found["plain"].append(parameter)
        else:
            found["decayed" if name in decayed else "rest"].append(parameter)
    return [
        {"params": found["plain"], "lr": ssm_lr, "weight_decay": 0.0},
        {"params": found["decayed"], "lr": ssm_lr, "weight_decay": weight_decay},
        {"params": found["rest"], "lr": lr_factor * ssm_lr, "weight_decay": weight_decay},
    ]
