# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import pytest

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import family_of
from optimum_ssm.families.matching import declared_targets, select_targets


DEFAULT = ("in_proj", "out_proj")


@pytest.fixture
def select(tiny_mamba):
    """`select(targets, exclude)` on a Mamba of two blocks; gives labels without the common stem."""

    def names(targets, exclude=(), default=DEFAULT):
        declared = declared_targets(family_of(tiny_mamba), tiny_mamba)
        found = select_targets(declared, targets, list(exclude), default)
        return [target.label.removeprefix("backbone.layers.").replace("mixer.", "") for target in found]

    return names


@pytest.fixture
def select2(tiny_mamba2):
    def names(targets, exclude=()):
        declared = declared_targets(family_of(tiny_mamba2), tiny_mamba2)
        return [f"{t.block}.{t.name}" for t in select_targets(declared, targets, list(exclude), DEFAULT)]

    return names


def test_all_declared_weights_come_block_by_block_in_the_order_of_the_computation(tiny_mamba):
    declared = declared_targets(family_of(tiny_mamba), tiny_mamba)
    order = ["in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj"]
    assert [(target.block, target.name) for target in declared] == [(b, name) for b in range(2) for name in order]
    for target in declared:
        assert tiny_mamba.get_parameter(target.parameter) is not None


def test_without_targets_the_methods_own_are_taken(select):
    assert select(None) == ["0.in_proj", "0.out_proj", "1.in_proj", "1.out_proj"]


def test_defaults_that_the_model_lacks_are_passed_over(select2):
    assert select2(None) == ["0.in_proj", "0.out_proj", "1.in_proj", "1.out_proj"]


def test_defaults_that_the_model_lacks_altogether_leave_nothing(select):
    with pytest.raises(ConfigurationError, match="leave no weight to prune"):
        select(None, default=("gate_proj",))


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["x_proj"], ["0.x_proj", "1.x_proj"]),
        (["backbone.layers.1.mixer.x_proj"], ["1.x_proj"]),
        (["backbone.layers.1.mixer.x_proj.weight"], ["1.x_proj"]),
        (["backbone.layers.0.mixer.A_log"], ["0.A_log"]),
        (["*_proj"], [f"{b}.{n}" for b in (0, 1) for n in ("in_proj", "x_proj", "dt_proj", "out_proj")]),
        (["*.layers.0.*"], [f"0.{n}" for n in ("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj")]),
        (["?_proj"], ["0.x_proj", "1.x_proj"]),
        (["[xd]*_proj"], ["0.x_proj", "0.dt_proj", "1.x_proj", "1.dt_proj"]),
        (["re:(in|out)_proj"], ["0.in_proj", "0.out_proj", "1.in_proj", "1.out_proj"]),
        ([r"re:.*layers\.1\.mixer\.(A_log|conv1d)"], ["1.conv1d", "1.A_log"]),
        (["re:.*proj.weight"], [f"{b}.{n}" for b in (0, 1) for n in ("in_proj", "x_proj", "dt_proj", "out_proj")]),
        (["out_proj", "in_proj"], ["0.in_proj", "0.out_proj", "1.in_proj", "1.out_proj"]),  # in model order
        (["in_proj", "in_proj", "*in_proj"], ["0.in_proj", "1.in_proj"]),  # once
        (["x_proj.B"], ["0.x_proj.B", "1.x_proj.B"]),
        (["x_proj.[BC]"], ["0.x_proj.B", "0.x_proj.C", "1.x_proj.B", "1.x_proj.C"]),
        (["x_proj.C", "x_proj.dt"], ["0.x_proj.dt", "0.x_proj.C", "1.x_proj.dt", "1.x_proj.C"]),
        (["backbone.layers.0.mixer.in_proj.z"], ["0.in_proj.z"]),
        ([r"re:in_proj\.(x|z)"], ["0.in_proj.x", "0.in_proj.z", "1.in_proj.x", "1.in_proj.z"]),
        (["in_proj.z", "x_proj"], ["0.in_proj.z", "0.x_proj", "1.in_proj.z", "1.x_proj"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_names_globs_and_regular_expressions_select(select, targets, expected):
    assert select(targets) == expected


def test_a_regular_expression_must_fit_the_whole_name(select):
    with pytest.raises(ConfigurationError, match="unknown target 're:proj'"):
        select(["re:proj"])


def test_names_are_case_sensitive(select):
    with pytest.raises(ConfigurationError, match="unknown target 'a_log'. Did you mean 'A_log'"):
        select(["a_log"])


@pytest.mark.parametrize(
    "exclude, expected",
    [
        (["out_proj"], ["0.in_proj", "1.in_proj"]),
        (["*.layers.0.*"], ["1.in_proj", "1.out_proj"]),
        (["re:.*1.mixer.in_proj"], ["0.in_proj", "0.out_proj", "1.out_proj"]),
        (["x_proj"], ["0.in_proj", "0.out_proj", "1.in_proj", "1.out_proj"]),  # was not selected anyway
        (["in_proj.z"], ["0.in_proj.x", "0.out_proj", "1.in_proj.x", "1.out_proj"]),  # the other segment stays
        (["backbone.layers.0.mixer.in_proj.z"], ["0.in_proj.x", "0.out_proj", "1.in_proj", "1.out_proj"]),
        (["in_proj.z", "in_proj.x"], ["0.out_proj", "1.out_proj"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_exclude_leaves_weights_and_segments_out(select, exclude, expected):
    assert select(None, exclude) == expected


def test_excluding_a_whole_weight_excludes_its_segments(select):
    assert select(["in_proj.z", "out_proj"], ["in_proj"]) == ["0.out_proj", "1.out_proj"]


def test_excluding_a_segment_of_a_segment_selection_leaves_the_others(select2):
    assert select2(["in_proj.[BC]"], ["in_proj.B"]) == ["0.in_proj.C", "1.in_proj.C"]
    found = select2(["in_proj"], ["in_proj.B", "in_proj.C"])
    assert found == [f"{b}.in_proj.{s}" for b in (0, 1) for s in ("z", "x", "dt")]


@pytest.mark.parametrize("targets, exclude", [([], []), (["in_proj"], ["*in_proj"]), (["in_proj.x"], ["in_proj.x"])])
def test_a_selection_that_leaves_nothing_is_refused(select, targets, exclude):
    with pytest.raises(ConfigurationError, match="leave no weight to prune") as caught:
        select(targets, exclude)
    assert str(targets) in str(caught.value) and str(exclude) in str(caught.value)


@pytest.mark.parametrize("targets", [["in_proj", "in_proj.x"], ["in_proj.x", "*in_proj"]])
def test_a_weight_both_whole_and_by_segment_is_refused(select, targets):
    with pytest.raises(
        ConfigurationError, match="layers.0.mixer.in_proj.weight both whole and by its segment in_proj.x"
    ):
        select(targets)


@pytest.mark.parametrize(
    "name, meant",
    [("inproj", "in_proj"), ("x_proj.b", "x_proj.B"), ("Alog", "A_log"), ("out_porj", "out_proj")],
)
@pytest.mark.parametrize("field", ["target", "exclude"])
def test_a_name_that_matches_nothing_is_refused_with_the_nearest_and_all(select, field, name, meant):
    with pytest.raises(ConfigurationError) as caught:
        select([name]) if field == "target" else select(None, [name])
    message = str(caught.value)
    assert message.startswith(f"unknown {field} {name!r}. Did you mean {meant!r}? Allowed: in_proj, conv1d, x_proj")
    assert "x_proj.B" in message and message.endswith("also globs, qualified names and 're:…'")


@pytest.mark.parametrize("name", ["norm", "lm_head", "D", "embeddings", "dt_bias", "*.norm.weight", "re:.*bias"])
def test_what_the_family_does_not_declare_cannot_be_named(select, name):
    with pytest.raises(ConfigurationError, match="unknown target"):
        select([name])


def test_a_broken_regular_expression_is_refused(select):
    with pytest.raises(ConfigurationError, match=r"'re:\(' is not a regular expression: .*position 0"):
        select(["re:("])


def test_a_target_knows_its_rows_and_its_names(tiny_mamba2):
    declared = declared_targets(family_of(tiny_mamba2), tiny_mamba2)
    (target,) = select_targets(declared, ["backbone.layers.1.mixer.in_proj.B"], [], DEFAULT)
    assert (target.name, target.segment, target.block) == ("in_proj.B", "B", 1)
    assert target.parameter == "backbone.layers.1.mixer.in_proj.weight"
    assert target.rows == slice(128, 144)
    assert declared[0].rows == slice(None)


def test_an_exclude_that_reaches_no_target_is_warned_about(select, caplog):
    select(["in_proj"], ["A_log", "in_proj.z"])
    assert [r.getMessage() for r in caplog.records] == [
        "exclude 'A_log' changes nothing: no weight that it names is among the targets"
    ]
