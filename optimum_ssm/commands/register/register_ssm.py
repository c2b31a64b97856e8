# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Adds `ssm` to `optimum-cli`, which imports every file of the namespace `optimum.commands.register`.

This folder is installed as that namespace (see setup.py) and holds no `__init__.py`. An exception in here, or a slow
import, would hit every `optimum-cli` command: whatever needs torch is imported when a command runs.
"""

from optimum_ssm.commands.ssm import SSMCommand


REGISTER_COMMANDS = [SSMCommand]
