# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a pass does to a block. The loop around it, in `pipeline.py`, is the same for weights and for structures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ..calibration.activations import Activations
from ..calibration.placement import Batches
from ..calibration.ranks import ALONE, Ranks
from ..calibration.sites import BlockStatistics, Need
from ..errors import CalibrationError, ConfigurationError
from ..surgery.compensation import compensate
from .outcome import Outcome


T = TypeVar("T")
Values = Mapping[str, Tensor]


@dataclass
class Place:
    """A block in the loop, with its inputs.

    Args:
        index (`int`): its place in the model.
        name (`str`): qualified name.
        block (`nn.Module`): the block.
        stream (`Activations`, *optional*): its calibration inputs.
        dense (`Batches`, *optional*): its outputs on them before anything was changed.
        watch (`Callable`): `watch(needs)` runs the block once more over its inputs and gives the finished statistics.
        ranks (`Ranks`): the processes, each with its own part of the inputs; statistics are those of all of them.
    """

    index: int
    name: str
    block: nn.Module
    stream: Activations | None
    dense: Batches | None
    watch: Callable[[list[Need]], BlockStatistics]
    ranks: Ranks = ALONE

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.stream.tokens if self.stream is not None else 0

    def read(self, path: str) -> Tensor:
        """A parameter of the block in float32.

        Raises:
            CalibrationError: it holds non-finite values.
        """
        weight = self.block.get_parameter(path).detach().float()
        if not weight.isfinite().all():
            raise CalibrationError(f"{self.name}.{path}: the weight holds non-finite values")
        return weight

    def compensate(self, kind: str, output: str, gone: Tensor | None) -> None:
        """`surgery.compensation.compensate` of the block as it is now, on its inputs and dense outputs."""
        samples, forward = zip(self.stream.hidden, self.dense), self.stream.forward(self.block)
        compensate(kind, self.block, output, samples, forward, self.ranks.sum_, gone)


class Work(ABC, Generic[T]):
    """The tasks of one pass, by block, and how each is done.

    Attributes:
        tasks (`dict[int, list]`): by index of the block.

    Class attributes:
        independent: whether every task of a block reads and changes nothing but its own `entries`, so that several
            processes can share them out.
    """

    independent: ClassVar[bool] = False
    tasks: dict[int, list[T]]

    @abstractmethod
    def needs(self, task: T) -> dict[str, Need]:
        """Statistics of the block that a task reads, by the name under which it does."""

    def planning_needs(self, task: T) -> dict[str, Need] | None:
        """The same for the dense pass that comes before; `None` where it is not needed."""
        return None

    @abstractmethod
    def label(self, task: T) -> str:
        """Its name for messages."""

    def summarise(self, place: Place, values: dict[T, Values]) -> dict[T, Any]:
        """What is kept of the dense pass over one block until all have been seen."""
        return {}

    @abstractmethod
    def decide(self, summaries: dict[T, Any]) -> None:
        """Fix how much every task removes."""

    def decided(self) -> dict[str, Any]:
        """What `decide` fixed, JSON-ready, for a run that goes on later."""
        raise ConfigurationError(
            f"resume_from cannot keep the plan of {type(self).__name__}; leave it out for this pass"
        )

    def resume(self, decided: dict[str, Any]) -> None:
        """Take what `decided` gave an earlier run, in place of `decide`."""
        raise ConfigurationError(
            f"resume_from cannot keep the plan of {type(self).__name__}; leave it out for this pass"
        )

    def entries(self, task: T) -> Tensor:
        """Where tasks are independent: the part of a parameter that a task changes, as a view."""
        raise NotImplementedError

    def cost(self, task: T, values: Values) -> float:
        """Where tasks are independent: about how many multiplications a task takes."""
        raise NotImplementedError

    def check(self, tasks: Sequence[T]) -> None:
        """Refuse what tasks of one block cannot work on, before anything is changed.

        Raises:
            CalibrationError: the first task that cannot be done, by name.
        """

    @abstractmethod
    def apply(self, place: Place, task: T, values: Values) -> Outcome:
        """Do the task: change the block and say what is gone. Where an accelerator works, nothing here need wait for it."""

    def settle(self) -> None:
        """Look at what `apply` left to be looked at, when the tasks of a block are done.

        Raises:
            CalibrationError: a task went wrong; its weight is what it was.
        """
