# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Which scan runs where, what the kernels refuse, and a whole model whose scans run in Triton."""

import sys

import pytest
import torch

from optimum_ssm.calibration.seam import AVAILABLE_SUMS, replaced_scan
from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import get_family
from optimum_ssm.ops import backend as module
from optimum_ssm.ops.backend import use_triton
from optimum_ssm.ops.selective_scan import selective_scan
from optimum_ssm.ops.state_space_dual import state_space_dual

from ..reference import trace
from .test_triton_selective_scan import make_inputs as mamba_inputs
from .test_triton_selective_scan import on
from .test_triton_state_space_dual import make_inputs as mamba2_inputs


X = torch.ones(1, 2, 3)
