# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""S5 (Smith et al., arXiv 2208.04933): one diagonal system with many inputs and outputs per layer, and a classifier of such.

Layers may store different numbers of states, as `optimum_ssm.surgery.diagonal.prune_diagonal` leaves them.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from ..errors import ConfigurationError
from ..ops.diagonal_scan import RULES, diagonal_convolution, diagonal_scan, discretise
from .diagonal_classifier import DiagonalClassifier, DiagonalConfig, DiagonalModel, dropout_along
from .hippo import C_INITS, block_hippo, draw_input_map, draw_log_steps, draw_output_map


ACTIVATIONS = ("full_glu", "half_glu1", "half_glu2", "gelu")
SCANS = {"doubling": diagonal_scan, "fft": diagonal_convolution}
_RIGHTMOST = -1e-4  # the real part to which clip_eigenvalues clips


@strict
class S5Config(DiagonalConfig):
    """Config of an S5 model. Defaults are those of the S5 code where tasks agree; `s5_tasks.S5_TASKS` has the tasks.

    Args:
        ssm_size_base (`int`): local_P, eigenvalues before conjugate pairs are halved.
        num_blocks (`int`): J, copies of HiPPO-N that the eigenvalues start from.
        c_init (`str`): `"lecun_normal"`, `"trunc_standard_normal"` or `"complex_normal"`.
        discretization (`str`): `"zoh"` or `"bilinear"`.
        conjugate_symmetry (`bool`): store one of each conjugate pair, y = 2 Re(C x) + D ∘ u; else y = Re(C x) + D ∘ u.
        bidirectional (`bool`): a second scan from the end, with output map C2.
        clip_eigenvalues (`bool`): real parts of at most -1e-4.
        step_rescale (`float`): factor on every time step.
        activation (`str`): `"full_glu"`, `"half_glu1"`, `"half_glu2"` or `"gelu"`.
        scan (`str`): `"doubling"` or `"fft"`: how states are computed, not what.
        **kwargs: fields of `DiagonalConfig`.
    """

    model_type = "optimum_ssm_s5"

    ssm_size_base: int = 256
    num_blocks: int = 8
    c_init: str = "lecun_normal"
    discretization: str = "zoh"
    conjugate_symmetry: bool = True
    bidirectional: bool = True
    clip_eigenvalues: bool = False
    step_rescale: float = 1.0
    activation: str = "half_glu1"
    scan: str = "doubling"

    def whole_size(self) -> int:
        return self.ssm_size_base // 2 if self.conjugate_symmetry else self.ssm_size_base

    def validate_words(self):
        """Check the fields that are one of some words; runs at construction and on saving."""
        words = {"c_init": C_INITS, "discretization": RULES, "activation": ACTIVATIONS, "scan": tuple(SCANS)}
        for name, allowed in words.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")


class S5Layer(nn.Module):
    """y = 2 Re(C x) + D ∘ u with x_t = λ̄ ∘ x_{t-1} + B̄ u_t (arXiv 2208.04933, Sec. 3), (B, L, H) to (B, L, H).

    Parameters, with P stored states: `Lambda_re`, `Lambda_im` (P), `log_step` (P, 1), `B` (P, H, 2) and `D` (H). Output maps
    are `C` (H, P, 2), or of both directions `C1` and `C2`; with `c_init="complex_normal"` one `C` (H, 2P, 2) holds both. The
    last dimension of complex maps is real and imaginary part. Computes in float32, or float64 where parameters are.

    Args:
        hidden_size (`int`): H.
        ssm_size_base, num_blocks, c_init, discretization, conjugate_symmetry, bidirectional, clip_eigenvalues, step_rescale,
            scan: as in `S5Config`.
        dt_min, dt_max (`float`): range of the initial time steps.
        state_size (`int`, *optional*): P where states are gone already. Default: all.

    Raises:
        ConfigurationError: eigenvalues do not split into blocks of conjugate pairs, or P is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        ssm_size_base: int = 256,
        num_blocks: int = 8,
        *,
        c_init: str = "lecun_normal",
        discretization: str = "zoh",
        conjugate_symmetry: bool = True,
        bidirectional: bool = True,
        clip_eigenvalues: bool = False,
        step_rescale: float = 1.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        scan: str = "doubling",
        state_size: int | None = None,
    ):
        super().__init__()
        self.hidden_size, self.ssm_size_base, self.num_blocks = hidden_size, ssm_size_base, num_blocks
        self.c_init, self.discretization, self.conjugate_symmetry = c_init, discretization, conjugate_symmetry
        self.bidirectional, self.clip_eigenvalues, self.step_rescale = bidirectional, clip_eigenvalues, step_rescale
        self.dt_range, self.scan = (dt_min, dt_max), scan
        whole = ssm_size_base // 2 if conjugate_symmetry else ssm_size_base
        size = whole if state_size is None else state_size
        if not 1 <= size <= whole:
            raise ConfigurationError(f"state_size={size} is not from 1 to {whole}, what ssm_size_base allows")
        self.Lambda_re, self.Lambda_im = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.log_step = nn.Parameter(torch.empty(size, 1))
        self.B = nn.Parameter(torch.empty(size, hidden_size, 2))
        for name in self.output_names():
            columns = 2 * size if self.joint_output() else size
            setattr(self, name, nn.Parameter(torch.empty(hidden_size, columns, 2)))
        self.D = nn.Parameter(torch.empty(hidden_size))
        with torch.no_grad():
            for name, value in self.initial_values().items():
                getattr(self, name).copy_(value)

    @property
    def state_size(self) -> int:
        """P, the states that are stored: conjugate pairs, or single modes without conjugate symmetry."""
        return len(self.Lambda_re)

    def output_names(self) -> tuple[str, ...]:
        """Names of the parameters that hold output maps."""
        return ("C1", "C2") if self.bidirectional and self.c_init != "complex_normal" else ("C",)

    def joint_output(self) -> bool:
        """Whether one `C` with 2P columns holds the maps of both directions."""
        return self.bidirectional and self.c_init == "complex_normal"

    def initial_values(self) -> dict[str, Tensor]:
        """The published initialisation, drawn from torch's global generator; empty while parameters have no memory."""
        if self.D.is_meta:
            return {}
        poles, vectors = block_hippo(self.ssm_size_base, self.num_blocks, self.conjugate_symmetry)
        kept = slice(self.state_size)
        values = {"Lambda_re": poles.real[kept], "Lambda_im": poles.imag[kept]}
        values["B"] = torch.view_as_real(draw_input_map(vectors, self.hidden_size).resolve_conj())[kept]
        for name in self.output_names():
            draws = [draw_output_map(vectors, self.hidden_size, self.c_init) for _ in range(1 + self.joint_output())]
            values[name] = torch.view_as_real(torch.cat([draw[:, kept] for draw in draws], 1))
        values["D"] = torch.randn(self.hidden_size, dtype=torch.float64, device="cpu")
        values["log_step"] = draw_log_steps(tuple(self.log_step.shape), *self.dt_range)
        return values

    def discrete(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """λ̄ (P) and B̄ (P, H), complex, at the time steps of inference; in the real dtype's precision where one is given."""
        dtype = dtype or _precision(self.D)
        real = self.Lambda_re.to(dtype)
        if self.clip_eigenvalues:
            real = real.clamp(max=_RIGHTMOST)
        poles = torch.complex(real, self.Lambda_im.to(dtype))
        step = self.step_rescale * self.log_step.to(dtype).exp().squeeze(-1)
        decay, factor = discretise(poles, step, self.discretization)
        return decay, factor[:, None] * _complex(self.B, dtype)

    def output_maps(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Complex output maps (H, P) of the forward scan and, if there is one, of the backward scan."""
        maps = [_complex(getattr(self, name), dtype or _precision(self.D)) for name in self.output_names()]
        return tuple(maps[0].chunk(2, 1)) if self.joint_output() else tuple(maps)

    def forward(self, u: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            inputs = u.to(_precision(self.D))
            decay, B = self.discrete()
            # complex times real as one real product
            driven = torch.view_as_complex((inputs @ torch.view_as_real(B.mT).flatten(1)).unflatten(-1, (-1, 2)))
            scan = SCANS[self.scan]
            y = inputs * self.D.to(inputs.dtype)
            for reverse, C in enumerate(self.output_maps()):
                states = torch.view_as_real(scan(decay, driven, reverse=bool(reverse))).flatten(-2)
                y = y + states @ torch.view_as_real(self._pair_factor() * C.conj().resolve_conj()).flatten(1).mT
        return y.to(u.dtype)

    def _pair_factor(self) -> int:
        return 2 if self.conjugate_symmetry else 1

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, states={self.state_size}, bidirectional={self.bidirectional}"


class S5Activation(nn.Module):
    """The nonlinearity after an S5 layer (tanh GELU), the gates of the S5 code."""

    def __init__(self, kind: str, hidden_size: int, dropout: float):
        super().__init__()
        self.kind, self.dropout = kind, dropout
        if kind == "full_glu":
            self.out1 = nn.Linear(hidden_size, hidden_size)
        if kind != "gelu":
            self.out2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        g = dropout_along(F.gelu(y, approximate="tanh"), self.dropout, self.training)
        if self.kind == "gelu":
            return g
        left = {"full_glu": lambda: self.out1(g), "half_glu1": lambda: g, "half_glu2": lambda: y}[self.kind]()
        return dropout_along(left * torch.sigmoid(self.out2(g)), self.dropout, self.training)


class S5Model(DiagonalModel):
    """Encoder and S5 blocks."""

    config: S5Config

    def make_layer(self, config: S5Config, size: int) -> nn.Module:
        names = ("c_init", "discretization", "conjugate_symmetry", "bidirectional", "clip_eigenvalues", "step_rescale")
        options = {name: getattr(config, name) for name in (*names, "dt_min", "dt_max", "scan")}
        layer = S5Layer(config.hidden_size, config.ssm_size_base, config.num_blocks, state_size=size, **options)
        return nn.Sequential(layer, S5Activation(config.activation, config.hidden_size, config.dropout))


class S5ForSequenceClassification(DiagonalClassifier):
    """An S5 model with a classification head."""

    config: S5Config

    def __init__(self, config: S5Config):
        super().__init__(config, S5Model(config))


def _precision(parameter: Tensor) -> torch.dtype:
    """The dtype to compute in: complex numbers of half precision have no arithmetic."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _complex(pair: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(pair.to(dtype).contiguous())


AutoConfig.register(S5Config.model_type, S5Config, exist_ok=True)
AutoModel.register(S5Config, S5Model, exist_ok=True)
AutoModelForSequenceClassification.register(S5Config, S5ForSequenceClassification, exist_ok=True)
