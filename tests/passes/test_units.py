# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A structured pass in the block loop: what it collects, when, and what it leaves of a block."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ssm import CalibrationError, ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.families import family_of
from optimum_ssm.methods.structures.state_energy import StateEnergy
from optimum_ssm.passes.plan import make_plan
from optimum_ssm.passes.unit_plan import UnitPlan

from ..conftest import tiny_model
from ..structured import exact, largest, logits, prune, scores_of


def plan_of(model, **values):
    values = {"sparsity": 0.5, "pattern": "structured", "multiple_of": 1, **values}
    return make_plan(model, family_of(model), SSMPrunerConfig(**values))


# ------------------------------------------------------------------ the plan


def test_axes_and_multiples_are_those_of_the_family_where_none_is_named():
    mamba, mamba2 = tiny_model("mamba", state_size=16), tiny_model("mamba2", state_size=32)
    for model, method, axis, multiple in (
        (mamba, "state_energy", "state", 1), (mamba2, "state_energy", "state", 16), (mamba, "flap", "channel", 8),
        (mamba2, "flap", "head", 4), (mamba2, "minitron", "head", 4),
    ):  # fmt: skip
        plan = plan_of(model, method=method, multiple_of=None, sparsity=0.0)
        assert isinstance(plan, UnitPlan) and (plan.axis, plan.multiple) == (axis, multiple)


def test_default_heads_keep_the_kernels_alignment():
    """Rows of in_proj and channels of conv1d come in multiples of 8 for every number of heads that can be kept."""
    for heads, width, groups, states in ((8, 8, 2, 8), (24, 64, 1, 128), (16, 4, 2, 4), (12, 8, 2, 16)):
        model = tiny_model("mamba2", num_hidden_layers=1, num_heads=heads, head_dim=width, n_groups=groups,
                           state_size=states, expand=heads * width // 32)  # fmt: skip
        axis = family_of(model).axes(model.base_model.layers[0])["head"]
        for kept in range(axis.multiple, axis.group_size + 1, axis.multiple):
            h, bc = kept * axis.groups, groups * states
            assert (2 * h * width + 2 * bc + h) % 8 == 0 and (h * width + 2 * bc) % 8 == 0


@pytest.mark.parametrize(
    "values, needs",
    [
        ({"method": "magnitude", "axis": "state"}, False), ({"method": "random"}, False), ({"method": "state_energy"}, True),
        ({"method": "random", "compensation": "bias"}, True), ({"method": "random", "norm_rescale": "energy"}, False),
        ({"method": "random", "reconstruction_epochs": 1}, True), ({"method": "taylor"}, True),
    ],
)  # fmt: skip
def test_text_is_asked_for_only_where_it_is_read(values, needs):
    assert plan_of(tiny_model("mamba"), **values).needs_text == needs


def test_energy_needs_text_where_there_is_a_norm():
    assert plan_of(tiny_model("mamba2"), method="random", axis="head", norm_rescale="energy").needs_text
    assert not plan_of(tiny_model("mamba2"), method="random", axis="state", norm_rescale="energy").needs_text


def test_gradients_are_taken_of_what_the_axis_owns():
    plan = plan_of(tiny_model("mamba"), method="taylor", axis="state")
    names = [f"backbone.layers.{i}.mixer.x_proj.weight" for i in range(2)]
    assert plan.gradient_parameters == dict.fromkeys(names, ("fisher",))


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"method": "magnitude", "axis": "head"},
            "Mamba has no axis 'head'; it has: state, channel, dt_rank. .* scores: ",
        ),
        ({"method": "random", "axis": "state", "sparsity": 0.99}, "leaves none of 8 units"),
        ({"method": "random", "axis": "state", "multiple_of": 16}, "multiple_of=16 leaves nothing to remove"),
        ({"method": "random", "axis": "state", "reconstruction_kwargs": {"lr": 0.1}}, "without reconstruction"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(values, message):
    model = tiny_model("mamba")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        prune(model, None, **values)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_multiples_that_stop_a_uniform_size_do_not_stop_blocks_of_their_own_sizes(token_ids):
    """A quarter of 8 states in multiples of 4: no block can keep 6, but one can keep 4 and the other 8."""
    with pytest.raises(ConfigurationError, match="leaves nothing to remove"):
        prune(tiny_model("mamba"), token_ids(), method="state_energy", sparsity=0.25, multiple_of=4)
    pruner = prune(tiny_model("mamba"), token_ids(), method="state_energy", sparsity=0.25, multiple_of=4,
                   uniform_sizes=False, allocation="last")  # fmt: skip
    assert sorted(pruner.report.passes[0].units["kept"]) == [4, 8]


def warnings_of(caplog):
    return " ".join(record.message for record in caplog.records)


def test_what_stock_classes_cannot_load_is_said_before(token_ids, caplog):
    prune(tiny_model("mamba2"), None, method="random", axis="head", sparsity=0.25)
    assert "after `import optimum_ssm` only" in warnings_of(caplog) and "cannot build blocks of" in warnings_of(caplog)
    caplog.clear()
    prune(tiny_model("mamba2"), None, method="random", axis="head", sparsity=0.5)
    assert "import optimum_ssm" not in warnings_of(caplog)
    prune(tiny_model("mamba"), token_ids(), method="state_energy", uniform_sizes=False)
    assert "if its blocks come out in different sizes" in warnings_of(caplog)


def test_a_share_that_multiples_cannot_meet_is_said(caplog):
    prune(tiny_model("mamba"), None, method="random", axis="channel", sparsity=0.6, multiple_of=32)
    assert "50.00% of the units go, not 60.00%: kept units come in multiples of 32" in warnings_of(caplog)


def test_settings_that_change_nothing_are_said(token_ids, caplog):
    prune(tiny_model("mamba"), None, method="random", axis="state", norm_rescale="none")
    assert "norm_rescale='none' changes nothing: no norm averages over what goes with axis 'state'" in warnings_of(
        caplog
    )
    caplog.clear()
    apart = {"method": "flap", "axis": "channel", "uniform_sizes": False}
    pruner = prune(tiny_model("mamba"), token_ids(), apart)
    assert len(set(pruner.report.passes[0].units["kept"])) == 2
    pruner.prune({"method": "random", "axis": "channel", "sparsity": 0.1, "multiple_of": 1})
    assert "axis 'channel' differs in size between blocks already: each of them loses the same share" in warnings_of(
        caplog
    )


def test_a_model_without_weights_is_refused_by_name():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("mamba").config)
    with pytest.raises(
        ConfigurationError, match="layers.0.mixer.x_proj.weight is offloaded, and no hook of accelerate"
    ):
        prune(model, None, method="magnitude", axis="state")


@pytest.mark.parametrize("method, values", [("state_energy", {}), ("flap", {"norm_rescale": "energy"}),
                                            ("energy", {"compensation": "least_squares"})])  # fmt: skip
def test_offloaded_blocks_are_cut_like_others(method, values, token_ids, tmp_path):
    ids, model = token_ids(), tiny_model("mamba2")
    model.save_pretrained(tmp_path / "dense")
    places = {"backbone.layers.1": "disk"} | dict.fromkeys(
        ("backbone.embeddings", "lm_head", "backbone.layers.0", "backbone.norm_f"), "cpu"
    )
    pruner = SSMPruner.from_pretrained(tmp_path / "dense", device_map=places, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in pruner.model.parameters())
    pruner.prune(
        {"method": method, "sparsity": 0.5, "multiple_of": 1, "dataset": ids, "seq_len": 24, "batch_size": 2, **values}
    )
    wanted = prune(model, ids, method=method, **values)
    assert pruner.report.passes[0].units == wanted.report.passes[0].units
    assert torch.equal(logits(pruner.model, ids), logits(wanted.model, ids))


# ------------------------------------------------------------------ the pass


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_later_blocks_are_scored_on_what_the_pruned_ones_give(model_type, token_ids):
    ids, model = token_ids(), tiny_model(model_type)
    dense = scores_of(model, "state_energy", "state", ids, batch_size=2)
    seen = []

    def watching(units, scores=StateEnergy.scores):
        seen.append(scores(StateEnergy(), units))
        return seen[-1]

    for sequential in (True, False):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateEnergy, "scores", lambda self, units: watching(units))
            pruned = prune(copy.deepcopy(model), ids, method="state_energy", sequential=sequential).model
        assert torch.equal(seen[0], dense[0])
        assert torch.equal(seen[1], dense[1]) != sequential
    assert logits(pruned, ids).isfinite().all()


def test_a_pruned_model_is_what_the_masked_one_would_be(token_ids):
    """Through the whole loop: the removed units of the report, muted in the dense model, give the same logits."""
    ids, model = token_ids(2, 12), tiny_model("mamba2")
    pruner = prune(copy.deepcopy(model), ids, method="state_energy", seq_len=12)
    from optimum_ssm.surgery.cut import zero_masks

    for (_, block), gone in zip(family_of(model).blocks(model), pruner.report.passes[0].units["removed"]):
        axis = family_of(model).axes(block)["state"]
        removed = torch.zeros(axis.units, dtype=torch.bool)
        removed[gone] = True
        zero_masks(block, axis, removed)
    assert largest(exact(pruner.model, ids), exact(model, ids)) < 1e-12


def test_batches_do_not_matter(token_ids):
    ids = token_ids(5)
    for method, axis in (("state_energy", "state"), ("flap", "head"), ("minitron", "head_dim"), ("last", "state")):
        one = scores_of(tiny_model("mamba2"), method, axis, ids, batch_size=1)
        for a, b in zip(one, scores_of(tiny_model("mamba2"), method, axis, ids, batch_size=4)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_a_wide_model_is_scored_as_a_narrow_one(model_type, token_ids):
    """bfloat16 weights are read as float32; what is cut keeps its dtype."""
    model, ids = tiny_model(model_type).to(torch.bfloat16), token_ids()
    wide = copy.deepcopy(model).float()
    for method in ("magnitude", "taylor"):
        narrow = scores_of(model, method, "state", ids)
        for a, b in zip(narrow, scores_of(wide, method, "state", ids)):
            torch.testing.assert_close(a, b, rtol=1e-6 if method == "magnitude" else 0.3, atol=0)
    pruned = prune(model, ids, method="state_energy", compensation="bias").model
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert logits(pruned, ids).isfinite().all()


def test_weights_that_are_not_finite_are_named(token_ids):
    model = tiny_model("mamba")
    model.base_model.layers[1].mixer.x_proj.weight.data[8, 0] = float("nan")
    with pytest.raises(CalibrationError, match="backbone.layers.1.mixer.x_proj.weight: the weight holds non-finite"):
        prune(model, None, method="magnitude", axis="state")


def test_scores_that_are_not_finite_are_named(monkeypatch, token_ids):
    monkeypatch.setattr(StateEnergy, "scores", lambda self, units: torch.full((units.count,), torch.nan))
    with pytest.raises(CalibrationError, match="backbone.layers.0, axis state: scores are not finite"):
        prune(tiny_model("mamba"), token_ids(), method="state_energy")
