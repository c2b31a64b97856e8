# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Scores of diagonal systems against frequency sweeps and sums over time; counts against the rule of LAST as it is written."""

import copy

import pytest
import torch

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.models.s5 import S5Layer
from optimum_ssm.surgery.diagonal import modes
from optimum_ssm.surgery.diagonal_scores import (
    ALLOCATIONS,
    h2_energy,
    hinf_energy,
    kept_counts,
    kept_units,
    output_gain,
)

from .diagonal_models import found, make, slow_counts


def positive(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp().pow(6)


def test_hinf_energy_is_the_peak_of_the_response():
    """sup over ω of σ_max(C_i (e^{iω} - λ̄_i)⁻¹ B̄_i)² on a dense grid."""
    torch.manual_seed(0)
    layer = S5Layer(6, 16, 2, bidirectional=False)
    with torch.no_grad():
        layer.log_step += 2
    decay, gain = modes(layer)
    layer.requires_grad_(False)
    (C,), B = layer.output_maps(torch.float64), layer.discrete(torch.float64)[1]
    omega = torch.linspace(-torch.pi, torch.pi, 200_001, dtype=torch.float64)
    for i, energy in enumerate(hinf_energy(decay, gain)):
        response = 1 / (torch.polar(torch.ones_like(omega), omega) - decay[i]).abs()
        product = torch.outer(C[:, i], B[i])
        peak = float((torch.linalg.matrix_norm(product, 2) * response.max()) ** 2)
        assert energy.item() == pytest.approx(peak, rel=1e-3)


@pytest.mark.parametrize("variant", ["s5 one direction", "s4d"])
def test_h2_energy_is_the_energy_of_the_impulse_response(variant):
    layer = found(make(variant))[0]
    with torch.no_grad():
        (layer.log_dt if variant == "s4d" else layer.log_step).add_(2)
    decay, gain = modes(layer)
    B = layer.discrete(torch.float64)[1]
    times = torch.arange(4000, dtype=torch.float64)
    series = decay.abs()[..., None] ** times
    if variant == "s4d":
        by_time = (layer.output_map(torch.float64) * B).abs()[..., None] * series
    else:
        (C,) = layer.output_maps(torch.float64)
        product = torch.einsum("hp,pg->phg", C, B).flatten(1)
        by_time = torch.linalg.vector_norm(product, dim=1)[:, None] * series
    torch.testing.assert_close(h2_energy(decay, gain), by_time.square().sum(-1), rtol=1e-6, atol=0)


def test_s4d_scores_are_the_published_closed_form():
    layer = found(make("s4d"))[0].double()
    A = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
    step, C = layer.log_dt.exp()[:, None], torch.complex(*layer.C.unbind(-1))
    closed = C.abs() ** 2 * (((A * step).exp() - 1) / A).abs() ** 2 / (1 - (A * step).exp().abs()) ** 2
    torch.testing.assert_close(hinf_energy(*modes(layer)), closed.detach())


def test_forms_of_two_directions():
    one, two = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0])
    assert output_gain([one, two], "mean").tolist() == [4, 6.25]
    assert output_gain([one, two], "energy").tolist() == [10, 17]
    assert output_gain([one, two], "reference").tolist() == [1, 1.25]  # (‖C1‖ + ‖C2‖) / 4, C to the first power
    assert output_gain([one]).tolist() == [9, 1]
    with pytest.raises(ConfigurationError, match="allowed: mean, energy, reference"):
        output_gain([one, two], "sum")


def test_the_reference_form_of_a_layer():
    layer = found(make())[0].double()
    decay, B = layer.discrete()
    C1, C2 = (torch.complex(*C.unbind(-1)) for C in (layer.C1, layer.C2))
    half = (C1.abs().square().sum(0).sqrt() + C2.abs().square().sum(0).sqrt()) / 4
    released = half * B.abs().square().sum(1) / ((1 - decay.abs()) ** 2 + 1e-8)
    torch.testing.assert_close(hinf_energy(*modes(layer, "reference"), reference=True), released.detach())


def test_the_time_steps_of_inference_count():
    one, two = (S5Layer(6, 16, 2, step_rescale=scale) for scale in (1.0, 2.0))
    two.load_state_dict(one.state_dict())
    rescaled = copy.deepcopy(one).double()
    with torch.no_grad():
        rescaled.log_step += torch.log(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(modes(two)[0], modes(rescaled)[0])
    assert not torch.allclose(modes(two)[0], modes(one)[0])


@pytest.mark.parametrize("ratio", [0, 0.1, 1 / 3, 0.5, 0.7, 0.9])
def test_last_is_the_rule_as_it_is_written(ratio):
    scores = [positive(n, seed) * 10.0**seed for seed, n in enumerate((9, 5, 14))]
    keep = 28 - int(28 * ratio + 0.5)
    assert kept_counts(scores, ratio, "last") == slow_counts(scores, keep)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("ratio", [0, 0.1, 1 / 3, 0.5, 0.7, 0.9, 1])
def test_counts_are_exact_and_no_layer_is_emptied(allocation, ratio):
    for scores in ([positive(n, n) for n in (8, 3, 16)], [torch.ones(n) for n in (8, 3, 16)]):
        counts = kept_counts(scores, ratio, allocation)
        assert sum(counts) == max(3, 27 - int(27 * ratio + 0.5))
        assert all(1 <= count <= n for count, n in zip(counts, (8, 3, 16)))


def test_last_ignores_the_scale_of_a_layer_and_global_does_not():
    scores = [positive(12, 0), positive(12, 1)]
    scaled = [scores[0] * 1e6, scores[1]]
    assert kept_counts(scaled, 0.5, "last") == kept_counts(scores, 0.5, "last")
    assert kept_counts(scaled, 0.5, "global") == [11, 1] != kept_counts(scores, 0.5, "global")
    assert kept_counts(scores, 0.5, "uniform") == [6, 6]


def test_a_concentrated_layer_loses_more_than_an_even_one():
    """s_(k) of equal energies is 1/k; of energies that fall by ten it is about 1/10^k."""
    even, falling = torch.ones(10), 10.0 ** -torch.arange(10)
    assert kept_counts([even, falling], 0.5, "last") == [9, 1]


def test_the_released_code_keeps_the_floor():
    scores = [torch.arange(1.0, 65)]
    assert kept_counts(scores, 0.1, "last") == [58] and kept_counts(scores, 0.1, "last", reference=True) == [57]
    assert kept_counts([torch.ones(10)], 0.9, "last", reference=True) == [1]


def test_infinite_scores_stay_out_of_the_sums():
    stable = positive(8, 1)
    scores = [positive(8, 0), torch.cat([stable, torch.tensor([torch.inf, torch.inf])])]
    counts = kept_counts(scores, 0.5, "last")
    assert sum(counts) == 9
    assert counts == [n + extra for n, extra in zip(slow_counts([scores[0], stable], 7), (0, 2))]
    for allocation in ALLOCATIONS:
        assert kept_counts(scores, 1, allocation) == [1, 2]


@pytest.mark.parametrize("ratio, allocation", [(1.1, "last"), (-0.1, "last"), (0.5, "owl")])
def test_what_is_not_allowed_is_refused(ratio, allocation):
    with pytest.raises(ConfigurationError, match="must be from 0 to 1|allowed: last, uniform, global"):
        kept_counts([positive(4)], ratio, allocation)


def test_kept_units_are_the_best_in_ascending_order():
    assert kept_units(torch.tensor([3.0, 1, 5, 5, 2]), 3).tolist() == [0, 2, 3]
    assert kept_units(torch.tensor([[1.0, 2, 3], [3, 2, 1]]), 2).tolist() == [[1, 2], [0, 1]]
    assert kept_units(torch.ones(4), 2).tolist() == [0, 1]
