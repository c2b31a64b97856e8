# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Schedules: end points, monotone between them, clamped outside."""

import itertools

import pytest

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.sparsity.schedule import SHAPES, SparsitySchedule


@pytest.mark.parametrize("shape", SHAPES)
def test_rises_from_the_initial_to_exactly_the_final_sparsity_and_is_clamped_outside(shape):
    schedule = SparsitySchedule(final=0.7, end_step=47, begin_step=10, initial=0.1, shape=shape)
    values = [schedule.sparsity(step) for step in range(60)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert values[:10] == [0.1] * 10
    assert values[47:] == [0.7] * 13
    assert values[10] == (0.7 if shape == "one-shot" else 0.1)


def test_cubic_and_linear_are_their_formulas():
    for shape, power in (("cubic", 3), ("linear", 1)):
        schedule = SparsitySchedule(final=0.8, end_step=30, begin_step=10, initial=0.2, shape=shape)
        for step in range(10, 30):
            expected = 0.8 + (0.2 - 0.8) * (1 - (step - 10) / (30 - 10)) ** power
            assert schedule.sparsity(step) == pytest.approx(expected, abs=1e-15)


def test_cubic_removes_most_early():
    schedule = SparsitySchedule(final=0.8, end_step=100)
    assert schedule.sparsity(50) == pytest.approx(0.8 * 7 / 8)


def test_updates_are_every_few_steps_from_the_beginning_and_at_the_end():
    schedule = SparsitySchedule(final=0.5, end_step=25, begin_step=4, update_every=10)
    assert [step for step in range(40) if schedule.updates(step)] == [4, 14, 24, 25]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"final": 1.0}, r"final=1.0 .* \[0, 1\)"),
        ({"initial": 0.6}, r"initial=0.6 .* \[0, final=0.5\]"),
        ({"initial": -0.1}, "initial=-0.1"),
        ({"end_step": 0}, "end_step=0 .* at least 1"),
        ({"begin_step": 20}, r"begin_step=20 .* \[0, end_step=20\)"),
        ({"begin_step": -1}, "begin_step=-1"),
        ({"update_every": 0}, "update_every=0 .* at least 1"),
        ({"end_step": 2.5}, "end_step=2.5 .* an integer, got float"),
        ({"final": "0.5"}, "final='0.5' .* a number, got str"),
        ({"final": True}, "final=True .* a number, got bool"),
        ({"shape": "cubik"}, "'cubik'. Did you mean 'cubic'"),
    ],
)
def test_a_contradiction_is_refused_by_name(values, message):
    with pytest.raises(ConfigurationError, match=message):
        SparsitySchedule(**{"final": 0.5, "end_step": 20, **values})
