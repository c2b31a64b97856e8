# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Selective scans that give the output and, in the same pass, the sums over time that pruning methods ask for.

`selective_scan` (Mamba-1) and `state_space_dual` (Mamba-2) are each defined in the module of that name, beside the
table `SCAN_SUMS` and the function `allocate_sums`. Import them from there: nothing is exported here, so that
`optimum_ssm.ops.selective_scan` always means the module.
"""
