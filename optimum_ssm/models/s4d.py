# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""S4D (Gu et al., arXiv 2206.11893): a diagonal system of its own for every channel, and a classifier of such layers."""

import math

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from ..errors import ConfigurationError
from ..ops.diagonal_scan import discretise, powers
from .diagonal_classifier import DiagonalClassifier, DiagonalConfig, DiagonalModel, dropout_along
from .hippo import draw_log_steps


@strict
class S4DConfig(DiagonalConfig):
    """Config of an S4D model.

    Args:
        ssm_size (`int`): N, real size of every channel's state; N / 2 complex states are stored.
        **kwargs: fields of `DiagonalConfig`.
    """

    model_type = "optimum_ssm_s4d"

    ssm_size: int = 64

    def whole_size(self) -> int:
        return self.ssm_size // 2


class S4DLayer(nn.Module):
    """S4D-Lin with ZOH, GELU, dropout, a pointwise map to 2H and GLU; (B, L, H) to (B, L, H).

    Kernel K[l] = 2 Re Σ_n C_n ((exp(ΔA_n) - 1) / A_n) exp(lΔA_n) of every channel, applied by FFT (arXiv 2206.11893, Sec. 3.3
    and 4.1 with B = 1). Parameters, with n stored states: `log_A_real`, `A_imag` (H, n) for A = -exp(log_A_real) + i A_imag,
    `C` (H, n, 2) real and imaginary parts, `log_dt` and `D` (H). Poles are stable by construction.

    Args:
        hidden_size (`int`): H.
        ssm_size (`int`): N.
        dt_min, dt_max (`float`): range of the initial time steps.
        dropout (`float`): its mask is shared along the sequence.
        state_size (`int`, *optional*): n where states are gone already. Default: N / 2.

    Raises:
        ConfigurationError: n is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        ssm_size: int = 64,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dropout: float = 0.0,
        state_size: int | None = None,
    ):
        super().__init__()
        self.hidden_size, self.dt_range, self.dropout = hidden_size, (dt_min, dt_max), dropout
        size = ssm_size // 2 if state_size is None else state_size
        if not 1 <= size <= ssm_size // 2:
            raise ConfigurationError(
                f"state_size={size} is not from 1 to {ssm_size // 2}, half of ssm_size={ssm_size}"
            )
        self.log_A_real = nn.Parameter(torch.empty(hidden_size, size))
        self.A_imag = nn.Parameter(torch.empty(hidden_size, size))
        self.C = nn.Parameter(torch.empty(hidden_size, size, 2))
        self.log_dt, self.D = nn.Parameter(torch.empty(hidden_size)), nn.Parameter(torch.empty(hidden_size))
        self.output_linear = nn.Linear(hidden_size, 2 * hidden_size)
        with torch.no_grad():
            for name, value in self.initial_values().items():
                getattr(self, name).copy_(value)

    @property
    def state_size(self) -> int:
        """n, the complex states that every channel stores."""
        return self.A_imag.shape[1]

    def initial_values(self) -> dict[str, Tensor]:
        """S4D-Lin (arXiv 2206.11893, Eq. 9), drawn from torch's global generator; empty while parameters have no memory."""
        if self.D.is_meta:
            return {}
        options = {"dtype": torch.float64, "device": "cpu"}
        shape = self.A_imag.shape
        return {
            "log_A_real": torch.full(shape, math.log(0.5), **options),
            "A_imag": (math.pi * torch.arange(shape[1], **options)).expand(shape),
            "C": math.sqrt(0.5) * torch.randn(*shape, 2, **options),
            "log_dt": draw_log_steps(tuple(self.log_dt.shape), *self.dt_range),
            "D": torch.randn(shape[0], **options),
        }

    def discrete(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """λ̄ and B̄, complex (H, n), in the real dtype's precision where one is given."""
        dtype = dtype or self._precision()
        poles = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype))
        return discretise(poles, self.log_dt.to(dtype).exp()[:, None])

    def output_map(self, dtype: torch.dtype | None = None) -> Tensor:
        """C, complex (H, n)."""
        return torch.view_as_complex(self.C.to(dtype or self._precision()).contiguous())

    def kernel(self, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """K, (H, length): what an impulse at time 0 gives at times 0 … length - 1."""
        decay, B = self.discrete(dtype)
        return 2 * torch.einsum("hn,hnl->hl", self.output_map(dtype) * B, powers(decay, length)).real

    def forward(self, u: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            inputs, length = u.to(self._precision()), u.shape[1]
            kernel = torch.fft.rfft(self.kernel(length), 2 * length)
            y = torch.fft.irfft(torch.fft.rfft(inputs, 2 * length, dim=1) * kernel.mT, 2 * length, dim=1)[:, :length]
            y = (y + inputs * self.D.to(inputs.dtype)).to(u.dtype)
        y = dropout_along(F.gelu(y), self.dropout, self.training)
        return F.glu(self.output_linear(y), dim=-1)

    def _precision(self) -> torch.dtype:
        return torch.float64 if self.D.dtype == torch.float64 else torch.float32

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, states={self.state_size}"


class S4DModel(DiagonalModel):
    """Encoder and S4D blocks."""

    config: S4DConfig

    def make_layer(self, config: S4DConfig, size: int) -> nn.Module:
        options = {name: getattr(config, name) for name in ("dt_min", "dt_max", "dropout")}
        return S4DLayer(config.hidden_size, config.ssm_size, state_size=size, **options)


class S4DForSequenceClassification(DiagonalClassifier):
    """An S4D model with a classification head."""

    config: S4DConfig

    def __init__(self, config: S4DConfig):
        super().__init__(config, S4DModel(config))


AutoConfig.register(S4DConfig.model_type, S4DConfig, exist_ok=True)
AutoModel.register(S4DConfig, S4DModel, exist_ok=True)
AutoModelForSequenceClassification.register(S4DConfig, S4DForSequenceClassification, exist_ok=True)
