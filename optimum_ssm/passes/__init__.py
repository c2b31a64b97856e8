# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What one pass does: a config checked against a model, then block by block what goes and what makes up for it."""
