# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Where inputs are seen: every weight's statistics come from what really meets that weight, for every token."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optimum_ssm import CalibrationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.calibration.activations import Activations, inference_state
from optimum_ssm.calibration.seam import AVAILABLE_SUMS, replaced_scan
from optimum_ssm.calibration.sites import BlockStatistics, Need
from optimum_ssm.families import family_of
from optimum_ssm.families.base import PrunableWeight
from tests.reference import second_moment, trace, window_moment


SAMPLES, LENGTH = 5, 24
OF_KIND = {"linear": ("col_energy", "gram"), "conv": ("conv_gram",)}


def needs_of(weights: Iterable[PrunableWeight], of_kind: Mapping[str, tuple[str, ...]]) -> dict[str, dict[str, Need]]:
    """By short name of the weight and of the statistic."""
    return {w.name: {name: Need(w.site, name, 4) for name in of_kind[w.kind]} for w in weights}


def flat(needs: dict[str, dict[str, Need]]) -> list[Need]:
    return [need for of_weight in needs.values() for need in of_weight.values()]


def statistics_of(model: PreTrainedModel, ids: Tensor, batch_size: int = 2) -> list[dict[str, dict[str, Tensor]]]:
    """By block, weight and name: every statistic that the family can give, on dense activations."""
    family, found = family_of(model), []
    blocks = family.blocks(model)
    with inference_state(model), replaced_scan(family, model) as seam:
        stream = Activations(model, blocks[0][1], ids, batch_size)
        for name, block in blocks:
            of_kind = {**OF_KIND, "a_log": AVAILABLE_SUMS[family.recurrence]}
            needs = needs_of(family.weights(block), of_kind)
            statistics = BlockStatistics(block, flat(needs), seam)
            with statistics.watching():
                outputs = stream.through(block, name)
            found.append(
                {
                    weight: {name: statistics.of(need, weight, ids.numel()) for name, need in of_weight.items()}
                    for weight, of_weight in needs.items()
                }
            )
            stream.advance(outputs)
    return found


def test_statistics_are_those_of_a_float64_forward(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    """Also of dt_proj and conv1d, whose modules are never called."""
    ids = token_ids(SAMPLES, LENGTH)
    for found, seen in zip(statistics_of(either_tiny_model, ids), trace(either_tiny_model, ids)[0], strict=True):
        assert {"in_proj", "conv1d", "out_proj", "A_log"} <= found.keys()
        for name, values in found.items():
            if name == "A_log":
                error = (seen["readout"] * seen["decay"] * seen["before"]).square().sum((0, 1))
                error = error if values["decay_error"].dim() == 2 else error.sum((1, 2))
                torch.testing.assert_close(values["decay_error"].double(), error, rtol=1e-5, atol=1e-9)
            elif name == "conv1d":
                expected = window_moment(seen["conv1d"])
                torch.testing.assert_close(values["conv_gram"].double(), expected, rtol=1e-5, atol=1e-6)
            else:
                expected = second_moment(seen[name])
                torch.testing.assert_close(values["gram"].double(), expected, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(values["col_energy"].double(), expected.diagonal(), rtol=1e-5, atol=1e-6)


def test_every_site_sees_every_token_once(
    either_tiny_model: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    model, family, ids = either_tiny_model, family_of(either_tiny_model), token_ids(SAMPLES, LENGTH)
    _, block = family.blocks(model)[0]
    needs = needs_of(family.weights(block), {**OF_KIND, "a_log": ("decay_error",)})
    with inference_state(model), replaced_scan(family, model) as seam:
        statistics = BlockStatistics(block, flat(needs), seam)
        stream = Activations(model, block, ids, batch_size=2)
        with statistics.watching():
            stream.through(block, "block")
        assert seam.tokens == 0, "the seam is free for the next block"
        stream.through(block, "block")  # not watched, so not counted
        for weight, of_weight in needs.items():
            for need in of_weight.values():
                statistics.of(need, weight, SAMPLES * LENGTH)
                with pytest.raises(
                    CalibrationError, match=f"^{weight}: its input was seen for 120 of 121 calibration"
                ):
                    statistics.of(need, weight, SAMPLES * LENGTH + 1)


def test_weights_with_the_same_site_share_their_statistics(tiny_mamba: PreTrainedModel) -> None:
    """conv1d and in_proj see different ends of one module, dt_proj a slice of x_proj: nothing else is collected."""
    family = family_of(tiny_mamba)
    _, block = family.blocks(tiny_mamba)[0]
    by_name = {weight.name: weight for weight in family.weights(block)}
    with replaced_scan(family, tiny_mamba) as seam:
        site = by_name["in_proj"].site
        statistics = BlockStatistics(block, [Need(site, name) for name in ("gram", "gram", "col_energy")], seam)
        assert len(statistics._sites) == 2
        watched = {name: by_name[name] for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")}
        statistics = BlockStatistics(block, flat(needs_of(watched.values(), OF_KIND)), seam)
        others = hooks_of(block)
        with statistics.watching():
            assert hooks_of(block) - others == {"mixer.in_proj": 2, "mixer.x_proj": 2, "mixer.out_proj": 1}
        assert hooks_of(block) == others


def hooks_of(block: nn.Module) -> Counter[str]:
    """How many there are, by module."""
    return Counter(
        {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in block.named_modules()}
    )


def bypass(model: PreTrainedModel, index: int, from_call: int = 0) -> None:
    """Let the mixer of a block pass its input through, from its n-th call on."""
    mixer, calls = model.base_model.layers[index].mixer, []
    original = mixer.forward

    def forward(self: object, hidden_states: Tensor, **kwargs: object) -> Tensor:
        calls.append(1)
        return hidden_states if len(calls) > from_call else original(hidden_states, **kwargs)

    mixer.forward = MethodType(forward, mixer)


@pytest.mark.parametrize("method, target", [("wanda", "in_proj"), ("wanda", "conv1d"), ("sparsessm", "A_log")])
@pytest.mark.parametrize("from_call, seen", [(0, 0), (1, 48)])
def test_a_disconnected_site_raises_with_the_name_of_the_weight(
    either_tiny_model: PreTrainedModel,
    token_ids: Callable[..., Tensor],
    method: str,
    target: str,
    from_call: int,
    seen: int,
) -> None:
    bypass(either_tiny_model, 1, from_call)
    config = SSMPrunerConfig(
        method=method, sparsity=0.5, targets=[target], dataset=token_ids(4), seq_len=24, batch_size=2
    )
    name = rf"^backbone\.layers\.1\.mixer\.{target}: its input was seen for {seen} of 96 calibration tokens"
    with pytest.raises(CalibrationError, match=name):
        SSMPruner(either_tiny_model, pruning_config=config).prune()


def test_an_input_that_is_always_zero_raises(tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]) -> None:
    """All-zero statistics would prune by position: the first half of the columns."""
    tiny_mamba.base_model.layers[1].norm.weight.data.zero_()
    config = SSMPrunerConfig(method="wanda", sparsity=0.5, targets=["in_proj"], dataset=token_ids(), seq_len=24)
    with pytest.raises(CalibrationError, match=r"layers\.1\.mixer\.in_proj: its input is zero for every calibration"):
        SSMPruner(tiny_mamba, pruning_config=config).prune()


def test_hooks_go_and_the_seam_is_free_after_an_exception(
    tiny_mamba: PreTrainedModel, token_ids: Callable[..., Tensor]
) -> None:
    family = family_of(tiny_mamba)
    _, block = family.blocks(tiny_mamba)[0]
    with replaced_scan(family, tiny_mamba) as seam:
        needs = needs_of(family.weights(block), {**OF_KIND, "a_log": ("decay_error",)})
        statistics = BlockStatistics(block, flat(needs), seam)
        with pytest.raises(KeyboardInterrupt), statistics.watching():
            assert seam.summing
            raise KeyboardInterrupt
        assert not seam.summing
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_mamba.modules())
