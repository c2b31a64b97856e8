# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Weights of a block, brought to where it is worked on and let go of afterwards.

An offloaded block is pruned without accelerate's hooks, on real parameters. What comes of it stays in main memory, or in a
file where that is short, and hooks of the same kind bring it in from there: forward, generate and save_pretrained see the
pruned weights. Files that the model was loaded from are only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import PrefixedDataset, align_module_device, has_offloaded_params
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import CalibrationError
from .block_files import write_block
from .offload import is_offloaded, work_device
from .placement import fits_memory
from .timing import phase


logger = logging.get_logger(__name__)


def let_go(block: nn.Module) -> None:
    """Free the values that accelerate holds in main memory for a block which is no part of its model any more."""
    for module in block.modules():
        if has_offloaded_params(module):
            _forget(module._hf_hook)


class BlockWeights:
    """Brings the blocks of a model to where they are worked on, one at a time, and fetches the next one meanwhile.

    Args:
        model (`nn.Module`): the model.
        device (`str`, *optional*): where blocks in main memory are brought; default: they are worked on where they are.
            Offloaded blocks go to the device that their hooks name.
    """

    def __init__(self, model: nn.Module, device: str | None = None):
        self.model, self.device = model, None if device is None else torch.device(device)
        if self.device is not None and self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())  # as parameters name it
        self._fetcher = ThreadPoolExecutor(1, "optimum_ssm weights")
        self._coming: tuple[nn.Module, Future] | None = None

    def device_of(self, block: nn.Module) -> torch.device:
        """Where a block will be worked on."""
        there = work_device(block)
        return self.device if self.device is not None and not is_offloaded(block) else there

    @contextmanager
    def at_hand(
        self, name: str, block: nn.Module, *, edit: bool, following: nn.Module | None = None
    ) -> Iterator[None]:
        """While the context is open, the block has real parameters on the device where it is worked on.

        Args:
            name (`str`): its qualified name in the model.
            block (`nn.Module`): the block.
            edit (`bool`): what was changed stays; without it, what the block was is put back.
            following (`nn.Module`, *optional*): the block that will be asked for next, unchanged until then. Its values are
                copied while this one is worked on, which takes room for one block more.
        """
        if self._coming is not None and self._coming[0] is block:
            wait([self._coming[1]])  # until then it looks now offloaded, now not
        try:
            if is_offloaded(block):
                yield from self._offloaded(name, block, edit, following)
            elif self._is_brought(block):
                yield from self._moved(block, following)
            else:
                yield
        except BaseException:
            self._wait()  # the next block is as it was, too
            raise

    def _is_brought(self, block: nn.Module) -> bool:
        return self.device is not None and self.device != next(block.parameters()).device

    def _fetch(self, following: nn.Module | None) -> None:
        """Begin to copy the values of the next block."""
        if following is not None and (is_offloaded(following) or self._is_brought(following)):
            self._coming = following, self._fetcher.submit(self._copies, following)

    def _fetched(self, block: nn.Module) -> Any:
        """The copies of a block's values, under way or made now."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is block:
            return coming[1].result()
        return self._copies(block)

    def _wait(self) -> None:
        if self._coming is not None:
            wait([self._coming[1]])
            self._coming = None

    def _copies(self, block: nn.Module) -> Any:
        """Of an offloaded block, by module and name; of one that is brought, of all its tensors in order."""
        if is_offloaded(block):
            return {module: _values(module) for module in block.modules() if has_offloaded_params(module)}
        return [tensor.data.to(self.device) for tensor in _tensors(block)]

    def _moved(self, block: nn.Module, following: nn.Module | None) -> Iterator[None]:
        home = next(block.parameters()).device
        with phase("weights"):
            for tensor, value in zip(_tensors(block), self._fetched(block)):
                tensor.data = value
        self._fetch(following)
        try:
            yield
        finally:
            with phase("weights"):
                for tensor in _tensors(block):
                    tensor.data = tensor.data.to(home)

    def _offloaded(self, name: str, block: nn.Module, edit: bool, following: nn.Module | None) -> Iterator[None]:
        with phase("weights"):
            device = work_device(block)
            values = self._fetched(block)
            hooks = {module: module._hf_hook for module in block.modules() if hasattr(module, "_hf_hook")}
            metas = {module: dict(module.named_parameters(recurse=False)) for module in hooks}
            remove_hook_from_module(block, recurse=True)
            for module, found in values.items():
                for leaf, value in found.items():
                    setattr(module, leaf, nn.Parameter(value, requires_grad=metas[module][leaf].requires_grad))
        self._fetch(following)
        try:
            yield
        finally:
            with phase("weights"):
                if not edit:
                    for module in values:
                        for leaf, meta in metas[module].items():
                            setattr(module, leaf, meta)
                    _hook(hooks)
                else:
                    self._let_go(name, block, hooks, list(values), device)

    def _let_go(
        self,
        name: str,
        block: nn.Module,
        hooks: Mapping[nn.Module, ModelHook],
        modules: list[nn.Module],
        device: torch.device,
        unwritable: bool = False,
    ) -> None:
        """Keep a changed block in main memory, or on disk if it does not fit, and let its hooks know. What the disk does not
        take stays in main memory, where it is, and the error is raised when the model is whole."""
        if not modules:  # nothing was brought in: what is meta here was never loaded
            return
        paths = {module: path for path, module in block.named_modules()}
        size = sum(p.numel() * p.element_size() for p in block.parameters())
        in_memory = unwritable or _place(self.model, name) == "cpu" or fits_memory(size)
        for module in modules:
            _forget(hooks[module])
        if in_memory:
            _set_place(self.model, name)
            if device.type == "cpu":
                return  # real parameters where they are computed with: nothing to bring
            state = {key: parameter.detach().cpu() for key, parameter in block.named_parameters()}
            weights: Mapping[str, Tensor] = state
        else:
            logger.info(f"{name}: main memory is short of {size:,} bytes, the pruned block is kept on disk")
            try:
                weights = write_block(self.model, name, block, device)
            except CalibrationError:
                self._let_go(name, block, hooks, modules, device, unwritable=True)
                raise
        for module in modules:
            hooks[module].weights_map = PrefixedDataset(weights, f"{paths[module]}." if paths[module] else "")
        _hook(hooks)


def _values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's own parameters on the device where it computes; the originals are not to be written to."""
    metas = dict(module.named_parameters(recurse=False))
    with align_module_device(module):
        found = {name: parameter.detach().clone() for name, parameter in module.named_parameters(recurse=False)}
    for name, meta in metas.items():  # accelerate leaves other objects in their place
        setattr(module, name, meta)
    return found


def _hook(hooks: Mapping[nn.Module, ModelHook]) -> None:
    for module, hook in hooks.items():
        add_hook_to_module(module, hook)


def _forget(hook: AlignDevicesHook) -> None:
    """Free the values before the change, where accelerate holds them for the whole model in main memory."""
    if isinstance(hook.weights_map, PrefixedDataset):
        store = getattr(hook.weights_map.dataset, "state_dict", hook.weights_map.dataset)
        if isinstance(store, dict):
            for key in [key for key in store if key.startswith(hook.weights_map.prefix)]:
                store.pop(key)


def _tensors(block: nn.Module) -> list[Tensor]:
    """Parameters and buffers. They stay the objects that they are, as with `block.to(device)`; their data changes."""
    return [*block.parameters(), *block.buffers()]


def _place(model: nn.Module, name: str) -> str | None:
    """Where accelerate's device map puts a module; `None` without a map."""
    places = getattr(model, "hf_device_map", {})
    prefixes = [name.rsplit(".", cut)[0] for cut in range(name.count(".") + 1)] + [""]
    return next((str(places[prefix]) for prefix in prefixes if prefix in places), None)


def _set_place(model: nn.Module, name: str) -> None:
    """Let the device map say that a module is in main memory now."""
    if hasattr(model, "hf_device_map"):
        model.hf_device_map[name] = "cpu"
