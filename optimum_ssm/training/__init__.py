# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Training with masks: what is removed stays removed, or goes step by step; the dense model can be the teacher."""

from .distillation import DistillationTrainer, distillation_loss
from .gradual import GradualPruningCallback
from .masks import ModelMasks, SparsityCallback
