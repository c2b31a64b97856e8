# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""The errors of optimum_ssm. Every message is one line that names the offender and what is allowed."""


class OptimumSSMError(Exception):
    """Base of every error that optimum_ssm raises on purpose."""


class ConfigurationError(OptimumSSMError, ValueError):
    """A setting is unknown, out of range or contradicts another one."""


class CalibrationError(OptimumSSMError, RuntimeError):
    """The calibration text or the activations that it gives cannot be used."""


class CheckpointError(OptimumSSMError):
    """A checkpoint cannot be read, written or expressed."""
