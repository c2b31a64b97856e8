# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The residual stream between two blocks: captured before the first one, carried through block after block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..errors import CalibrationError
from .offload import tie_again, work_device
from .placement import Batches, Placement


T = TypeVar("T")


class _Captured(Exception):
    """Ends the forward of the whole model once the inputs of its first block are known."""


class Activations:
    """Inputs of the current block for every calibration batch, with the arguments that blocks take besides.

    Besides these inputs there is one more copy of the stream at most, the outputs of the dense block: what the pruned
    block gives is written over its inputs, batch by batch.

    Args:
        model (`nn.Module`): a model with a `base_model` that takes `input_ids`.
        first (`nn.Module`): its first block.
        ids (`Tensor`): int64, (samples, seq_len).
        batch_size (`int`): samples per batch.
        placement (`Placement`, *optional*): where the stream is kept; default: where it is computed.
    """

    def __init__(
        self, model: nn.Module, first: nn.Module, ids: Tensor, batch_size: int, placement: Placement | None = None
    ):
        self.tokens = ids.numel()
        self.placement = placement or Placement()
        batches = ids.split(batch_size)
        self.hidden = self.placement.batches(len(batches))
        self._calls: list[tuple[tuple, dict]] = []

        def capture(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.hidden[len(self._calls)] = args[0] if args else kwargs.pop("hidden_states")
            self._calls.append((args[1:], kwargs))
            raise _Captured

        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            device = work_device(model.get_input_embeddings())
            for batch in batches:
                try:
                    model.base_model(input_ids=batch.to(device), use_cache=False)
                except _Captured:
                    pass
        finally:
            handle.remove()
            tie_again(model)  # the embedding's hook has brought values

    def outputs(self, block: nn.Module, name: str, inputs: Batches | None = None) -> Iterator[Tensor]:
        """What `block` gives for every batch, one after the other, (batch, seq_len, hidden) each.

        Args:
            block (`nn.Module`): the block.
            name (`str`): its name for messages.
            inputs (`Batches`, *optional*): other inputs than the stream's own, batch for batch.

        Raises:
            CalibrationError: an output is not finite; the block is named.
        """
        device, finite = work_device(block), []
        for index, x in enumerate((self.hidden if inputs is None else inputs).read(device)):
            yield self._output(block, x, index, finite)
        _check(finite, name)

    def _output(self, block: nn.Module, x: Tensor, index: int, finite: list[Tensor]) -> Tensor:
        """The output for one batch. Whether it is finite goes to the list: asking at once would wait for the device."""
        args, kwargs = send_to_device(self._calls[index], x.device)
        output = _tensor(block(x, *args, **kwargs))
        finite.append(output.sum(dtype=torch.float64).isfinite())  # one pass; finite numbers do not overflow it
        return output

    def through(
        self, block: nn.Module, name: str, inputs: Batches | None = None, out: Batches | None = None
    ) -> Batches:
        """The outputs of `block` for every batch, kept. Arguments as in `outputs`.

        Args:
            out (`Batches`, *optional*): where to, over what it holds; default: new room. It may be the inputs.
        """
        out = self.placement.batches(len(self._calls)) if out is None else out
        for index, output in enumerate(self.outputs(block, name, inputs)):
            out[index] = output
        return out

    def replay(self, block: nn.Module, name: str, dense: Batches, keep: bool) -> tuple[float, float]:
        """Run the changed block over its inputs and compare it with what it was.

        Args:
            block (`nn.Module`), name (`str`): as in `outputs`.
            dense (`Batches`): its outputs before it was changed.
            keep (`bool`): write the new outputs over the inputs, which makes them those of the next block.

        Returns:
            `tuple[float, float]`: ‖pruned - dense‖² and ‖dense - input‖² over all tokens. Their ratio is the share of the
            block's own contribution that was lost.
        """
        device, finite = work_device(block), []
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for index, (x, d) in enumerate(zip(self.hidden.read(device), dense.read(device))):
            pruned = self._output(block, x, index, finite)
            sums += torch.stack([_squared_distance(pruned, d), _squared_distance(d, x)])
            if keep:
                self.hidden[index] = pruned
        _check(finite, name)
        lost, whole = sums.tolist()
        return lost, whole

    def forward(self, block: nn.Module) -> Callable[[Tensor], Tensor]:
        """The block as a function of its input alone, for any number of samples, with the arguments of the first batch."""
        device = work_device(block)
        args, kwargs = send_to_device(self._calls[0], device)
        return lambda x: _tensor(block(x.to(device), *args, **kwargs))

    def advance(self, outputs: Batches) -> Batches:
        """Take `outputs` as the inputs of the next block; the room of the present ones is free for other use."""
        before, self.hidden = self.hidden, outputs
        return before


def _check(finite: list[Tensor], name: str) -> None:
    if finite and not torch.stack(finite).all():
        raise CalibrationError(f"{name}: activations are not finite; load the model in a wider dtype")


def _squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Token by token in float32, whose sums a CPU vectorises, and in float64 from there on."""
    return torch.linalg.vector_norm(a.float() - b.float(), dim=-1).double().square_().sum()


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
        tie_again(model)


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
