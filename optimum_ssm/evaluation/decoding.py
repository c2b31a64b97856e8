# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding, one token a step, on the recurrent cache of a prompt; on CUDA replayed as a graph.

A step of a recurrent model at a small batch is hundreds of small kernels, and launching them takes longer than running
them. A CUDA graph launches them at once. It needs states that stay where they are: transformers' `LinearAttentionLayer`
is written in place, by the decode step as well as by a prefill after `reset()`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from ..errors import ConfigurationError


WARM_UP_STEPS = 3  # before a capture: libraries allocate their workspaces at the first call


def prefill(model: PreTrainedModel, ids: Tensor, **cache: Any) -> Any:
    """The model's output on a prompt, with a cache; logits of the last position only, where the class can do that.

    Args:
        model (`PreTrainedModel`): a causal language model.
        ids (`Tensor`): int64, (batch, length).
        **cache: the cache to fill under the name by which the class takes it; by default the model makes one.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        cache["logits_to_keep"] = 1
    return model(input_ids=ids, use_cache=True, **cache)


def cache_of(output: Any) -> tuple[str, Any]:
    """The cache in a model's output, with the name of the argument that takes it back."""
    for name in ("cache_params", "past_key_values"):
        if getattr(output, name, None) is not None:
            return name, getattr(output, name)
    raise ConfigurationError(f"{type(output).__name__} holds no cache; decoding needs a model that keeps its state")


def is_recurrent(cache: Any) -> bool:
    """Whether every layer of a cache is a state of fixed size, so that nothing grows with the tokens seen."""
    return all(
        isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)
        for layer in cache.layers
    )


def states_of(cache: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The recurrent states, (batch, …) each, and the convolution states, (batch, channels, kernel), of a cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
    recurrent = [state for layer in layers for state in layer.recurrent_states.values() if state is not None]
    return recurrent, [state for layer in layers for state in layer.conv_states.values() if state is not None]


class GreedyDecoder:
    """Continues a prompt by the most probable token, step by step.

    Args:
        model (`PreTrainedModel`): a causal language model in eval mode; gradients must be off while it is used.
        prompt (`Tensor`): int64, (batch, length), on the model's device.

    Attributes:
        ids (`Tensor`): the newest token of every sequence, (batch, 1); every step overwrites it.
        cache: the model's cache.
    """

    def __init__(self, model: PreTrainedModel, prompt: Tensor):
        self.model = model
        self.prompt = prompt
        output = prefill(model, prompt)
        self._name, self.cache = cache_of(output)
        for layer in self.cache.layers if is_recurrent(self.cache) else ():
            # The layout that transformers' own scans leave. Another scan's may be transposed, and a step would keep it.
            layer.recurrent_states = {
                index: None if state is None else state.contiguous() for index, state in layer.recurrent_states.items()
            }
        self.ids = _best(output.logits)
        self._graph: Any = None

    def restart(self) -> None:
        """Go back to the end of the prompt. A recurrent cache is filled again in place, as a graph needs it."""
        if is_recurrent(self.cache):
            self.cache.reset()
            output = prefill(self.model, self.prompt, **{self._name: self.cache})
        else:
            output = prefill(self.model, self.prompt)
            self._name, self.cache = cache_of(output)
        self.ids.copy_(_best(output.logits))

    def run(self, steps: int) -> Tensor:
        """Take steps, without waiting for the device: by the graph if there is one, else by calling the model.

        Args:
            steps (`int`): tokens to add.

        Returns:
            `Tensor`: the tokens that the steps gave, int64, (batch, steps). The token before them is `ids` at the start.
        """
        found = self.ids.new_empty(len(self.ids), steps)
        step = self._step if self._graph is None else self._graph.replay
        for index in range(steps):
            step()
            found[:, index].copy_(self.ids[:, 0])
        return found

    def capture(self) -> None:
        """Capture a step as a CUDA graph, which `run` replays from now on, and go back to the end of the prompt.

        Raises:
            ConfigurationError: the model is not on a CUDA device, its cache grows with the tokens, or a step moves it.
        """
        device = self.ids.device
        if device.type != "cuda":
            raise ConfigurationError(f"a CUDA graph needs a model on a CUDA device; this one is on {device}")
        if not is_recurrent(self.cache):
            raise ConfigurationError(f"the cache of {type(self.model).__name__} grows with every token: no CUDA graph")
        places = self._places()
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        self.restart()
        if self._places() != places:
            raise ConfigurationError(
                f"{type(self.model).__name__} puts its states elsewhere at every step: a CUDA graph cannot follow"
            )
        self._graph = graph

    def _step(self) -> None:
        output = self.model(input_ids=self.ids, use_cache=True, **{self._name: self.cache})
        self.ids.copy_(_best(output.logits))

    def _places(self) -> list[int]:
        return [state.data_ptr() for states in states_of(self.cache) for state in states]


def _best(logits: Tensor) -> Tensor:
    """The most probable token after the last position, (batch, 1)."""
    return logits[:, -1:].argmax(-1)
