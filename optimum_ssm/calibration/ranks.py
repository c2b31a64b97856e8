# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Several processes that prune one model together, as `accelerate launch` or `torchrun` start them.

Every process holds the whole model and reads its own part of the calibration blocks. What they know is added up before
anything is decided on it, work is shared out, and results are broadcast, so that all of them hold the same weights and
masks bit for bit. With one process nothing here touches `torch.distributed`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from .. import errors
from ..errors import CalibrationError, ConfigurationError


T = TypeVar("T")
# How the number of processes is told by torchrun and accelerate, and by MPI.
COUNT_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
PATIENCE = timedelta(
    hours=6
)  # others wait while one solves or uploads; a process that died is the launcher's to notice
LARGEST_COPY = 2**25  # entries of a sum that is not contiguous, reduced at once


@dataclass(frozen=True)
class Ranks:
    """The processes that work together, as one of them sees it.

    Args:
        index (`int`): which one this is; 0 writes, warns and shows progress.
        count (`int`): how many there are.
        wire (`torch.device`, *optional*): where a tensor must be to be sent; `None`: where it is.
    """

    index: int = 0
    count: int = 1
    wire: torch.device | None = None

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.count == 1

    @property
    def main(self) -> bool:
        """Whether this process writes, warns and shows progress."""
        return self.index == 0

    def share(self, blocks: Tensor, batch_size: int = 1) -> Tensor:
        """This process's part of the calibration blocks (samples, seq_len): every `count`-th batch of them.

        With batches that are the same on one process and on several, so is what a kernel makes of each. Where there are
        fewer batches than processes, every `count`-th block.

        Raises:
            ConfigurationError: there are fewer blocks than processes.
        """
        if len(blocks) < self.count:
            raise ConfigurationError(
                f"{len(blocks)} calibration blocks cannot be shared by {self.count} processes; give num_samples of at "
                f"least {self.count}, or launch fewer processes"
            )
        batches = blocks.split(batch_size)
        if len(batches) < self.count:
            batches = blocks.split(1)
        return torch.cat(batches[self.index :: self.count])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all processes, in place."""
        if self.alone:
            return tensor
        whole = tensor.is_contiguous()
        for part in (tensor,) if whole else tensor.split(max(1, LARGEST_COPY // max(1, tensor[0].numel()))):
            sent = part.detach().contiguous().to(self.wire or part.device)
            distributed.all_reduce(sent)
            if sent.data_ptr() != part.data_ptr():
                part.copy_(sent)
        return tensor

    def sums(self, *values: float) -> tuple[float, ...]:
        """Numbers added up over all processes, in float64."""
        if self.alone:
            return values
        return tuple(self.sum_(torch.tensor(values, dtype=torch.float64, device=self.wire)).tolist())

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite a tensor by that of the process `source`, bit for bit, in place."""
        if self.alone or not tensor.numel():
            return tensor
        sent = tensor.detach().contiguous().to(self.wire or tensor.device)
        distributed.broadcast(sent.reshape(-1).view(torch.uint8), source)  # bytes: no backend knows all dtypes
        if sent.data_ptr() != tensor.data_ptr() and source != self.index:
            tensor.copy_(sent)
        return tensor

    def gather(self, value: T) -> list[T]:
        """A small object of every process, in the order of the processes."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def agree(self, failure: str | None) -> None:
        """Let a failure of one process be that of all, so that none waits for it.

        Raises:
            CalibrationError: one of the processes gave a message.
        """
        for message in self.gather(failure):
            if message is not None:
                raise CalibrationError(message)

    def align_(self, block: nn.Module) -> None:
        """Give every process the main one's parameters of a block that all of them have changed alike.

        Raises:
            CalibrationError: the processes cut the block to different shapes.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        self.agree(None if shapes == self.gather(shapes)[0] else f"process {self.index} cut a block differently")
        with torch.no_grad():
            for parameter in block.parameters():
                self.broadcast_(parameter.data)

    def same(self, what: str, value: Any) -> None:
        """Refuse to go on where the processes were given different things.

        Raises:
            ConfigurationError: naming them.
        """
        if len(set(map(str, self.gather(value)))) > 1:
            raise ConfigurationError(f"the {self.count} processes were given {what} that differ; all need the same")

    def on_main(self, function: Callable[[], T]) -> T:
        """Call a function in the main process while the others wait, and give all of them its result, or its error."""
        if self.alone:
            return function()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.main:
            try:
                answer[0] = function()
            except Exception as failure:
                error, answer[1] = failure, (type(failure).__name__, str(failure))
        distributed.broadcast_object_list(answer, src=0)
        if error is not None:
            raise error
        if answer[1] is not None:
            name, message = answer[1]
            raise getattr(errors, name, errors.OptimumSSMError)(message)
        return answer[0]

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """While the context is open, this library warns in the main process only."""
        logger = logging.getLogger(__name__.partition(".")[0])
        before = logger.level
        if not self.main:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


ALONE = Ranks()


def agreed(ranks: Ranks, action: Callable[[], T]) -> T:
    """What `action`, which talks to no other process, gives in this one.

    Raises:
        CalibrationError: in all processes, whichever of them raised it in `action`.
    """
    if ranks.alone:
        return action()
    found, failure = None, None
    try:
        found = action()
    except CalibrationError as error:
        failure = error
    ranks.agree(None if failure is None else str(failure))
    return found


def current_ranks() -> Ranks:
    """The processes that were launched together with this one. The first call joins them.

    Raises:
        ConfigurationError: several were launched, but accelerate was told before that there is one.
    """
    launched = max(int(os.environ.get(name) or 1) for name in COUNT_VARIABLES)
    joined = distributed.is_available() and distributed.is_initialized()
    if launched == 1 and not joined:
        return ALONE
    if not joined:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available(), timeout=PATIENCE)
        if not distributed.is_initialized():
            raise ConfigurationError(
                f"{launched} processes were launched, but accelerate's PartialState was made for one; make it before, with "
                "PartialState(cpu=True) on a machine without GPUs"
            )
    if distributed.get_world_size() == 1:
        return ALONE
    backend = str(distributed.get_backend())
    wire = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    return Ranks(distributed.get_rank(), distributed.get_world_size(), wire)


def check_model(model: nn.Module, ranks: Ranks, kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse a model of which this process holds a part only, or which lies on another process's GPU.

    Raises:
        ConfigurationError: naming the parameter and the way out.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if kind in ("DTensor", "FlatParameter") or hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
            raise ConfigurationError(
                f"{name} is sharded over processes (FSDP, ZeRO or tensor parallelism): masks would have to be, too. Prune "
                "the model before it is sharded; under `accelerate launch` every process holds all of it"
            )
    if ranks.alone:
        return
    for name, parameter in model.named_parameters():
        if ranks.wire is not None and parameter.is_cuda and parameter.device != ranks.wire:
            raise ConfigurationError(
                f"process {ranks.index} has {name} on {parameter.device}; each of the {ranks.count} processes must hold "
                f"the whole model on its own device, this one on {ranks.wire}: leave device_map out or give 'auto' to "
                "SSMPruner.from_pretrained, or move the model with .to()"
            )
    ranks.same("models", weights_hash(model))


def weights_hash(model: nn.Module) -> int:
    """A number that tells models with different weights apart; fast, and no proof that two are the same."""
    value = 0
    for place, parameter in enumerate(model.parameters()):
        if not parameter.is_meta and parameter.numel():
            content = torch.hash_tensor(parameter.detach()).view(torch.int64).item()
            value ^= hash((place, tuple(parameter.shape), content))
    return value


def own_device_map(device_map: Any, ranks: Ranks) -> Any:
    """`device_map` for one of several processes: "auto" and its like, which spread a model over all GPUs, mean its own."""
    if ranks.alone or not isinstance(device_map, str) or device_map not in ("auto", "balanced", "balanced_low_0"):
        return device_map
    return {"": ranks.wire or "cpu"}
