# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`import optimum_ssm` is enough for transformers' auto classes, in whatever order things are imported."""

import pickle
import subprocess
import sys

import pytest
from transformers import AutoConfig

from optimum_ssm.models import modelling, stock_types
from tests.models import checks
from tests.models.test_pruned_mamba import DIFFERENT


LOAD = """
from transformers import AutoConfig
config = AutoConfig.from_pretrained({directory!r})
assert config.layer_sizes[0]["state_size"] == 5, config
assert type(config).__module__ == "optimum_ssm.models.pruned_mamba"
from transformers import AutoModelForCausalLM
assert AutoModelForCausalLM.from_pretrained({directory!r}).config == config
"""

ORDERS = {
    # the auto module is imported while modeling_utils is only half there
    "first": "import optimum_ssm\nfrom transformers import PreTrainedModel\n",
    "last": """
import pickle, sys
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
import optimum_ssm
stand_in = CONFIG_MAPPING["optimum_ssm_mamba"]
assert stand_in.__name__ == "PrunedMambaConfig"
assert pickle.loads(pickle.dumps(CONFIG_MAPPING))["optimum_ssm_mamba"] is stand_in
assert "transformers.models.mamba.modeling_mamba" not in sys.modules
assert stand_in(num_hidden_layers=2).layer_sizes[1]["state_size"] == 16
assert CONFIG_MAPPING["optimum_ssm_mamba"] is not stand_in
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_load_after_the_import(order, tmp_path):
    checks.build("mamba", DIFFERENT).save_pretrained(tmp_path)
    code = ORDERS[order] + LOAD.format(directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stock", stock_types())
def test_every_file_defines_what_is_asked_of_it(stock):
    module = modelling(stock)
    config = module.CLASSES["AutoConfig"]
    assert modelling(config.model_type) is module and callable(module.fit_block)
    assert config.model_type == f"optimum_ssm_{stock}" and module.STOCK_CLASS.config_class.model_type == stock
    assert type(AutoConfig.for_model(config.model_type)) is config
    # generate() decides by this word in the class name how it hands the cache over
    assert "mamba" in module.CLASSES["AutoModelForCausalLM"].__name__.lower()
    assert pickle.loads(pickle.dumps(config())) == config()
