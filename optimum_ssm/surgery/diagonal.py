# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""State pruning of S5 and S4D layers after training, without data: LAST, AIRE and their baselines, masked or cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..models.diagonal_classifier import DiagonalModel
from ..models.s4d import S4DLayer
from ..models.s5 import S5Layer
from ..report import table
from ..sparsity.allocations.units import rank_energies
from . import diagonal_scores as scoring
from .cut import shrink


S4D_UNITS = ("rank", "entry")


@dataclass
class LayerRow:
    """One layer.

    Args:
        name (`str`): path of the layer in the model.
        kind (`str`): `"S5Layer"` or `"S4DLayer"`.
        states, kept (`int`): complex states before and after, of all channels in S4D.
        unstable (`int`): states that were kept because |λ̄| >= 1 - 1e-6.
        indices (`list`): kept states, ascending; for S4D one list per channel.
    """

    name: str
    kind: str
    states: int
    kept: int
    unstable: int
    indices: list = field(repr=False, default_factory=list)


@dataclass
class DiagonalReport:
    """What `prune_diagonal` did. `str()` is the table.

    Args:
        method, allocation (`str`): as called or by default.
        ratio (`float`): as asked for.
        masked (`bool`): states are mute but still there.
        rows (`list[LayerRow]`): one per layer.
        parameters_before, parameters (`int`): of the whole model, real numbers.
    """

    method: str
    allocation: str
    ratio: float
    masked: bool
    rows: list[LayerRow]
    parameters_before: int
    parameters: int

    @property
    def states(self) -> int:
        """Complex states before."""
        return sum(row.states for row in self.rows)

    @property
    def kept(self) -> int:
        """Complex states that are left."""
        return sum(row.kept for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of all states that are gone."""
        return 1 - self.kept / self.states

    def to_markdown(self) -> str:
        """A table with one row per layer and the totals."""
        body = [(r.name, r.kind, str(r.states), str(r.kept), str(r.unstable)) for r in self.rows]
        body.append(("all", "", str(self.states), str(self.kept), str(sum(r.unstable for r in self.rows))))
        lines = table(("layer", "kind", "states", "kept", "unstable"), body, right=(2, 3, 4))
        how = "muted" if self.masked else "cut out"
        lines += ["", f"{self.method}, allocation {self.allocation}: {self.sparsity:.2%} of states {how}."]
        lines += [f"Parameters {self.parameters_before:,} -> {self.parameters:,}."]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_markdown()


def prune_diagonal(
    model: nn.Module,
    ratio: float,
    method: str = "last",
    *,
    allocation: str | None = None,
    mask_only: bool = False,
    bidirectional: str = "mean",
    reference: bool = False,
    s4d_units: str = "rank",
    seed: int = 0,
) -> DiagonalReport:
    """Remove states of all S5 and S4D layers of a model, in place, without data and without training.

    The unit is a stored complex state: of S5 a conjugate pair, of S4D the r-th best state of all channels together, with the
    sum of its scores over channels, so that what is left is rectangular (our choice: the paper does not say). S4D and S5 may
    stand in one model; then a rank counts as one unit. A model of `optimum_ssm.models` gets its new sizes into its config
    and reloads with `from_pretrained`.

    Args:
        model (`nn.Module`): holds at least one `S5Layer` or `S4DLayer`.
        ratio (`float`): share of the units of all layers to remove, from 0 to 1; exactly round(ratio · n) go, but every
            layer keeps one. 1 keeps one per layer.
        method (`str`): `"last"` (squared H∞ norm, arXiv 2411.02824), `"aire"` (squared H2 norm, arXiv 2602.00534),
            `"magnitude"` (‖C_i‖² ‖B̄_i‖²) or `"random"`.
        allocation (`str`, *optional*): `"last"`, `"uniform"` or `"global"`, see `kept_counts`. Default: `"last"` for the
            methods `last` and `aire`, else `"uniform"`.
        mask_only (`bool`): set the output columns of the removed states to zero and cut nothing.
        bidirectional (`str`): `"mean"`, `"energy"` or `"reference"`, see `output_gain`.
        reference (`bool`): the arithmetic of LAST's released code: (‖C1‖ + ‖C2‖) / 4 in bidirectional layers, 1e-8 added to
            (1 - |λ̄|)², floor((1 - ratio) · n) states kept.
        s4d_units (`str`): `"rank"`, or with `mask_only` `"entry"`: every state of every channel is a unit of its own.
        seed (`int`): of `"random"`.

    Raises:
        ConfigurationError: there is no such layer, or an argument or a combination is not allowed.

    Warns:
        UserWarning: a state with |λ̄| >= 1 - 1e-6 is kept whatever its score; or more had to stay than the ratio says.
    """
    if s4d_units not in S4D_UNITS:
        raise ConfigurationError(f"unknown s4d_units {s4d_units!r}; allowed: {', '.join(S4D_UNITS)}")
    if bidirectional not in scoring.BIDIRECTIONAL:  # also where no layer has two directions
        raise ConfigurationError(
            f"unknown bidirectional {bidirectional!r}; allowed: {', '.join(scoring.BIDIRECTIONAL)}"
        )
    if s4d_units == "entry" and not mask_only:
        raise ConfigurationError("s4d_units='entry' leaves channels of different sizes: it needs mask_only=True")
    allocation = allocation or ("last" if method in ("last", "aire") else "uniform")
    layers = {name: part for name, part in model.named_modules() if isinstance(part, (S5Layer, S4DLayer))}
    if not layers:
        raise ConfigurationError(f"{type(model).__name__} holds no S5Layer and no S4DLayer: there is nothing to prune")
    generator = torch.Generator().manual_seed(seed)
    form = "reference" if reference else bidirectional
    scores = {}
    for name, layer in layers.items():
        decay, gain = modes(layer, form)
        if not (decay.isfinite().all() and gain.isfinite().all()):
            raise ConfigurationError(f"parameters of {name or type(layer).__name__} are not finite")
        scores[name] = scoring.energies(method, decay, gain, reference, generator).cpu()
    by_rank = [_is_ranked(layer, s4d_units) for layer in layers.values()]
    units = [rank_energies(s, len(s)) if ranked else s.flatten() for s, ranked in zip(scores.values(), by_rank)]
    counts = scoring.kept_counts(units, ratio, allocation, reference)
    before = sum(parameter.numel() for parameter in model.parameters())
    rows = []
    for (name, layer), score, ranked, count in zip(layers.items(), scores.values(), by_rank, counts):
        kept = scoring.kept_units(score if ranked else score.flatten(), count)
        rows.append(_row(name, layer, score, kept))
        if mask_only:
            _mute(layer, score.shape, kept)
        else:
            _cut(layer, kept)
    for part in model.modules():
        if isinstance(part, DiagonalModel):
            part.note_sizes()
    _warn(rows, sum(counts), ratio, units)
    after = sum(parameter.numel() for parameter in model.parameters())
    return DiagonalReport(method, allocation, ratio, mask_only, rows, before, after)


@torch.no_grad()
def modes(layer: nn.Module, bidirectional: str = "mean") -> tuple[Tensor, Tensor]:
    """λ̄ (complex128) and ‖C_i‖² ‖B̄_i‖² (float64) of the states of a layer at the time steps of inference.

    Args:
        layer (`nn.Module`): an `S5Layer`, (P), or an `S4DLayer`, (H, n).
        bidirectional (`str`): see `output_gain`.
    """
    decay, B = layer.discrete(torch.float64)
    if isinstance(layer, S4DLayer):
        return decay, layer.output_map(torch.float64).abs().square() * B.abs().square()
    norms = [torch.linalg.vector_norm(C, dim=0) for C in layer.output_maps(torch.float64)]
    return decay, scoring.output_gain(norms, bidirectional) * B.abs().square().sum(1)


def _is_ranked(layer: nn.Module, s4d_units: str) -> bool:
    return isinstance(layer, S4DLayer) and s4d_units == "rank"


def _row(name: str, layer: nn.Module, score: Tensor, kept: Tensor) -> LayerRow:
    channels = score.dim() == 2 and kept.dim() == 1  # entries of S4D: flat indices to one list per channel
    indices = kept.tolist()
    if channels:
        width = score.shape[1]
        indices = [[i % width for i in indices if i // width == row] for row in range(len(score))]
    return LayerRow(name, type(layer).__name__, score.numel(), kept.numel(), int(score.isinf().sum()), indices)


def _warn(rows: list[LayerRow], kept: int, ratio: float, units: list[Tensor]) -> None:
    unstable = [f"{row.name or row.kind} ({row.unstable})" for row in rows if row.unstable]
    if unstable:
        warnings.warn(
            f"states with |λ̄| >= 1 - 1e-6 do not decay and are kept whatever their score: {', '.join(unstable)}",
            stacklevel=3,
        )
    total = sum(len(unit) for unit in units)
    if kept > total - ratio * total + 1:
        warnings.warn(
            f"{kept} of {total} units are kept where ratio={ratio:g} asks for {total * (1 - ratio):.0f}: one per layer and "
            "all that do not decay have to stay",
            stacklevel=3,
        )


@torch.no_grad()
def _mute(layer: nn.Module, shape: torch.Size, kept: Tensor) -> None:
    """Output columns of the removed states to zero: their states still run but reach nothing."""
    mask = torch.zeros(shape)
    if kept.dim() == 2:
        mask.scatter_(1, kept, 1)
    else:
        mask.view(-1)[kept] = 1
    for parameter in _outputs(layer):
        wide = mask.repeat(2) if isinstance(layer, S5Layer) and layer.joint_output() else mask
        parameter.mul_(wide.to(parameter)[..., None])


def _cut(layer: nn.Module, kept: Tensor) -> None:
    """The kept states alone, in their order: sliced equals muted."""
    if isinstance(layer, S4DLayer):
        for name in ("log_A_real", "A_imag", "C"):
            _replace(layer, name, lambda old: _gather(old, kept))
        return
    width = layer.state_size
    for name in ("Lambda_re", "Lambda_im", "log_step", "B"):
        shrink(layer, name, {0: kept})
    columns = torch.cat([kept, kept + width]) if layer.joint_output() else kept
    for name in layer.output_names():
        shrink(layer, name, {1: columns})


def _gather(old: Tensor, kept: Tensor) -> Tensor:
    index = kept.to(old.device)
    return old.gather(1, index if old.dim() == 2 else index[..., None].expand(-1, -1, old.shape[2]))


def _replace(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(change(old.detach()), requires_grad=old.requires_grad))


def _outputs(layer: nn.Module) -> list[nn.Parameter]:
    return [layer.C] if isinstance(layer, S4DLayer) else [getattr(layer, name) for name in layer.output_names()]
