# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What to remove whole: states, heads, head dims, groups, channels, blocks. One file per method."""

from ...registry import Registry


STRUCTURES: Registry = Registry("structured method", __name__, helpers=("base",))
register_structured_method = STRUCTURES.register
