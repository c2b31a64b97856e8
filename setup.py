# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Packages and their folders; everything else is declared in setup.cfg."""

from setuptools import find_packages, setup


setup(
    packages=find_packages(include=["optimum_ssm", "optimum_ssm.*"]) + ["optimum.commands.register"],
    # optimum-cli finds its commands in this namespace package; ours lives inside our own tree.
    package_dir={"optimum.commands.register": "optimum_ssm/commands/register"},
)
