# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""How the budget is spread over weights and blocks: one file per rule."""

from ...registry import Registry


ALLOCATIONS: Registry = Registry("allocation", __name__, helpers=("base", "budget", "units"))
register_allocation = ALLOCATIONS.register
