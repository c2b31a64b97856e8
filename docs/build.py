# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""doc-builder, after every module that a page names is imported: by itself it finds attributes of a package, not modules.

python docs/build.py build optimum_ssm docs/source --build_dir docs/build    # its own command line
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType


SOURCE = Path(__file__).parent / "source"
PACKAGE = "optimum_ssm"


def documented() -> list[str]:
    """Every object that a page describes from its docstring, by its name below the package."""
    pages = (page.read_text(encoding="utf-8") for page in sorted(SOURCE.rglob("*.mdx")))
    return sorted({name for page in pages for name in re.findall(r"^\[\[autodoc\]\] (\S+)", page, re.MULTILINE)})


def module_of(name: str) -> ModuleType:
    """Import the module in which a documented object is looked for: all of the name that are modules."""
    module, *parts = importlib.import_module(PACKAGE), *name.split(".")[:-1]
    for part in parts:
        if isinstance(getattr(module, part, None), type):  # a class: its members follow
            break
        module = importlib.import_module(f"{module.__name__}.{part}")
    return module


if __name__ == "__main__":
    from doc_builder.commands.doc_builder_cli import main

    for name in documented():
        module_of(name)
    sys.exit(main())
