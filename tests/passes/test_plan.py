# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A pass is checked against the model before any weight is touched."""

import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.families import family_of
from optimum_ssm.passes.plan import Plan, make_plan


def plan_of(model: PreTrainedModel, **options: object) -> Plan:
    options = {"sparsity": None if "pattern" in options else 0.5, **options}
    return make_plan(model, family_of(model), SSMPrunerConfig(**options))


def names(plan: Plan) -> list[str]:
    return [task.target.label.removeprefix("backbone.layers.") for task in plan.tasks]


def test_default_targets_of_a_method_are_those_that_the_family_has(
    tiny_mamba: PreTrainedModel, tiny_mamba2: PreTrainedModel
) -> None:
    mamba = [f"{i}.mixer.{name}" for i in range(2) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    assert names(plan_of(tiny_mamba, method="wanda")) == mamba
    mamba2 = [f"{i}.mixer.{name}" for i in range(2) for name in ("in_proj", "out_proj")]
    assert names(plan_of(tiny_mamba2, method="wanda")) == mamba2, "Mamba-2 has neither x_proj nor dt_proj"


def test_tasks_know_sizes_and_statistics(tiny_mamba: PreTrainedModel) -> None:
    plan = plan_of(tiny_mamba, method="sparsessm", targets=["A_log", "in_proj", "conv1d"])
    found = [(task.target.name, task.size, task.statistics) for task in plan.tasks[:3]]
    assert found == [("in_proj", 4096, ("gram",)), ("conv1d", 256, ("conv_gram",)), ("A_log", 512, ("decay_error",))]


def test_plan_takes_the_methods_published_defaults(tiny_mamba: PreTrainedModel) -> None:
    assert plan_of(tiny_mamba, method="wanda").scope == "row"
    assert plan_of(tiny_mamba, method="magnitude").scope == "tensor"
    assert type(plan_of(tiny_mamba, method="sparsessm").allocation).__name__ == "Sensitivity"
    assert type(plan_of(tiny_mamba, method="sparsessm", pattern="2:4").allocation).__name__ == "Uniform"
    overall = plan_of(tiny_mamba, method="magnitude", scope="global")
    assert (type(overall.allocation).__name__, overall.scope) == ("Global", "tensor")


@pytest.mark.parametrize(
    "options, text, planning",
    [
        ({"method": "magnitude"}, False, False),
        ({"method": "random", "targets": ["A_log"]}, False, False),
        ({"method": "magnitude", "allocation": "global"}, False, True),
        ({"method": "magnitude", "allocation": "owl"}, True, True),
        ({"method": "wanda"}, True, False),
        ({"method": "wanda", "allocation": "global"}, True, True),
        ({"method": "sparsessm", "targets": ["A_log"], "allocation": "uniform"}, True, False),
    ],
)
def test_text_and_planning_are_asked_for_only_where_needed(
    tiny_mamba: PreTrainedModel, options: dict[str, object], text: bool, planning: bool
) -> None:
    plan = plan_of(tiny_mamba, **options)
    assert (plan.needs_text, plan.needs_planning) == (text, planning)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": ["in_prj"]}, r"unknown target 'in_prj'\. Did you mean 'in_proj'\? Allowed: .*in_proj\.x"),
        ({"targets": ["in_proj.q"]}, "unknown target 'in_proj.q'"),
        ({"targets": ["re:("]}, "'re:\\(' is not a regular expression"),
        ({"exclude": ["norm"]}, "unknown exclude 'norm'"),
        ({"targets": ["in_proj"], "exclude": ["in_proj"]}, "leave no weight to prune"),
        ({"targets": ["in_proj", "in_proj.x"]}, "both whole and by its segment in_proj.x"),
        ({"method": "wanda", "targets": ["A_log"]}, r"'wanda' cannot prune A_log .*it prunes: linear, conv.*exclude A_log"),
        ({"pattern": "2:4", "targets": ["dt_proj"]}, "'2:4' fits none of the targets: rows of 6 weights"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_named_with_what_is_allowed(
    tiny_mamba: PreTrainedModel, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        plan_of(tiny_mamba, **{"method": "magnitude", **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant, needed", [("v1", "state_prev"), ("v2", "state_prev"), ("l2", "state_prev_total")])
def test_mamba2_has_only_what_its_recurrence_gives(tiny_mamba2: PreTrainedModel, variant: str, needed: str) -> None:
    with pytest.raises(ConfigurationError, match=f"needs '{needed}', which the mamba2 recurrence does not give"):
        plan_of(tiny_mamba2, method="sparsessm", targets=["A_log"], method_kwargs={"variant": variant})


def test_offloaded_weights_are_refused_by_name(tiny_mamba: PreTrainedModel) -> None:
    block = tiny_mamba.base_model.layers[1].mixer
    block.in_proj.weight = torch.nn.Parameter(block.in_proj.weight.to("meta"))
    with pytest.raises(ConfigurationError, match=r"backbone\.layers\.1\.mixer\.in_proj\.weight is offloaded"):
        plan_of(tiny_mamba, method="magnitude", targets=["in_proj"])
    plan_of(tiny_mamba, method="magnitude", targets=["out_proj"])


def test_every_pass_of_a_recipe_is_checked_before_the_first_one_starts(
    make_tiny_model: Callable[..., PreTrainedModel],
) -> None:
    model, untouched = make_tiny_model("mamba"), make_tiny_model("mamba")
    good = SSMPrunerConfig(method="magnitude", sparsity=0.5)
    bad = SSMPrunerConfig(method="magnitude", sparsity=0.5, targets=["attention"])
    pruner = SSMPruner(model, pruning_config=[good, bad])
    with pytest.raises(ConfigurationError, match="unknown target 'attention'"):
        pruner.prune()
    assert pruner.report.pruned == 0 and not pruner.masks
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, untouched.get_parameter(name))


def test_n_m_leaves_what_it_does_not_fit_with_the_reason(tiny_mamba: PreTrainedModel) -> None:
    plan = plan_of(tiny_mamba, method="magnitude", pattern="2:4", targets=["in_proj", "dt_proj", "conv1d"])
    assert names(plan) == [f"{i}.mixer.{name}" for i in range(2) for name in ("in_proj", "conv1d")]
    reason = "rows of 6 weights do not split into groups of 4"
    assert plan.unfit == {f"backbone.layers.{i}.mixer.dt_proj": reason for i in range(2)}


def test_n_m_on_one_number_per_head_is_kept_with_the_reason(tiny_mamba2: PreTrainedModel) -> None:
    plan = plan_of(tiny_mamba2, method="magnitude", pattern="2:4", targets=["in_proj", "A_log"])
    assert set(plan.unfit.values()) == {"one number per head has no groups of 4"} and len(plan.tasks) == 2


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What optimum_ssm warned about so far."""
    caplog.set_level("WARNING")
    return lambda: "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("optimum_ssm"))


@pytest.mark.parametrize(
    "options, warned",
    [
        ({"method": "magnitude"}, True),
        ({"method": "magnitude", "a_log_fill": "zero"}, False),
        ({"method": "magnitude", "method_kwargs": {"largest": True}}, False),
        ({"method": "magnitude", "method_kwargs": {"largest": True}, "a_log_fill": "zero"}, True),
        ({"method": "sparsessm"}, False),
        ({"method": "sparsessm", "a_log_fill": "zero"}, True),
        ({"method": "sparsessm", "method_kwargs": {"variant": "v1"}}, True),
        ({"method": "sparsessm", "method_kwargs": {"variant": "v1"}, "a_log_fill": "zero"}, False),
        ({"method": "random", "a_log_fill": "zero"}, False),
    ],
)
def test_a_criterion_that_does_not_fit_the_fill_is_warned_about(
    tiny_mamba: PreTrainedModel, warnings: Callable[[], str], options: dict[str, object], warned: bool
) -> None:
    plan_of(tiny_mamba, targets=["A_log"], **options)
    assert bool(re.search("estimate the damage of a_log_fill=.*expect a worse model", warnings())) == warned


def test_a_pass_warns_once(tiny_mamba: PreTrainedModel, warnings: Callable[[], str]) -> None:
    SSMPruner(tiny_mamba).prune({"method": "magnitude", "sparsity": 0.5, "targets": ["A_log"]})
    assert warnings().count("expect a worse model") == 1


def test_no_fill_warning_without_a_log(tiny_mamba: PreTrainedModel, warnings: Callable[[], str]) -> None:
    plan_of(tiny_mamba, method="magnitude", targets=["in_proj"])
    assert warnings() == ""


def test_n_m_on_a_log_is_warned_to_be_no_speed_up(tiny_mamba: PreTrainedModel, warnings: Callable[[], str]) -> None:
    plan_of(tiny_mamba, method="random", pattern="2:4", targets=["A_log"])
    assert "2:4 on A_log speeds up no kernel" in warnings()


def test_reconstruction_parameters_without_reconstruction_are_refused(tiny_mamba: PreTrainedModel) -> None:
    config = SSMPrunerConfig(method="magnitude", sparsity=0.5, reconstruction_kwargs={"lr": 1e-3})
    with pytest.raises(ConfigurationError, match="reconstruction_epochs of at least 1"):
        make_plan(tiny_mamba, family_of(tiny_mamba), config)


@pytest.mark.parametrize("options, warned", [
    ({"a_log_fill": "zero"}, "a_log_fill='zero' changes nothing: A_log is not among the targets"),
    ({"memoryless_value": 20.0}, "memoryless_value=20.0 changes nothing: A_log is not among the targets"),
    ({}, ""),
])  # fmt: skip
def test_a_fill_for_nothing_is_warned_about(
    tiny_mamba: PreTrainedModel, warnings: Callable[[], str], options: dict[str, object], warned: str
) -> None:
    plan_of(tiny_mamba, method="magnitude", targets=["in_proj"], **options)
    assert warnings() == warned
