# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Sums over tokens against token-by-token loops, and against what the weights really meet (oracles 8, 10, 23)."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from optimum_ssm.calibration.activations import Activations, inference_state
from optimum_ssm.calibration.seam import AVAILABLE_SUMS, replaced_scan
from optimum_ssm.calibration.sites import BlockStatistics, Need
from optimum_ssm.calibration.statistics import STATISTICS, ColumnEnergy, ConvGram, Statistic, site_statistic
from optimum_ssm.families import family_of

from ..reference import second_moment, trace, window_moment


CHANNELS, TAPS = 6, 4
KINDS = {name: lambda name=name: site_statistic(name, TAPS) for name in STATISTICS}


def windows(x, taps=TAPS):
    """(B, L, C, K): at every step of every sequence its last K inputs, oldest first, zeros before the first."""
    out = torch.zeros(*x.shape, taps, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for k in range(taps):
                if t - taps + 1 + k >= 0:
                    out[b, t, :, k] = x[b, t - taps + 1 + k].double()
    return out


def expected(kind, x):
    if kind == "conv_gram":
        return window_moment(windows(x))
    x = x.double()
    if kind == "moments":
        rows = x.reshape(-1, x.shape[-1])
        return torch.stack([rows.mean(0), rows.var(0, correction=0)])
    if kind == "gate_energy":
        return (x * torch.sigmoid(x)).square().mean((0, 1))
    if kind == "sequence_activity":
        return torch.stack([sequence.abs().mean(0) for sequence in x]).norm(dim=0)
    moment = second_moment(x)
    return moment if kind == "gram" else moment.diagonal()


def close(found, wanted, rtol=1e-6):
    """Equal relative to the scale that an entry could have, the geometric mean of its two diagonal entries."""
    wanted = wanted.double()
    if wanted.dim() > 1 and wanted.shape[-1] == wanted.shape[-2]:
        root = wanted.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = root[..., :, None] * root[..., None, :]
    else:
        scale = wanted.abs() + (wanted.abs().max() if wanted.dim() > 1 else 0)
    return bool(((found.double() - wanted).abs() <= rtol * scale + 1e-30).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_the_mean_over_tokens(kind):
    x = torch.randn(3, 7, CHANNELS)
    statistic = KINDS[kind]()
    statistic.update(x)
    assert statistic.tokens == 21
    assert close(statistic.value(), expected(kind, x))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_ranks_merge_by_addition(kind):
    x = torch.randn(7, 9, CHANNELS)
    whole, first, second = KINDS[kind](), KINDS[kind](), KINDS[kind]()
    whole.update(x)
    for part in (x[:1], x[1:3]):
        first.update(part)
    second.update(x[3:])
    first.merge(second)
    assert first.tokens == whole.tokens == 63
    assert close(first.value(), whole.value())
    assert close(first.value(), expected(kind, x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_samples_does_not_matter(kind):
    x = torch.randn(40, 12, CHANNELS) * torch.logspace(-2, 2, 40)[:, None, None]
    forward, shuffled = KINDS[kind](), KINDS[kind]()
    for part in x.split(3):
        forward.update(part)
    for part in x[torch.randperm(40)].split(8):
        shuffled.update(part)
    assert close(forward.value(), shuffled.value(), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_dtype_are_summed_in_float32(kind, dtype):
    x = torch.randn(4, 50, CHANNELS).to(dtype)
    statistic = KINDS[kind]()
    statistic.update(x)
    assert statistic.value().dtype == torch.float32
    assert close(statistic.value(), expected(kind, x.float()))


def test_a_long_run_of_half_precision_inputs_neither_stalls_nor_overflows():
    """In bfloat16 a running sum of ones stops at 256; in float16 a square of 300 is infinite."""
    energy = ColumnEnergy()
    for _ in range(100):
        energy.update(torch.ones(1, 50, 1, dtype=torch.bfloat16))
    assert energy.value().item() == 1.0
    energy = ColumnEnergy()
    energy.update(torch.full((1, 4, 1), 300.0, dtype=torch.float16))
    assert energy.value().item() == 90_000.0


def test_the_convolutions_windows_do_not_reach_into_the_sequence_before():
    x = torch.randn(2, 5, CHANNELS)
    together, apart = ConvGram(TAPS), ConvGram(TAPS)
    together.update(x)
    for sequence in x:
        apart.update(sequence[None])
    assert close(together.value(), apart.value())
    assert close(together.value()[:, -1, -1], x.double().square().mean((0, 1)))  # the last tap sees every token


def test_a_sequence_shorter_than_the_kernel_is_padded():
    x = torch.randn(3, 2, CHANNELS)
    statistic = KINDS["conv_gram"]()
    statistic.update(x)
    assert close(statistic.value(), expected("conv_gram", x))
    assert not statistic.value()[:, :2, :2].any()


def test_the_activations_that_are_seen_are_not_changed():
    x = torch.randn(2, 5, CHANNELS)
    before = x.clone()
    for make in KINDS.values():
        make().update(x)
    assert torch.equal(x, before)


def test_shapes_follow_the_first_input():
    for name, shape in {"gram": (5, 5), "col_energy": (5,), "conv_gram": (5, 4, 4), "moments": (2, 5)}.items():
        statistic = site_statistic(name, 4)
        assert statistic.sum is None
        statistic.update(torch.ones(1, 2, 5))
        assert statistic.sum.shape == shape


def test_an_unknown_statistic_is_refused():
    with pytest.raises(ValueError, match="unknown statistic 'grams'. Allowed: col_energy, gram, conv_gram"):
        site_statistic("grams")


def test_the_base_class_is_only_a_base():
    with pytest.raises(TypeError):
        Statistic().update(torch.ones(1, 2, 3))


# What the weights really meet. `dt_proj` and `conv1d` are used without their modules being called.


def block_statistics(model, ids, batch_size=2):
    """Of every block what the package collects, in one pass over dense activations."""
    family, found = family_of(model), []
    names = {"linear": ("col_energy", "gram"), "conv": ("conv_gram",), "a_log": AVAILABLE_SUMS[family.recurrence]}
    with inference_state(model), replaced_scan(family, model) as seam:
        blocks = family.blocks(model)
        stream = Activations(model, blocks[0][1], ids, batch_size)
        for name, block in blocks:
            needs = {w.name: {n: Need(w.site, n, 4) for n in names[w.kind]} for w in family.weights(block)}
            statistics = BlockStatistics(block, [need for of in needs.values() for need in of.values()], seam)
            with statistics.watching():
                outputs = stream.through(block, name)
            found.append(
                {w: {n: statistics.of(need, w, ids.numel()) for n, need in of.items()} for w, of in needs.items()}
            )
            stream.advance(outputs)
    return found


class Spy:
    """Stands for the weight of `dt_proj` and keeps what it is multiplied with."""

    def __init__(self, weight):
        self.weight, self.met = weight, []

    def __matmul__(self, other):
        self.met.append(other.detach().transpose(1, 2))
        return self.weight @ other


def test_statistics_of_dt_proj_are_those_of_its_operand(tiny_mamba, token_ids):
    """With the same scan in both forwards, so that nothing but the statistics can differ."""
    ids = token_ids(6, 24)
    found = block_statistics(tiny_mamba, ids)
    instrumented = copy.deepcopy(tiny_mamba)
    spies = []
    for block in instrumented.backbone.layers:
        linear = block.mixer.dt_proj
        spies.append(Spy(linear.weight))
        del block.mixer.dt_proj
        block.mixer.dt_proj = SimpleNamespace(weight=spies[-1], bias=linear.bias)
    with torch.no_grad(), replaced_scan(family_of(instrumented), instrumented):
        instrumented(ids, use_cache=False)
    for values, spy in zip(found, spies, strict=True):
        moment = second_moment(torch.cat(spy.met).double())
        assert moment.shape == (6, 6)
        assert close(values["dt_proj"]["gram"], moment)
        assert close(values["dt_proj"]["col_energy"], moment.diagonal())


def test_statistics_of_conv1d_are_those_of_its_operand(either_tiny_model, token_ids, monkeypatch):
    ids, met, original = token_ids(6, 24), [], F.conv1d
    found = block_statistics(either_tiny_model, ids)

    def spy(x, *args, **kwargs):
        met.append(x.detach().transpose(1, 2)[:, :24])
        return original(x, *args, **kwargs)

    monkeypatch.setattr(F, "conv1d", spy)
    monkeypatch.setenv("OPTIMUM_SSM_SCAN", "torch")  # elsewhere the convolution may be this library's own
    with torch.no_grad(), replaced_scan(family_of(either_tiny_model), either_tiny_model):
        either_tiny_model(ids, use_cache=False)
    for values, x in zip(found, met, strict=True):
        assert close(values["conv1d"]["conv_gram"], window_moment(windows(x)))


def test_sums_over_the_recurrence_are_those_of_a_loop_that_keeps_every_state(either_tiny_model, token_ids):
    ids = token_ids(5, 24)
    for values, seen in zip(block_statistics(either_tiny_model, ids), trace(either_tiny_model, ids)[0], strict=True):
        decay, before, after, readout = (seen[name] for name in ("decay", "before", "after", "readout"))
        if before.dim() == 4:  # Mamba: (L, B, I, N)
            wanted = {
                "decay_error": (readout * decay * before).square().sum((0, 1)),
                "state_energy": (readout * after).square().sum((0, 1)),
                "state_prev_total": before.square().sum((0, 1)),
                "state_prev": before.square().sum(1),
                "decay_sum": decay.sum(1),
            }
        else:  # Mamba-2: (L, B, H, P, N)
            wanted = {
                "decay_error": (readout * decay * before).square().sum((0, 1, 3, 4)),
                "state_energy": (readout * after).square().sum((0, 1, 3)),
            }
        for name, value in wanted.items():
            torch.testing.assert_close(
                values["A_log"][name].double(), value, rtol=1e-5, atol=1e-7 * float(value.max())
            )


def test_the_order_and_the_batches_of_the_samples_do_not_matter(either_tiny_model, token_ids):
    ids = token_ids(6, 24)
    forward = block_statistics(either_tiny_model, ids, batch_size=1)
    shuffled = block_statistics(either_tiny_model, ids[torch.randperm(6)], batch_size=4)
    for one, other in zip(forward, shuffled, strict=True):
        for weight, values in one.items():
            for name, value in values.items():
                tolerance = 1e-5 * float(value.abs().max())
                torch.testing.assert_close(other[weight][name], value, rtol=1e-5, atol=tolerance)


def test_the_reference_forward_is_the_model(either_tiny_model, token_ids):
    """The truth of these tests is itself held against the library that users run."""
    ids = token_ids(3, 24)
    with torch.no_grad():
        logits = either_tiny_model(ids, use_cache=False).logits
    torch.testing.assert_close(trace(either_tiny_model, ids)[1].float(), logits, rtol=1e-4, atol=1e-4)


def test_a_channel_that_fires_at_the_end_alone_is_dead_for_earlier_taps():
    """To the bit: what never met a tap leaves no rounding behind, which would count as an input."""
    x = torch.zeros(2, 50, 3)
    x[:, -2:, 0], x[..., 1] = torch.randn(2, 2), torch.randn(2, 50)
    statistic = site_statistic("conv_gram", 4)
    statistic.update(x)
    gram = statistic.value()
    assert not gram[0, :2].any() and gram[0, 2, 2] > 0 and gram[0, 3, 3] > gram[0, 2, 2]
    assert not gram[2].any()
