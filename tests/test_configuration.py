# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Every contradiction is refused with the field, the value and what is allowed; what is accepted survives a round trip."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml

from optimum_ssm import ConfigurationError, SSMPrunerConfig
from optimum_ssm.configuration import parse_recipe
from optimum_ssm.sparsity.allocations import ALLOCATIONS


def config(**values):
    return SSMPrunerConfig(**{"sparsity": 0.5, **values})


def test_defaults_are_the_published_calibration_and_the_librarys_own_method():
    made = config()
    assert (made.method, made.pattern, made.a_log_fill) == ("sparsessm", "unstructured", "memoryless")
    assert (made.num_samples, made.seq_len, made.seed, made.sequential) == (128, 2048, 0, True)
    assert made.memoryless_value == 38.0


def test_every_field_has_a_help_text_for_the_command_line():
    for field in dataclasses.fields(SSMPrunerConfig):
        assert field.metadata["help"], field.name


def test_mutable_defaults_are_not_shared():
    config().exclude.append("x")
    config().method_kwargs["x"] = 1
    assert config().exclude == [] and config().method_kwargs == {}


WRONG_TYPES = {
    "method": [3, None, ["wanda"]],
    "sparsity": ["0.5", True, [0.5]],
    "pattern": [24, None],
    "targets": [3, {"in_proj": 1}],
    "exclude": [3, None],
    "scope": [1, True],
    "allocation": [1],
    "a_log_fill": [0, None],
    "memoryless_value": ["38", None, True],
    "dataset_name": [1],
    "dataset_split": [["train"]],
    "text_column": [None, 0],
    "num_samples": ["128", 128.0, None, True],
    "seq_len": [2048.0, "2048"],
    "batch_size": [None, 8.0],
    "seed": [0.0, "0", None],
    "sequential": [1, "yes", None],
    "reconstruction_epochs": [1.0, "2", False],
    "axis": [1, ["state"]],
    "uniform_sizes": [1, None],
    "multiple_of": [8.0, "8", True],
    "compensation": [True, ["bias"]],
    "norm_rescale": [None, 1],
    "reconstruction_kwargs": [None, [("lr", 1)], "lr=1"],
    "method_kwargs": [None, [("a", 1)], "a=1"],
    "allocation_kwargs": [None, ["a"]],
    "resume_from": [1, ["here"]],
    "offload": [1, ["cpu"], True],
    "device": [0, ["cuda"], True],
    "max_memory": ["20GiB", ["cpu"], 3],
}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in WRONG_TYPES.items() for value in values])
def test_a_value_of_the_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(ConfigurationError) as caught:
        config(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r} must be a ")
    assert message.endswith(f"got {type(value).__name__}")


def test_every_typed_field_is_in_the_list_above():
    assert WRONG_TYPES.keys() | {"dataset"} == {field.name for field in dataclasses.fields(SSMPrunerConfig)}


@pytest.mark.parametrize("field", ["targets", "exclude"])
def test_one_name_is_a_list_of_one_and_a_tuple_is_a_list(field):
    assert getattr(config(**{field: "in_proj"}), field) == ["in_proj"]
    assert getattr(config(**{field: ("in_proj", "A_log")}), field) == ["in_proj", "A_log"]


@pytest.mark.parametrize("field", ["targets", "exclude"])
def test_a_list_of_names_holds_nothing_else(field):
    with pytest.raises(ConfigurationError, match=f"{field} holds 3; every entry must be a name, a glob or 're:…'"):
        config(**{field: ["in_proj", 3]})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sparsity": -0.1}, "sparsity=-0.1 must lie in [0, 1)"),
        ({"sparsity": 1}, "sparsity=1 must lie in [0, 1)"),
        ({"sparsity": 1.5}, "sparsity=1.5 must lie in [0, 1)"),
        ({"sparsity": float("nan")}, "sparsity=nan must lie in [0, 1)"),
        ({"sparsity": None}, "sparsity must be given, in [0, 1), unless pattern is N:M such as '2:4'"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"resume_from": ""}, "resume_from='' names no directory; give one, '.' for the present one, or leave it out"),
        ({"reconstruction_epochs": -1}, "reconstruction_epochs=-1 must be at least 0"),
        (
            {"reconstruction_epochs": 1, "reconstruction_kwargs": {"lrr": 1e-4}},
            "unknown reconstruction_kwargs key 'lrr'. Did you mean 'lr'? Allowed: lr, batch_size",
        ),
        (
            {"reconstruction_kwargs": {"lr": "1e-4"}},
            "reconstruction_kwargs lr='1e-4' must be a number, got str",
        ),
        (
            {"reconstruction_kwargs": {"batch_size": 2.0}},
            "reconstruction_kwargs batch_size=2.0 must be a int, got float",
        ),
        ({"memoryless_value": 0}, "memoryless_value=0 must lie in (0, 88]: above it exp overflows"),
        ({"memoryless_value": 88.5}, "memoryless_value=88.5 must lie in (0, 88]: above it exp overflows"),
        ({"memoryless_value": float("inf")}, "memoryless_value=inf must lie in (0, 88]: above it exp overflows"),
        (
            {"dataset_split": "test"},
            "dataset_split='test' is a test split; calibrate on 'train' or 'validation'",
        ),
        ({"dataset_split": "train+test[:10%]"}, "dataset_split='train+test[:10%]' is a test split"),
        ({"dataset_split": "Test_matched"}, "dataset_split='Test_matched' is a test split"),
        ({"method": "wnada"}, "unknown method 'wnada'. Did you mean 'wanda'? Allowed: admm_grad, aire, alps, best, "),
        (
            {"allocation": "sensitivty"},
            "unknown allocation 'sensitivty'. Did you mean 'sensitivity'? Allowed: " + ", ".join(ALLOCATIONS.names()),
        ),
        ({"scope": "rows"}, "unknown scope 'rows'. Did you mean 'row'? Allowed: row, tensor, global"),
        ({"a_log_fill": "zeros"}, "unknown a_log_fill 'zeros'. Did you mean 'zero'? Allowed: memoryless, zero"),
        (
            {"pattern": "dense"},
            "unknown pattern 'dense'. Allowed: 'unstructured', 'structured' or 'N:M' such as '2:4'",
        ),
        ({"pattern": "structured", "method": "wanda"}, "unknown structured method 'wanda'. Allowed: aire, "),
        ({"method": "magnitude", "multiple_of": 8}, "multiple_of=8 goes with pattern='structured' only"),
        ({"method": "wanda", "axis": "state"}, "unknown structured method 'wanda'"),
        (
            {"method": "flap", "axis": "state"},
            "method 'flap' does not score axis 'state'. Allowed: head, head_dim, channel",
        ),
        ({"method": "flap", "axis": "heads"}, "unknown axis 'heads'. Did you mean 'head'?"),
        ({"method": "flap", "targets": ["in_proj"]}, "targets=['in_proj'] contradicts pattern='structured'"),
        ({"method": "flap", "exclude": ["in_proj"]}, "exclude=['in_proj'] contradicts pattern='structured'"),
        ({"method": "flap", "scope": "row"}, "scope='row' contradicts pattern='structured'"),
        (
            {"method": "last", "allocation": "last"},
            "allocation='last' gives blocks different sizes, which uniform_sizes",
        ),
        (
            {"method": "last", "allocation": "owl", "uniform_sizes": False},
            "allocation='owl' spreads weights, not units. Allowed: global, last, uniform",
        ),
        ({"method": "wanda", "allocation": "last"}, "allocation='last' spreads units, not weights"),
        ({"method": "flap", "compensation": "mean"}, "unknown compensation 'mean'. Allowed: bias, least_squares"),
        ({"method": "flap", "norm_rescale": "masks"}, "unknown norm_rescale 'masks'. Did you mean 'mask'?"),
        ({"method": "state_energy", "multiple_of": 0}, "multiple_of=0 must be at least 1"),
        ({"pattern": "4:2"}, "pattern '4:2' keeps 4 of 2; N:M needs 0 < N < M"),
        (
            {"method": "wanda", "method_kwargs": {"use_varient": True}},
            "unknown method_kwargs key of method 'wanda': 'use_varient'. Did you mean 'use_variant'? Allowed: use_variant",
        ),
        (
            {"method": "magnitude", "method_kwargs": {"blocksize": 4}},
            "unknown method_kwargs key of method 'magnitude': 'blocksize'. Allowed: largest",
        ),
        (
            {"method": "sparsegpt", "method_kwargs": {"percdamp": "1e-3"}},
            "method_kwargs percdamp='1e-3' of method 'sparsegpt' must be of type float, got str",
        ),
        (
            {"method": "sparsegpt", "method_kwargs": {"blocksize": 0}},
            "sparsegpt needs blocksize >= 1 and percdamp > 0, got 0 and 0.01",
        ),
        (
            {"allocation": "owl", "allocation_kwargs": {"lambda": 0.1}},
            "unknown allocation_kwargs key of allocation 'owl': 'lambda'. Allowed: threshold, strength",
        ),
        (
            {"allocation": "owl", "allocation_kwargs": {"strength": "high"}},
            "allocation_kwargs strength='high' of allocation 'owl' must be of type float, got str",
        ),
        (
            {"allocation": "uniform", "allocation_kwargs": {"alpha": 0.1}},
            "unknown allocation_kwargs key of allocation 'uniform': 'alpha'. Allowed: none",
        ),
        (
            {"scope": "global", "allocation": "owl"},
            "scope='global' compares all weights at once and so contradicts allocation='owl'",
        ),
        (
            {"pattern": "2:4", "sparsity": 0.7},
            "pattern='2:4' removes 0.5 of the weights and contradicts sparsity=0.7; leave sparsity out or give 0.5",
        ),
        (
            {"pattern": "1:4", "sparsity": 0.25},
            "pattern='1:4' removes 0.75 of the weights and contradicts sparsity=0.25; leave sparsity out or give 0.75",
        ),
        (
            {"pattern": "2:4", "scope": "tensor"},
            "scope='tensor' contradicts pattern='2:4', which fixes the count in every group of 4; leave scope out",
        ),
        ({"pattern": "2:4", "scope": "global"}, "scope='global' contradicts pattern='2:4'"),
        ({"pattern": "4:8", "allocation": "owl"}, "allocation='owl' contradicts pattern='4:8'"),
        ({"pattern": "4:8", "allocation": "global"}, "allocation='global' contradicts pattern='4:8'"),
        ({"pattern": "2:4", "allocation": "sensitivity"}, "allocation='sensitivity' contradicts pattern='2:4'"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_values_out_of_range_and_contradictions_are_refused(values, message):
    with pytest.raises(ConfigurationError, match="^" + re.escape(message)) as caught:
        config(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"sparsity": 0},
        {"sparsity": 0.999},
        {"memoryless_value": 88},
        {"dataset_split": "validation"},
        {"dataset_split": "train_latest"},  # holds the letters, not the word
        {"scope": "global"},
        {"scope": "global", "allocation": "global"},
        {"pattern": "2:4", "scope": "row"},
        {"pattern": "2:4", "allocation": "uniform"},
    ],
    ids=str,
)
def test_what_does_not_contradict_is_accepted(values):
    config(**values)


@pytest.mark.parametrize("pattern, share", [("1:4", 0.75), ("2:4", 0.5), ("4:8", 0.5), ("2:3", 1 / 3)])
def test_n_m_fills_in_the_sparsity_and_agrees_with_the_same_number(pattern, share):
    assert SSMPrunerConfig(pattern=pattern).sparsity == pytest.approx(share)
    assert SSMPrunerConfig(pattern=pattern, sparsity=share).sparsity == pytest.approx(share)


FULL = {
    "method": "sparsegpt",
    "sparsity": 0.6,
    "targets": ["in_proj", "re:.*out_proj"],
    "exclude": ["in_proj.B"],
    "allocation": "owl",
    "a_log_fill": "zero",
    "memoryless_value": 20.0,
    "dataset": "my_text.txt",
    "dataset_name": "en",
    "dataset_split": "validation",
    "text_column": "body",
    "num_samples": 4,
    "seq_len": 64,
    "batch_size": 2,
    "seed": 7,
    "sequential": False,
    "method_kwargs": {"blocksize": 64},
    "allocation_kwargs": {"threshold": 4.0},
}


@pytest.mark.parametrize("values", [{}, FULL, {"pattern": "1:4", "sparsity": None}, {"method": "magnitude"}], ids=len)
def test_a_config_survives_dict_json_and_yaml(values):
    made = config(**values)
    assert SSMPrunerConfig.from_dict(made.to_dict()) == made
    assert SSMPrunerConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert SSMPrunerConfig.from_dict(yaml.safe_load(yaml.safe_dump(made.to_dict()))) == made


def test_to_dict_names_every_field_and_shares_nothing_with_the_config():
    made = config(**FULL)
    values = made.to_dict()
    assert set(values) == {field.name for field in dataclasses.fields(SSMPrunerConfig)}
    values["method_kwargs"]["blocksize"] = 1
    assert made.method_kwargs == {"blocksize": 64}


def test_a_dataset_in_memory_is_described_not_stored():
    values = config(dataset=[[1, 2, 3]]).to_dict()
    assert values["dataset"] == "<list in memory>"
    json.dumps(values)


def test_a_path_is_stored_as_text(tmp_path):
    assert config(dataset=tmp_path / "a.txt").to_dict()["dataset"] == str(tmp_path / "a.txt")


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigurationError, match="unknown config key 'sparsty'. Did you mean 'sparsity'\\? Allowed: method"
    ):
        SSMPrunerConfig.from_dict({"sparsty": 0.5})


# Recipes


def write(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "method: wanda\nsparsity: 0.5\n",
        "- method: wanda\n  sparsity: 0.5\n",
        "passes:\n  - method: wanda\n    sparsity: 0.5\n",
    ],
    ids=["mapping", "list", "passes"],
)
def test_a_recipe_is_a_mapping_a_list_or_passes(tmp_path, text):
    assert SSMPrunerConfig.from_file(write(tmp_path, text)) == [SSMPrunerConfig(method="wanda", sparsity=0.5)]


def test_a_recipe_keeps_the_order_of_its_passes(tmp_path):
    text = "- {method: sparsessm, sparsity: 0.5, targets: [A_log]}\n- {method: wanda, pattern: '2:4'}\n"
    first, second = SSMPrunerConfig.from_file(str(write(tmp_path, text)))
    assert (first.targets, second.pattern) == (["A_log"], "2:4")


def test_a_recipe_may_be_json(tmp_path):
    path = write(tmp_path, json.dumps([config(**FULL).to_dict()]), "recipe.json")
    assert parse_recipe(path) == [config(**FULL)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("method: [wanda\n", "recipe .* cannot be read: .*line"),
        ("", "must hold one mapping or a non-empty list of mappings"),
        ("[]", "must hold one mapping or a non-empty list of mappings"),
        ("passes: []", "must hold one mapping or a non-empty list of mappings"),
        ("passes: {method: wanda}", "must hold one mapping or a non-empty list of mappings"),
        ("just text", "must hold one mapping or a non-empty list of mappings"),
        ("- wanda\n", "must hold one mapping or a non-empty list of mappings"),
        ("sparsty: 0.5", "pass 1: unknown config key 'sparsty'"),
        ("- {method: wanda, sparsity: 0.5}\n- {method: wanda, sparsity: 2}", "pass 2: sparsity=2 must lie in"),
        ("sparsity: 5e-1", "pass 1: sparsity='5e-1' must be a number, got str"),  # YAML 1.1 takes this for a text
        ("pattern: 2:4", "pass 1: pattern=.* must be a str, got int"),  # and this for 124 seconds
        ("passes: [{sparsity: 0.5}]\nseed: 3", "holds 'seed' beside 'passes'; move it into each pass"),
        ("1: 2", "pass 1: unknown config key 1"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_on_one_line_with_its_path(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        SSMPrunerConfig.from_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [lambda path: path / "absent.yaml", lambda path: path], ids=["absent", "a directory"])
def test_a_recipe_that_is_not_a_file_is_refused(tmp_path, make):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        SSMPrunerConfig.from_file(make(tmp_path))


def test_a_recipe_that_is_not_utf_8_or_not_json_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"method: \xff\xfe")
    (tmp_path / "a.json").write_text("{'method': 1}")
    for name in ("a.yaml", "a.json"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            SSMPrunerConfig.from_file(tmp_path / name)


def test_parse_recipe_takes_configs_and_mappings_alone_or_in_a_list():
    made, values = config(method="wanda"), {"method": "wanda", "sparsity": 0.5}
    for value in (made, values, [made], (values,)):
        assert parse_recipe(value) == [made]
    assert parse_recipe([made, values]) == [made, made]


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "needs at least one pass, got an empty list"),
        (3, "made of SSMPrunerConfig objects or mappings, got int"),
        ([None], "made of SSMPrunerConfig objects or mappings, got NoneType"),
        (["recipe.yaml"], "made of SSMPrunerConfig objects or mappings, got str"),
        ([{"sparsity": 2}], "sparsity=2 must lie in"),
    ],
    ids=str,
)
def test_parse_recipe_refuses_anything_else(value, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_recipe(value)


def test_numbers_of_numpy_are_those_that_they_print():
    made = config(sparsity=np.float32(0.7), num_samples=np.int64(3), sequential=np.bool_(False))
    assert (made.sparsity, made.num_samples, made.sequential) == (0.7, 3, False)
    assert [type(v) for v in (made.sparsity, made.num_samples, made.sequential)] == [float, int, bool]
    with pytest.raises(ConfigurationError, match="sparsity=.* must be a number, got ndarray"):
        config(sparsity=np.array([0.5]))
