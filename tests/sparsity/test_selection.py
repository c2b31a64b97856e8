# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Budgets are exact to the entry, whatever the scores (oracles 19, 20, 21 of the selection itself)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimum_ssm.sparsity.pattern import Pattern
from optimum_ssm.sparsity.selection import (
    Selection,
    _lowest_by_selecting,
    _lowest_by_sorting,
    _lowest_by_threshold,
    lowest,
    lowest_of_each,
    round_half_up,
    split_evenly,
)


SHARES = (0, 0.1, 1 / 3, 0.5, 0.7, 0.999)
SHAPES = [(7, 11), (1, 10), (10, 1), (64, 8), (3, 128)]


def brute_force(scores, count):
    """The `count` lowest of a list of (score, position), by a full sort."""
    order = sorted(range(scores.numel()), key=lambda i: (float(scores.reshape(-1)[i]), i))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(scores.shape)


@pytest.fixture(params=["distinct", "all equal", "few levels", "signed zeros", "infinite"])
def scores_of(request):
    def draw(shape):
        if request.param == "distinct":
            return torch.randn(shape)
        if request.param == "all equal":
            return torch.full(shape, 0.25)
        if request.param == "few levels":
            return torch.randint(0, 3, shape).float()
        if request.param == "signed zeros":
            return torch.where(torch.rand(shape) < 0.5, 0.0, -0.0)
        return torch.where(torch.rand(shape) < 0.3, math.inf, torch.randn(shape))

    return draw


def test_halves_are_rounded_up_where_python_rounds_to_even():
    assert [round_half_up(value) for value in (0.5, 1.5, 2.5, 2.4999, 0.0)] == [1, 2, 3, 2, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", SHARES)
def test_tensor_scope_removes_exactly_the_lowest(shape, share, scores_of):
    scores = scores_of(shape)
    count = math.floor(share * scores.numel() + 0.5)
    mask = Selection(count, "tensor").mask(scores)
    assert int(mask.sum()) == count
    assert torch.equal(mask, brute_force(scores, count))


@pytest.mark.parametrize("find", [_lowest_by_sorting, _lowest_by_selecting, _lowest_by_threshold])
@pytest.mark.parametrize("count", [1, 17, 76, 77])
def test_all_ways_of_finding_the_lowest_agree(find, count, scores_of):
    scores = scores_of((7, 11))
    assert torch.equal(find(scores.flatten(), count).view(7, 11), brute_force(scores, count))
    several = torch.stack([scores.flatten(), scores.flatten().flip(0)])
    wanted = torch.stack([brute_force(row, count) for row in several])
    assert torch.equal(lowest_of_each(several, count), wanted)
    assert torch.equal(find(several, count), wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", SHARES)
def test_row_scope_removes_exactly_the_total_and_rows_differ_by_at_most_one(shape, share, scores_of):
    scores = scores_of(shape)
    count = math.floor(share * scores.numel() + 0.5)
    mask = Selection(count, "row").mask(scores)
    per_row = mask.sum(1)
    assert int(per_row.sum()) == count
    assert int(per_row.max()) - int(per_row.min()) <= 1
    for row, removed, number in zip(scores, mask, per_row.tolist()):
        assert torch.equal(removed, brute_force(row, number))


def test_the_extra_entries_of_row_scope_go_to_the_rows_whose_next_score_is_lowest():
    scores = torch.tensor([[1.0, 9.0, 10.0], [2.0, 3.0, 11.0], [0.5, 4.0, 12.0]])
    removed = Selection(5, "row").mask(scores)
    assert removed.tolist() == [[True, False, False], [True, True, False], [True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 3, 9, 40, 45, 62, 81])
def test_row_scope_on_a_cpu_sorts_no_row_and_chooses_as_sorting_does(count, dtype, scores_of, monkeypatch):
    scores = scores_of((9, 9)).to(dtype)
    scores[::4, 2] = -math.inf
    base, extra = divmod(count, 9)
    order = scores.argsort(dim=1, stable=True)
    expected = torch.zeros(9, 9, dtype=torch.bool).scatter_(1, order[:, :base], True)
    if extra:
        following = scores.gather(1, order[:, base : base + 1]).squeeze(1)
        richer = following.argsort(stable=True)[:extra]
        expected[richer, order[richer, base]] = True
    sizes, original = [], torch.Tensor.argsort
    monkeypatch.setattr(torch.Tensor, "argsort", lambda x, *a, **k: sizes.append(x.dim()) or original(x, *a, **k))
    assert torch.equal(Selection(count, "row").mask(scores), expected)
    assert sizes == [1] * bool(extra), "only the rows are put in an order"


def test_equal_scores_go_in_the_order_of_the_flat_index():
    assert Selection(3, "tensor").mask(torch.ones(2, 3)).tolist() == [[True] * 3, [False] * 3]
    assert Selection(3, "row").mask(torch.ones(2, 3)).tolist() == [[True, True, False], [True, False, False]]
    assert Selection(0, pattern=Pattern.parse("1:4")).mask(torch.ones(1, 4)).tolist() == [[True] * 3 + [False]]


def test_a_vector_is_one_comparison_group_in_every_scope():
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    for scope in ("tensor", "row"):
        assert Selection(2, scope).mask(scores).tolist() == [False, True, False, True]


@pytest.mark.parametrize("text", ["1:4", "2:4", "4:8", "3:5"])
def test_every_group_of_n_m_loses_its_lowest_and_no_other(text, scores_of):
    pattern = Pattern.parse(text)
    scores = scores_of((6, 3 * pattern.group))
    mask = Selection(-1, pattern=pattern).mask(scores)  # the count is the pattern's business
    for row in range(6):
        for start in range(0, scores.shape[1], pattern.group):
            part = slice(start, start + pattern.group)
            expected = brute_force(scores[row, part], pattern.group - pattern.keep)
            assert torch.equal(mask[row, part], expected)


def test_n_m_refuses_rows_that_do_not_split_into_groups():
    with pytest.raises(ValueError, match=r"\(2, 6\).*groups of 4"):
        Selection(0, pattern=Pattern.parse("2:4")).mask(torch.ones(2, 6))
    with pytest.raises(ValueError, match="groups of 4"):
        Selection(0, pattern=Pattern.parse("2:4")).mask(torch.ones(8))


def test_nan_scores_are_refused_in_every_scope():
    scores = torch.tensor([[1.0, math.nan, 2.0, 3.0]])
    for selection in (Selection(1), Selection(1, "row"), Selection(1, pattern=Pattern.parse("2:4"))):
        with pytest.raises(ValueError, match="NaN"):
            selection.mask(scores)


@pytest.mark.parametrize("count", [-1, 7])
def test_a_count_beyond_the_tensor_is_refused(count):
    with pytest.raises(ValueError, match=f"cannot remove {count} of 6"):
        Selection(count).mask(torch.ones(2, 3))


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_masks_are_nested_in_the_budget(scope):
    scores = torch.randint(0, 20, (9, 13)).float()
    masks = [Selection(count, scope).mask(scores) for count in range(0, 118, 3)]
    for smaller, larger in zip(masks, masks[1:]):
        assert not (smaller & ~larger).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_is_selected_alike(dtype):
    scores = torch.randperm(60).reshape(6, 10)
    for scope in ("tensor", "row"):
        selection = Selection(25, scope)
        assert torch.equal(selection.mask(scores.to(dtype)), selection.mask(scores.float()))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_lowest_is_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    mask = lowest(torch.tensor(values, dtype=torch.float32), count)
    expected = np.zeros(len(values), dtype=bool)
    expected[np.argsort(np.array(values), kind="stable")[:count]] = True
    assert mask.tolist() == expected.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.data())
def test_split_evenly_sums_to_the_total_and_rounds_each_share_by_less_than_one(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    counts = split_evenly(total, sizes)
    assert sum(counts) == total
    for count, size in zip(counts, sizes):
        assert 0 <= count <= size
        assert abs(count - total * size / sum(sizes)) < 1
