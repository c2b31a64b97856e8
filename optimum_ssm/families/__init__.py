# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a model looks like: one file per family, a declaration without maths."""

from ..errors import ConfigurationError
from ..registry import Registry, unknown


FAMILIES: Registry = Registry("family", __name__, helpers=("base", "matching"))
register_family = FAMILIES.register


def family_of(model):
    """The family object that describes `model`, found by `model.config.model_type`.

    Raises:
        ConfigurationError: no registered family declares this model type; the message lists those that are.
    """
    by_type = {kind: family for _, family in FAMILIES.items() for kind in family.model_types}
    model_type = getattr(model.config, "model_type", None)
    if model_type not in by_type:
        raise ConfigurationError(unknown("model type", model_type, sorted(by_type)))
    return by_type[model_type]()
