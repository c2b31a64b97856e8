# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What a model looks like: one file per family, a declaration without maths."""

from ..errors import ConfigurationError
from ..models import PREFIX
from ..registry import Registry, unknown


FAMILIES: Registry = Registry("family", __name__, helpers=("axes", "base", "matching"))
register_family = FAMILIES.register


def family_of(model):
    """The family object that describes `model`, found by `model.config.model_type`. Raises as `family_for`."""
    return family_for(getattr(model.config, "model_type", None))


def family_for(model_type):
    """The family object of a model type.

    Raises:
        ConfigurationError: no registered family declares this model type, or more than one does; the message lists the
            types that are declared, or those families.
    """
    stock = str(model_type).removeprefix(PREFIX)
    found = {name: family for name, family in FAMILIES.items() if stock in family.model_types}
    if not found:
        known = sorted(kind for _, family in FAMILIES.items() for kind in family.model_types)
        raise ConfigurationError(unknown("model type", model_type, known))
    if len(found) > 1:
        raise ConfigurationError(f"model type {model_type!r} is declared by more than one family: {', '.join(found)}")
    return next(iter(found.values()))()
