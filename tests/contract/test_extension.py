# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A method from outside is one file: registered, listed, configured, checked and used like any other."""

import importlib
import sys
from argparse import Namespace

import pytest
import torch

from optimum_ssm import ConfigurationError, SSMPruner, SSMPrunerConfig
from optimum_ssm.methods import METHODS


FILE = '''
from dataclasses import dataclass
from typing import ClassVar

from optimum_ssm import register_method
from optimum_ssm.methods.base import WeightMethod


@register_method("checkerboard")
@dataclass
class Checkerboard(WeightMethod):
    """Every second entry goes first."""

    summary: ClassVar[str] = "every second entry"
    source: ClassVar[str] = "a test"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    default_targets: ClassVar[tuple[str, ...]] = ("out_proj",)

    phase: int = 0

    def statistics(self, kind):
        return ("col_energy",)

    def score(self, weight, statistics, kind, selection):
        assert statistics["col_energy"].shape == weight.shape[1:]
        scores = weight.new_ones(weight.numel())
        scores[self.phase :: 2] = 0
        return scores.reshape(weight.shape)
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch, clean_registries):
    (tmp_path / "checkerboard_plugin.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("checkerboard_plugin")
    del sys.modules["checkerboard_plugin"]


def test_it_prunes(plugin, tiny_mamba, token_ids):
    pruner = SSMPruner(tiny_mamba)
    config = SSMPrunerConfig(
        method="checkerboard", sparsity=0.5, method_kwargs={"phase": 1}, dataset=token_ids(), seq_len=24
    )
    report = pruner.prune(config)
    assert report.pruned == 2 * 1024 and len(pruner.masks) == 2
    for name, mask in pruner.masks.items():
        assert name.endswith("out_proj.weight")
        assert mask.flatten()[1::2].all() and not mask.flatten()[::2].any()
    assert {method for row in report.rows for method in row.methods} == {"checkerboard"}


def test_its_parameters_and_targets_are_checked_like_any_others(plugin, tiny_mamba):
    with pytest.raises(ConfigurationError, match="unknown method_kwargs key .*'fase'. Did you mean 'phase'"):
        SSMPrunerConfig(method="checkerboard", sparsity=0.5, method_kwargs={"fase": 1})
    with pytest.raises(ConfigurationError, match="phase='odd' of method 'checkerboard' must be of type int"):
        SSMPrunerConfig(method="checkerboard", sparsity=0.5, method_kwargs={"phase": "odd"})
    config = SSMPrunerConfig(method="checkerboard", sparsity=0.5, targets=["A_log"], dataset=torch.zeros(1, 8))
    with pytest.raises(ConfigurationError, match="method 'checkerboard' cannot prune A_log"):
        SSMPruner(tiny_mamba).prune(config)


def test_it_is_listed_and_suggested(plugin, capsys):
    from optimum_ssm.commands.methods import MethodsCommand

    assert "checkerboard" in METHODS.names()
    with pytest.raises(ConfigurationError, match="Did you mean 'checkerboard'"):
        SSMPrunerConfig(method="chekerboard", sparsity=0.5)
    command = MethodsCommand.__new__(MethodsCommand)
    command.execute(Namespace(name=None))
    assert "checkerboard every second entry" in capsys.readouterr().out


def test_it_is_gone_when_the_test_is_over():
    assert "checkerboard" not in METHODS.names()
