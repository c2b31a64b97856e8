# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where the residual stream of all calibration samples is kept: on the device, in main memory, or on disk.

Away from the device, one thread copies: the next batch comes while the present one is computed with, and outputs leave
while the next batch is computed. Copies keep their order, and only one output waits at a time, so the device holds two
or three batches of the stream and no more.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import CalibrationError
from .scratch import Scratch, temporary_directory
from .timing import note, phase


PLACES = ("device", "cpu", "disk")
SHARE = 0.5  # of what is free may be taken: the rest is for weights, statistics and solves

logger = logging.get_logger(__name__)

_staging: list[Tensor] = []  # the buffer of `to_main_memory`


class Placement:
    """One place, with the thread and the folder that it needs; a context manager that lets go of both.

    Args:
        place (`str`): `"device"` (tensors stay where they are computed), `"cpu"` (main memory, pinned where there is
            CUDA) or `"disk"` (memory-mapped files without a name in a temporary directory: a killed process leaves none of
            them, but their directory, see `scratch.py`).

    Raises:
        CalibrationError: a temporary directory is wanted and cannot be made.
    """

    def __init__(self, place: str = "device"):
        self.place = place
        self._scratch = Scratch("stream") if place == "disk" else None
        self._copier = ThreadPoolExecutor(1, "optimum_ssm copies") if place != "device" else None
        self._streams: dict[torch.device, Any] = {}
        self._files = 0

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and remove the folder."""
        if self._copier is not None:
            self._copier.shutdown(wait=True, cancel_futures=True)
        if self._scratch is not None:
            self._scratch.remove()

    def batches(self, count: int) -> Batches:
        """Room for so many batches, empty."""
        return Batches(self, count)

    def run(self, *work: Any) -> Future:
        """Let the copying thread do `function(*args)`."""
        return self._copier.submit(*work)

    def room(self, like: Tensor) -> Tensor:
        """An uninitialised tensor in main memory or on disk.

        Raises:
            CalibrationError: the disk is full.
        """
        if self.place == "cpu":
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=torch.cuda.is_available())
        path, size = self._scratch.path / f"{self._files}.bin", like.numel() * like.element_size()
        self._files += 1
        try:
            with open(path, "wb") as file:  # taken now: a full disk found while writing to the map would be a signal
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(1, size))
                else:
                    file.truncate(max(1, size))
        except OSError as error:
            raise CalibrationError(
                f"no room for {size:,} bytes of calibration activations in {path.parent.parent}: {error}. Set TMPDIR to "
                "a larger disk, or use fewer or shorter samples"
            ) from error
        mapped = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
        with suppress(OSError):  # where a mapped file cannot be unlinked, close() removes it
            path.unlink()
        return mapped

    def copy(self, target: Tensor | None, source: Tensor, device: torch.device, ready: Any = None) -> Tensor:
        """`source` on `device`, into `target` where that is given; finished when this returns. Runs in the thread."""
        cuda = next((d for d in (source.device, device) if d.type == "cuda"), None)
        if cuda is None:
            return source.clone() if target is None else target.copy_(source)
        if cuda not in self._streams:
            self._streams[cuda] = torch.cuda.Stream(cuda)
        stream = self._streams[cuda]
        with torch.cuda.stream(stream):
            if ready is not None:
                stream.wait_event(ready)
            if target is None:
                copied = source.to(device, non_blocking=True)
            else:
                copied = target.copy_(source, non_blocking=True)
        stream.synchronize()
        return copied


class Batches:
    """The tensors of all calibration batches, one place for all of them, in the manner of a list.

    Reading gives tensors on a device. What is written may be read again, and writing over a batch that was handed out
    does not change it.
    """

    def __init__(self, placement: Placement, count: int):
        self.placement = placement
        self._kept: list[Tensor | None] = [None] * count
        self._homes: list[torch.device] = [torch.device("cpu")] * count
        self._writing: Future | None = None

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept if kept is not None)

    def samples(self, index: int) -> int:
        """Sequences in a batch."""
        return len(self._kept[index])

    def rows(self, index: int, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        """Some sequences of one batch, on `device`, by default where it was computed."""
        kept, device = self._kept[index][start:stop], self._homes[index] if device is None else device
        if self.placement.place == "device":
            return kept.to(device)
        with phase("activations"):
            self._finish()
            return _usable(self.placement.run(self.placement.copy, None, kept, device).result())

    def __getitem__(self, index: int) -> Tensor:
        return self.rows(index, 0, self.samples(index))

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._homes[index] = value.device
        if self.placement.place == "device":
            self._kept[index] = value
            return
        with phase("activations"):
            self._finish()
            kept = self._kept[index]
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                self._kept[index] = None  # let go of the old one first
                self._kept[index] = kept = self.placement.room(value)
            ready = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None
            self._writing = self.placement.run(self.placement.copy, kept, value, kept.device, ready)

    def __iter__(self) -> Iterator[Tensor]:
        return self.read()

    def read(self, device: torch.device | None = None) -> Iterator[Tensor]:
        """Every batch in turn on `device`, by default where it was computed; the next one is under way by then."""
        if self.placement.place == "device":
            for kept in self._kept:
                yield kept if device is None else kept.to(device)
            return
        coming = self._fetch(0, device)
        for index in range(len(self)):
            with phase("activations"):
                batch = _usable(coming.result())
            if index + 1 < len(self):
                coming = self._fetch(index + 1, device)
            yield batch

    def _fetch(self, index: int, device: torch.device | None) -> Future:
        return self.placement.run(
            lambda: self.placement.copy(None, self._kept[index], self._homes[index] if device is None else device)
        )

    def _finish(self) -> None:
        """Wait for the output that is being written."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


class Pairs(Sequence):
    """Inputs and wished outputs of a block, some sequences at a time, for steps that come in any order.

    Args:
        inputs, wishes (`Batches`): batch for batch.
        size (`int`): sequences in a pair at most; a pair does not reach over the end of a batch.
        device (`torch.device`): where both of them are given.
    """

    def __init__(self, inputs: Batches, wishes: Batches, size: int, device: torch.device):
        self.inputs, self.wishes, self.device = inputs, wishes, device
        counts = [inputs.samples(index) for index in range(len(inputs))]
        self._spans = [(i, a, min(a + size, count)) for i, count in enumerate(counts) for a in range(0, count, size)]

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        span = self._spans[index]
        return self.inputs.rows(*span, self.device), self.wishes.rows(*span, self.device)


def _usable(batch: Tensor) -> Tensor:
    """Memory that was allocated on the copying stream, kept until the present one is done with it."""
    if batch.is_cuda:
        batch.record_stream(torch.cuda.current_stream(batch.device))
    return batch


def choose_place(offload: str | None, needed: int, device: torch.device) -> str:
    """The place that a config names, or the first one that has room for the stream.

    Args:
        offload (`str`, *optional*): one of `PLACES`; `None` chooses the first where the stream takes at most half of
            what is free: the device, main memory, the disk of the temporary directory.
        needed (`int`): bytes of the whole stream, all copies together.
        device (`torch.device`): where blocks are computed.

    Raises:
        CalibrationError: there is not enough room on the disk, if that is what it comes to, or no temporary directory.
    """
    free = {"device": free_bytes(device), "cpu": free_bytes(torch.device("cpu"))}
    place = offload or next((name for name in ("device", "cpu") if needed <= SHARE * free[name]), "disk")
    if device.type == "cpu" and place == "cpu":
        place = "device"  # the same memory
    if place == "disk":
        folder = temporary_directory()
        try:
            room = shutil.disk_usage(folder).free
        except OSError as error:
            raise CalibrationError(
                f"{folder}, where temporary files go, cannot be read: {error}. Set TMPDIR to a directory that can be written to"
            ) from error
        if needed > room and offload == "disk":
            raise CalibrationError(
                f"offload='disk': the calibration activations take {needed:,} bytes, and {folder}, where temporary files "
                f"go, has {room:,}. Set TMPDIR to a larger disk, use fewer or shorter samples, leave offload out, or say "
                "offload='cpu'"
            )
        if needed > room:
            raise CalibrationError(
                f"the calibration activations take {needed:,} bytes: more than half of what is free on {device} "
                f"({free['device']:,}) and in main memory ({free['cpu']:,}), and more than {folder} has ({room:,}). Use "
                "fewer or shorter samples, or set TMPDIR to a larger disk"
            )
    note("place", place)
    logger.info(f"calibration activations: {needed / 1e9:.2f} GB, kept on {device if place == 'device' else place}")
    return place


def stream_placement(
    model: nn.Module, offload: str | None, copies: int, ids: Tensor | None, device: torch.device
) -> Placement:
    """Where so many copies of the residual stream of `ids` are kept while blocks are computed on `device`."""
    if ids is None:
        return Placement()
    embedding = model.get_input_embeddings().weight
    width = 4 if getattr(model.config, "residual_in_fp32", False) else embedding.element_size()
    return Placement(choose_place(offload, copies * ids.numel() * embedding.shape[1] * width, device))


def to_main_memory(tensor: Tensor) -> Tensor:
    """A copy in main memory. It goes through one pinned buffer, which a GPU fills many times faster than fresh memory."""
    if not tensor.is_cuda or not tensor.numel():
        return tensor.detach().cpu()
    size = tensor.numel() * tensor.element_size()
    if not _staging or _staging[0].numel() < size:
        _staging[:] = [torch.empty(size, dtype=torch.uint8, pin_memory=True)]
    staged = _staging[0][:size].view(tensor.dtype).view(tensor.shape)
    staged.copy_(tensor.detach(), non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return staged.clone()


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, or in main memory within the limits of a container."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        held, limit = ((group / f"memory.{name}").read_text() for name in ("current", "max"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("file "))
        free = min(free, int(limit) - int(held) + cached)
    return free


def fits_memory(needed: int) -> bool:
    """Whether main memory has room for so many bytes more."""
    return needed <= SHARE * free_bytes(torch.device("cpu"))
