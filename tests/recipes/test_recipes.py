# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The library's recipes: found by name, overridden whole, and each does on a model what its text says."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.configuration import parse_recipe
from optimum_ssm.recipes import load_recipe, recipe_names, recipe_path, recipe_text


TEXT = {"dataset": torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0)), "seq_len": 16}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_known_by_name_everywhere(name: str) -> None:
    passes = load_recipe(name)
    assert passes == parse_recipe(name) == SSMPrunerConfig.from_file(name) == parse_recipe(recipe_path(name))
    assert all(entry.sparsity == 0.5 for entry in passes)
    summary, text = recipe_text(name)
    assert summary.endswith((".", "terms.")) and "Costs: " in text and "SPDX" not in summary + text


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("budget", [{"sparsity": 0.25}, {"pattern": "2:4"}])
def test_a_budget_goes_to_every_pass(tiny_mamba: PreTrainedModel, name: str, budget: dict) -> None:
    recipe = load_recipe(name, **budget, **TEXT)
    share = budget.get("sparsity", 0.5)
    assert [(c.sparsity, c.pattern) for c in recipe] == [(share, budget.get("pattern", "unstructured"))] * len(recipe)
    report = SSMPruner(tiny_mamba).prune(recipe)
    assert report.passes[0].tokens == 64
    touched = {row.component for row in report.rows if row.pruned}
    skipped = {"dt_proj"} if "pattern" in budget else set()  # rows of 6
    mixer = {"A_log", "conv1d", "in_proj", "x_proj", "dt_proj", "out_proj"}
    assert touched == (mixer if name != "best" else mixer - {"A_log", "conv1d"}) - skipped
    rest = [row for row in report.rows if row.pruned and row.component != "A_log"]
    assert sum(row.pruned for row in rest) == share * sum(row.elements for row in rest)


def test_sparsessm_is_what_was_published(tiny_mamba: PreTrainedModel, tiny_mamba2: PreTrainedModel) -> None:
    """The same masks as the two steps by hand; zeros in A_log; refused for Mamba-2."""
    a_log, rest = load_recipe("sparsessm", **TEXT)
    by_hand = [
        SSMPrunerConfig(
            method="sparsessm",
            sparsity=0.5,
            targets=["A_log"],
            method_kwargs={"variant": "v1"},
            a_log_fill="zero",
            **TEXT,
        ),
        SSMPrunerConfig(
            method="sparsegpt",
            sparsity=0.5,
            targets=["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"],
            allocation="sensitivity",
            **TEXT,
        ),
    ]
    other = copy.deepcopy(tiny_mamba)
    SSMPruner(tiny_mamba).prune([a_log, rest])
    SSMPruner(other).prune(by_hand)
    for (name, a), b in zip(tiny_mamba.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    assert (tiny_mamba.base_model.layers[0].mixer.A_log == 0).double().mean() == 0.5
    with pytest.raises(ConfigurationError, match="state_prev"):
        SSMPruner(tiny_mamba2).prune(load_recipe("sparsessm", **TEXT))


@pytest.mark.parametrize("name", ["best", "best_mixer"])
def test_the_others_also_prune_mamba2(tiny_mamba2: PreTrainedModel, name: str) -> None:
    report = SSMPruner(tiny_mamba2).prune(load_recipe(name, **TEXT))
    assert {row.component for row in report.rows if row.pruned} >= {"in_proj", "out_proj"}


@pytest.mark.parametrize("make, message", [
    (lambda: load_recipe("bset"), "unknown recipe 'bset'. Did you mean 'best'?"),
    (lambda: load_recipe("best", targets=["A_log"]), "unknown field beside a recipe 'targets'"),
    (lambda: load_recipe("best", sparsity=1.5), "recipe .*best.yaml, pass 1: sparsity=1.5"),
    (lambda: load_recipe("./best"), "cannot be read"),
    (lambda: load_recipe("no/such.yaml"), "cannot be read"),
])  # fmt: skip
def test_what_is_no_recipe_is_refused(make, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_file_takes_the_same_overrides(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "passes:\n- {method: wanda, pattern: '2:4'}\n- {method: magnitude, sparsity: 0.1}\n"
    )
    recipe = load_recipe(tmp_path / "mine.yaml", sparsity=0.3, pattern="unstructured", seed=7)
    assert [(c.method, c.pattern, c.sparsity, c.seed) for c in recipe] == [
        ("wanda", "unstructured", 0.3, 7),
        ("magnitude", "unstructured", 0.3, 7),
    ]


def test_a_sparsity_does_not_replace_an_n_m_pattern_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("passes:\n  - {method: wanda, pattern: '2:4'}\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="sparsity=0.25 beside a recipe cannot replace pattern='2:4'"):
        load_recipe(path, sparsity=0.25)
    assert load_recipe(path, sparsity=0.25, pattern="unstructured")[0].sparsity == 0.25
