# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""What the documentation names exists: objects that it describes, pages that its contents and its links lead to."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml


@pytest.fixture(scope="module")
def build(assets: Path) -> ModuleType:
    """`docs/build.py` as a module."""
    spec = importlib.util.spec_from_file_location("docs_build", assets.parents[1] / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_described_object_is_found_and_has_a_docstring(build: ModuleType) -> None:
    names = build.documented()
    assert len(names) > 30 and "SSMPruner" in names and "surgery.diagonal.prune_diagonal" in names
    for name in names:
        found = getattr(build.module_of(name), name.rpartition(".")[2], None)
        assert found is not None and found.__doc__, name


def test_contents_list_every_page_once_and_links_lead_to_pages(build: ModuleType) -> None:
    pages = {page.relative_to(build.SOURCE).with_suffix("").as_posix() for page in build.SOURCE.rglob("*.mdx")}

    def listed(entries: list[dict]) -> list[str]:
        return [n for e in entries for n in [*([e["local"]] if "local" in e else []), *listed(e.get("sections", []))]]

    contents = listed(yaml.safe_load((build.SOURCE / "_toctree.yml").read_text(encoding="utf-8")))
    assert sorted(contents) == sorted(pages)
    for page in sorted(build.SOURCE.rglob("*.mdx")):
        for link in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve().relative_to(build.SOURCE.resolve())
            assert target.as_posix() in pages or (build.SOURCE / target).is_file(), f"{page.name}: {link}"
