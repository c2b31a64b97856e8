# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What to remove: one file per method, pure functions of a tensor and its statistics."""

from ..registry import Registry


METHODS: Registry = Registry("method", __name__, helpers=("base", "structures"))
register_method = METHODS.register
