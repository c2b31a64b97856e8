# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The residual stream between two blocks: captured before the first one, carried through block after block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import CalibrationError


T = TypeVar("T")


class _Captured(Exception):
    """Ends the forward of the whole model once the inputs of its first block are known."""


class Activations:
    """Inputs of the current block for every calibration batch, with the arguments that blocks take besides.

    Args:
        model (`nn.Module`): a model with a `base_model` that takes `input_ids`.
        first (`nn.Module`): its first block.
        ids (`Tensor`): int64, (samples, seq_len).
        batch_size (`int`): samples per batch.
    """

    def __init__(self, model: nn.Module, first: nn.Module, ids: Tensor, batch_size: int):
        self.tokens = ids.numel()
        self.hidden: list[Tensor] = []
        self._calls: list[tuple[tuple, dict]] = []

        def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
            self._calls.append((args[1:], kwargs))
            raise _Captured

        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            device = model.get_input_embeddings().weight.device
            for batch in ids.split(batch_size):
                try:
                    model.base_model(input_ids=batch.to(device), use_cache=False)
                except _Captured:
                    pass
        finally:
            handle.remove()

    def through(self, block: nn.Module, name: str, hidden: list[Tensor] | None = None) -> list[Tensor]:
        """Outputs of `block` for every batch, (batch, seq_len, hidden) each; the inputs stay as they are.

        Args:
            block (`nn.Module`): the block.
            name (`str`): its name for messages.
            hidden (`list[Tensor]`, *optional*): other inputs than the stream's own, batch for batch.

        Raises:
            CalibrationError: an output is not finite; the block is named.
        """
        outputs = []
        for x, (args, kwargs) in zip(self.hidden if hidden is None else hidden, self._calls):
            output = _tensor(block(x, *args, **kwargs))
            if not output.isfinite().all():
                raise CalibrationError(f"{name}: activations are not finite; load the model in a wider dtype")
            outputs.append(output)
        return outputs

    def forward(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """The block as a function of its input alone, for any number of samples, with the arguments of the first batch."""
        args, kwargs = self._calls[0]
        return lambda x: _tensor(block(x, *args, **kwargs))

    def advance(self, outputs: list[Tensor]) -> None:
        """Take `outputs` as the inputs of the next block."""
        self.hidden = outputs

    def relative_error(self, dense: list[Tensor], pruned: list[Tensor]) -> float:
        """‖pruned - dense‖² / ‖dense - input‖² over all tokens: the block's own contribution that was lost."""
        lost = sum(float((p.float() - d.float()).square().sum()) for p, d in zip(pruned, dense))
        whole = sum(float((d.float() - h.float()).square().sum()) for d, h in zip(dense, self.hidden))
        return lost / whole if whole else 0.0


def _tensor(output: Tensor | tuple) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def inference_state(model: nn.Module) -> Iterator[None]:
    """eval mode, no gradients, exact float32 products; everything is as it was at exit, also after an exception."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), _exact_products():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _exact_products() -> Iterator[None]:
    """No TF32 and no bfloat16 in products of float32 tensors.

    torch has newer and older switches for this, and reading an older one raises where the two contradict each other. So
    both are set, except for an older one that the user has made unreadable already.
    """
    backends = torch.backends
    switches = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
    precisions = [switch.fp32_precision for switch in switches]
    matmul = _readable(torch.get_float32_matmul_precision)
    cudnn = _readable(lambda: backends.cudnn.allow_tf32)
    try:
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        if cudnn is not None:
            backends.cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            backends.cudnn.allow_tf32 = cudnn
        for switch, precision in zip(switches, precisions):
            switch.fp32_precision = precision


def _readable(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except RuntimeError:
        return None
