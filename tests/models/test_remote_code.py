# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that carries its modelling code loads where optimum_ssm cannot be imported."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_ssm.errors import CheckpointError
from optimum_ssm.hub.remote_code import save_remote_code
from tests.models import checks, test_pruned_mamba, test_pruned_mamba2


DIFFERENT = {"mamba": test_pruned_mamba.DIFFERENT, "mamba2": test_pruned_mamba2.DIFFERENT}

# Run in a process of its own: what was saved must load, give the same logits, and save itself whole again.
READER = """
import sys
sys.modules["optimum_ssm"] = None
import torch
from transformers import AutoConfig, AutoModelForCausalLM

for directory in sys.argv[1:]:
    wanted = torch.load(directory + "/wanted.pt")
    try:
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit("loaded without trust")
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.save_pretrained(directory + "-again")
    again = AutoModelForCausalLM.from_pretrained(directory + "-again", trust_remote_code=True)
    for loaded in (model, again):
        assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
        with torch.no_grad():
            assert torch.equal(loaded(wanted["ids"]).logits, wanted["logits"])
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        tokens = loaded.generate(wanted["ids"], attention_mask=torch.ones_like(wanted["ids"]), **settings)
        assert torch.equal(tokens, wanted["tokens"])
assert not any(name.startswith("optimum_ssm") and module for name, module in sys.modules.items())
"""


def test_loads_where_optimum_ssm_is_absent(token_ids, tmp_path):
    directories = []
    for family, sizes in DIFFERENT.items():
        model, ids, directory = checks.build(family, sizes), token_ids(2, 10), tmp_path / f"pruned-{family}"
        model.save_pretrained(directory)
        assert save_remote_code(model, directory).name == f"pruned_{family}.py"
        wanted = {"ids": ids, "logits": checks.logits(model, ids), "tokens": checks.generate(model, ids)}
        torch.save(wanted, directory / "wanted.pt")
        directories.append(str(directory))
    done = subprocess.run(
        [sys.executable, "-c", READER, *directories],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("family", DIFFERENT)
def test_our_own_classes_are_used_where_they_are_there_and_the_code_is_not_promised_again(family, token_ids, tmp_path):
    model, ids = checks.build(family, DIFFERENT[family]), token_ids(2, 10)
    model.save_pretrained(tmp_path / "first")
    save_remote_code(model, tmp_path / "first")
    assert "auto_map" in json.loads((tmp_path / "first" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")  # no trust needed
    assert type(loaded) is type(model)
    loaded.save_pretrained(tmp_path / "second")
    assert "auto_map" not in json.loads((tmp_path / "second" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(checks.logits(again, ids), checks.logits(model, ids))


def test_what_needs_no_code_or_is_not_there_is_refused(tiny_mamba, tmp_path):
    with pytest.raises(CheckpointError, match="MambaForCausalLM is a class of transformers"):
        save_remote_code(tiny_mamba, tmp_path)
    model = checks.build("mamba", DIFFERENT["mamba"])
    with pytest.raises(CheckpointError, match="save the model first"):
        save_remote_code(model, tmp_path)
    tiny_mamba.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not that of a model of type 'optimum_ssm_mamba'"):
        save_remote_code(model, tmp_path)
    assert not list(tmp_path.glob("*.py"))
