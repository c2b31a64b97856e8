# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Removed units of a structural axis to smaller tensors and a matching config. Sliced equals masked."""
