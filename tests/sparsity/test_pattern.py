# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import pytest

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.sparsity.pattern import Pattern


@pytest.mark.parametrize("text, keep, group", [("1:4", 1, 4), ("2:4", 2, 4), ("4:8", 4, 8), ("3:5", 3, 5)])
def test_n_m_names_what_is_kept_and_of_how_many(text, keep, group):
    pattern = Pattern.parse(text)
    assert (pattern.keep, pattern.group) == (keep, group)
    assert pattern.is_n_m
    assert pattern.sparsity == pytest.approx(1 - keep / group)


def test_unstructured_leaves_the_share_to_the_config():
    pattern = Pattern.parse("unstructured")
    assert not pattern.is_n_m
    assert pattern.sparsity == 0
    assert all(pattern.fits(columns) for columns in (1, 7, 10))


@pytest.mark.parametrize("text", ["", "2", "2:", "2/4", "-1:4", "two:four", "2:4 ", "structural", "2:4:8"])
def test_other_texts_are_refused_with_the_allowed_spellings(text):
    with pytest.raises(ConfigurationError) as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)
    assert "'unstructured', 'structured' or 'N:M'" in str(caught.value)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_n_must_lie_strictly_between_0_and_m(text):
    with pytest.raises(ConfigurationError, match="0 < N < M"):
        Pattern.parse(text)


def test_a_row_fits_when_it_splits_into_whole_groups():
    assert Pattern.parse("2:4").fits(12)
    assert not Pattern.parse("2:4").fits(10)
    assert not Pattern.parse("4:8").fits(12)
