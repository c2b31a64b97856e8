# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""An interrupted pass goes on where it was: its finished blocks, its plan and its gradients are pieces on disk, and the
scores of every round of a search for blocks to drop.

What a block has become is kept, what flows into the next one is not: it is computed again through the finished blocks,
batch by batch as it was, which takes a forward pass, no disk, and gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..calibration.ranks import ALONE, Ranks
from ..configuration import SSMPrunerConfig
from ..digest import digest
from ..errors import CheckpointError
from ..families.base import Family
from ..families.matching import Target
from ..hub.shards import ShardDirectory
from .fingerprint import differences, fingerprint, foreseen, parameter_digests
from .outcome import BlockOutcome
from .records import pack, unpack
from .work import Work


PARAMETER = "parameter "

logger = logging.get_logger(__name__)


class Shards:
    """The pieces of one pass. Without a directory nothing is kept and nothing is found.

    The main process writes; all processes read, so they must see the same directory.

    Args:
        ranks (`Ranks`): the processes.
        directory (`ShardDirectory`, *optional*): where they are.
        number (`int`): which pass it is.
        facts (`Mapping[str, Any]`): its fingerprint.
        digests (`Mapping[str, str]`): of the parameters before the pass.

    Attributes:
        finished (`int`): so many blocks, from the first one on, need not be computed.
        earlier_seconds (`float`): what these and the other pieces that are there had taken.
        rounds (`int`): so many rounds of a search were kept.

    Raises:
        CheckpointError: a piece does not belong to this pass; it is named, with what differs.
    """

    def __init__(
        self,
        ranks: Ranks = ALONE,
        directory: ShardDirectory | None = None,
        number: int = 0,
        facts: Mapping[str, Any] | None = None,
        digests: Mapping[str, str] | None = None,
    ):
        self.ranks, self.directory, self.number = ranks, directory, number
        self.facts, self.digests, self._planning = facts or {}, digests or {}, 0.0
        self._there: dict[str, float] = {}
        if directory is not None:
            self._there = ranks.on_main(lambda: _fitting(directory, number, self.facts))
        self.finished = next(index for index in range(len(self._there) + 1) if self._block(index) not in self._there)
        if self.finished:
            logger.warning(f"pass {number}: {self.finished} finished blocks are taken from {directory.path}")
        unused = {name for name in self._there if "-block-" in name and name > self._block(self.finished)}
        self.earlier_seconds = sum(took for name, took in self._there.items() if name not in unused)
        self.rounds = sum(name.startswith(f"pass-{number}-round-") for name in self._there)
        if self.rounds:
            logger.warning(f"pass {number}: {self.rounds} finished rounds are taken from {directory.path}")

    @classmethod
    def of_pass(
        cls,
        config: SSMPrunerConfig,
        number: int,
        model: nn.Module,
        ids: Tensor | None,
        removed: Mapping[str, Tensor],
        ranks: Ranks = ALONE,
    ) -> Shards:
        """The pieces where `config.resume_from` says. Arguments as in `fingerprint`.

        Raises:
            CheckpointError: the directory holds something else, or pieces of another run.
        """
        if config.resume_from is None:
            return cls(ranks)
        path = config.resume_from
        directory = ranks.on_main(lambda: ShardDirectory(path))
        digests = ranks.on_main(lambda: parameter_digests(model))
        facts = fingerprint(config, number, model, digests, ids, removed, ranks.count)
        return cls(ranks, directory, number, facts, digests)

    @staticmethod
    def check_ahead(
        config: SSMPrunerConfig, number: int, model: nn.Module, ids: Tensor | None, ranks: Ranks = ALONE
    ) -> None:
        """Refuse pieces of a later pass that cannot fit, before the passes before it change the model. Arguments as in
        `of_pass`.

        Raises:
            CheckpointError: the directory holds something else, or pieces of a pass with other settings.
        """
        if config.resume_from is not None:
            facts = foreseen(config, number, model, ids, ranks.count)
            ranks.on_main(lambda: _fitting(ShardDirectory(config.resume_from), number, facts))

    def gradients(
        self, model: nn.Module, compute: Callable[[], dict[str, dict[str, Tensor]]]
    ) -> dict[str, dict[str, Tensor]]:
        """Gradient statistics by parameter and name: those that were kept, or else what `compute` gives, kept.

        They are those of the model before the pass, and backward passes on a GPU need not give the same bits twice.
        """
        name = f"pass-{self.number}-gradients"
        if name in self._there:
            found: dict[str, dict[str, Tensor]] = {}
            for key, value in self.directory.read(name)[0].items():
                statistic, _, parameter = key.partition(" ")
                device = model.get_parameter(parameter).device
                found.setdefault(parameter, {})[statistic] = value.to(device if device.type != "meta" else "cpu")
            return found
        start = time.perf_counter()
        gradients = compute()
        seconds = time.perf_counter() - start
        tensors = {f"{s} {name}": value for name, found in gradients.items() for s, value in found.items()}
        if tensors:
            self._write(name, lambda: ({key: value.cpu() for key, value in tensors.items()}, {"seconds": seconds}))
        return gradients

    def scores(self, number: int, left: list[int], compute: Callable[[], list[float]]) -> tuple[list[float], float]:
        """Keep-scores of one round of a search, and the seconds that they took: kept ones, or what `compute` gives, kept.

        Args:
            number (`int`): the round, from 0.
            left (`list[int]`): units that were not dropped before. Scores of others, which only a directory that lost
                earlier rounds can hold, are computed anew.
            compute (`Callable`): gives one score per unit in `left`.

        Raises:
            CheckpointError: the piece is damaged.
        """
        name = f"pass-{self.number}-round-{number:04d}"
        if name in self._there:
            facts = self.directory.facts(name)
            if facts["left"] == left:
                return facts["scores"], facts["seconds"]
        start = time.perf_counter()
        scores = compute()
        seconds = time.perf_counter() - start
        self._write(name, lambda: ({}, {"left": left, "scores": scores, "seconds": seconds}))
        return scores, seconds

    def resume_plan(self, work: Work) -> bool:
        """Give `work` what it had decided, if that was kept."""
        name = f"pass-{self.number}-plan"
        if name not in self._there:
            self._planning = time.perf_counter()
            return False
        work.resume(self.directory.facts(name)["decided"])
        return True

    def keep_plan(self, work: Work) -> None:
        """Keep what `work` has decided since `resume_plan` found nothing."""
        if self.directory is not None:
            seconds = time.perf_counter() - self._planning
            self._write(f"pass-{self.number}-plan", lambda: ({}, {"decided": work.decided(), "seconds": seconds}))

    def keep(self, outcome: BlockOutcome, name: str, block: nn.Module, family: Family) -> None:
        """Keep a finished block: its parameters that are not what they were, and its outcome.

        Args:
            outcome (`BlockOutcome`): what became of it.
            name (`str`), block (`nn.Module`): its qualified name, and itself with its parameters at hand.
            family (`Family`): knows its sizes.
        """
        if self.directory is None:
            return

        def piece() -> tuple[dict[str, Tensor], dict[str, Any]]:
            tensors: dict[str, Tensor] = {}
            packed = pack(outcome, tensors)
            for path, parameter in block.named_parameters():
                if digest(parameter) != self.digests.get(f"{name}.{path}"):
                    tensors[PARAMETER + path] = parameter.detach().cpu()
            return tensors, {"outcome": packed, "sizes": family.sizes(block), "seconds": outcome.seconds}

        self._write(self._block(outcome.index), piece)

    def put_back(self, index: int, block: nn.Module, family: Family, work: Work) -> BlockOutcome:
        """Make a block what it had become, in place.

        Args:
            index (`int`): its place in the model.
            block (`nn.Module`), family (`Family`): as in `keep`.
            work (`Work`): whose tasks it held.

        Raises:
            CheckpointError: the piece is damaged.
        """
        tensors, facts = self.directory.read(self._block(index))
        targets = {t.target.label: t.target for t in work.tasks.get(index, []) if isinstance(_target(t), Target)}
        for path, value in tensors.items():
            if path.startswith(PARAMETER):
                _put(block, path.removeprefix(PARAMETER), value)
        if facts["sizes"]:  # of attributes: what a family reads off the tensors agrees already
            family.set_sizes(block, facts["sizes"])
        return unpack(facts["outcome"], tensors, targets)

    def _block(self, index: int) -> str:
        return f"pass-{self.number}-block-{index:04d}"

    def _write(self, name: str, piece: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> None:
        if self.directory is None:
            return

        def write() -> None:
            tensors, facts = piece()
            self.directory.write(name, tensors, {"fingerprint": self.facts, **facts})

        self.ranks.on_main(write)


def _fitting(directory: ShardDirectory, number: int, facts: Mapping[str, Any]) -> dict[str, float]:
    """The pieces of a pass, all of which must agree with what is known of its fingerprint, and the seconds that each took."""
    found, names = {}, [name for name in directory.names() if name.startswith(f"pass-{number}-")]
    for name in names:
        said = directory.facts(name)
        there = {key: value for key, value in said["fingerprint"].items() if key in facts or key.startswith("config.")}
        if differing := differences(there, facts):
            raise CheckpointError(
                f"{directory.path / name}.safetensors was made by another run: {'; '.join(differing)}. Give that run's "
                "settings, or another resume_from"
            )
        found[name] = said["seconds"]
    return found


def _target(task: Any) -> Any:
    return getattr(task, "target", None)


def _put(block: nn.Module, path: str, value: Tensor) -> None:
    """Set a parameter: in place where the shape is the same, as a new one where it was cut or was not there."""
    module, _, name = path.rpartition(".")
    owner = block.get_submodule(module)
    old = getattr(owner, name, None)
    with torch.no_grad():
        if old is not None and old.shape == value.shape and old.dtype == value.dtype:
            old.copy_(value)
            return
        like = old if old is not None else owner.weight
        setattr(owner, name, nn.Parameter(value.to(like.device, copy=True), requires_grad=like.requires_grad))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
