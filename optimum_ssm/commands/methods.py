# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm methods`: what the registries hold."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace

from .base import SSMLeafCommand


class MethodsCommand(SSMLeafCommand):
    """List methods, allocations and families with their parameters."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """One optional name."""
        parser.add_argument("name", nargs="?", help="show one method or allocation in full")

    def execute(self, args: Namespace) -> None:
        """Print the list, or one entry in full."""
        import inspect

        from ..errors import ConfigurationError
        from ..families import FAMILIES
        from ..methods import METHODS
        from ..methods.structures import STRUCTURES
        from ..recipes import recipe_names, recipe_text
        from ..registry import unknown
        from ..sparsity.allocations import ALLOCATIONS

        listed = ((METHODS, "methods"), (STRUCTURES, "structured methods"), (ALLOCATIONS, "allocations"))
        if args.name is not None:
            found = [registry for registry, _ in listed if args.name in registry.names()]
            for registry in found:
                entry = registry.get(args.name)
                print(f"{registry.kind} {args.name}\nsource: {entry.source}\n\n{inspect.getdoc(entry)}\n")
            if found:
                return
            known = [name for registry, _ in listed for name in registry.names()]
            raise ConfigurationError(unknown("method or allocation", args.name, known))
        for registry, plural in listed:
            print(f"{plural}:")
            for name, entry in registry.items():
                axes = f" [{', '.join(entry.axes)}]" if registry is STRUCTURES else ""
                print(f"  {name:<12} {entry.summary}{axes}")
                for field in dataclasses.fields(entry):
                    print(f"    {field.name}={field.default!r}")
        print("families:")
        for name, family in FAMILIES.items():
            print(f"  {name:<12} model types: {', '.join(family.model_types)}")
        print("recipes (--recipe NAME):")
        for name in recipe_names():
            print(f"  {name:<12} {recipe_text(name)[0]}")
