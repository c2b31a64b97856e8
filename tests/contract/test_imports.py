# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What is heavy or optional is imported when it is needed and not before."""

import subprocess
import sys

import pytest


# Makes packages look as if they were not installed, to `import` and to `importlib.util.find_spec` alike.
WITHOUT = """
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            return None
        return super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
for name in {absent!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " can still be imported")
"""
OPTIONAL = ("datasets", "optimum", "evaluate", "lm_eval", "matplotlib")

PRUNE = """
import torch
from transformers import MambaConfig, MambaForCausalLM
import optimum_ssm
from optimum_ssm import PruningReport, SSMPruner, SSMPrunerConfig, evaluate_perplexity

config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
pruner = SSMPruner(MambaForCausalLM(config))
ids = torch.randint(0, 32, (3, 12), generator=torch.Generator().manual_seed(0))
report = pruner.prune(SSMPrunerConfig(method="sparsessm", sparsity=0.5, dataset=ids, seq_len=12))
assert 0.4 < report.pruned / sum(row.elements for row in report.rows if row.pruned) < 0.6
assert evaluate_perplexity(pruner.model, ids.flatten(), window=12) > 1
assert str(report)
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_token_ids_are_enough_to_prune_where_optional_packages_are_absent():
    done = run(WITHOUT.format(absent=OPTIONAL) + PRUNE)
    assert done.returncode == 0, done.stderr


def test_text_where_datasets_is_absent_is_refused_by_a_message_that_names_it():
    code = (
        "from optimum_ssm.calibration.data import load_text\n"
        "try:\n    load_text('wikitext2')\n"
        "except ImportError as error:\n    assert 'datasets' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    done = run(WITHOUT.format(absent=("datasets",)) + code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "statement", ["import optimum_ssm", "from optimum_ssm import SSMPrunerConfig, register_method"]
)
def test_the_package_and_its_config_are_light(statement):
    heavy = ("torch", "transformers", "datasets", "optimum", "evaluate", "matplotlib", "huggingface_hub")
    done = run(f"import sys\n{statement}\nprint([name for name in {heavy!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported():
    import optimum_ssm

    for name in optimum_ssm.__all__:
        assert getattr(optimum_ssm, name) is not None
    assert set(optimum_ssm.__all__) <= set(dir(optimum_ssm))
    with pytest.raises(AttributeError, match="no attribute 'SSMPruners'"):
        optimum_ssm.SSMPruners
