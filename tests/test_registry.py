# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from optimum_ssm.errors import ConfigurationError
from optimum_ssm.families import FAMILIES
from optimum_ssm.methods import METHODS
from optimum_ssm.registry import Registry, unknown
from optimum_ssm.sparsity.allocations import ALLOCATIONS


PLUGIN = """
from plugins import THINGS

@THINGS.register({name!r})
class Thing:
    pass
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A registry over a package `plugins` with the entries `apple`, `pear` and `for` (in `for_.py`)."""
    package = tmp_path / "plugins"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from optimum_ssm.registry import Registry\nTHINGS = Registry('thing', __name__, helpers=('base',))\n"
    )
    for file, name in (("apple", "apple"), ("pear", "pear"), ("for_", "for")):
        (package / f"{file}.py").write_text(PLUGIN.format(name=name))
    for file in ("base", "_private"):
        (package / f"{file}.py").write_text("raise AssertionError('not an entry')\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    import plugins as package

    yield package.THINGS
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "plugins":
            del sys.modules[name]


def test_file_names_are_entries_but_helpers_and_private_modules_are_not(plugins):
    assert plugins.names() == ["apple", "for", "pear"]


def test_listing_names_imports_no_entry(plugins):
    plugins.names()
    assert not any(name.startswith("plugins.") for name in sys.modules)


def test_an_entry_is_imported_when_it_is_asked_for(plugins):
    assert plugins.get("apple").__module__ == "plugins.apple"
    assert "plugins.apple" in sys.modules and "plugins.pear" not in sys.modules


def test_an_underscore_keeps_a_file_name_apart_from_a_keyword(plugins):
    assert plugins.get("for").__module__ == "plugins.for_"


def test_items_gives_every_entry_sorted(plugins):
    assert [name for name, _ in plugins.items()] == ["apple", "for", "pear"]


def test_an_unknown_name_is_answered_with_the_nearest_and_all(plugins):
    with pytest.raises(ConfigurationError) as caught:
        plugins.get("aple")
    assert str(caught.value) == "unknown thing 'aple'. Did you mean 'apple'? Allowed: apple, for, pear"


def test_a_name_like_no_other_gets_no_suggestion(plugins):
    with pytest.raises(ConfigurationError, match="^unknown thing 'zzz'. Allowed: apple, for, pear$"):
        plugins.get("zzz")


def test_an_import_error_inside_an_entry_reaches_the_user(plugins):
    folder = Path(sys.modules["plugins"].__path__[0])
    (folder / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        plugins.get("broken")


def test_a_users_entry_is_listed_and_found(plugins):
    @plugins.register("quince")
    class Quince:
        pass

    assert "quince" in plugins.names() and plugins.get("quince") is Quince


def test_a_name_belongs_to_the_first_who_registers_it(plugins):
    @plugins.register("quince")
    class Quince:
        pass

    with pytest.raises(ConfigurationError, match="'quince' is already registered by .*Quince"):

        @plugins.register("quince")
        class Other:
            pass

    assert plugins.get("quince") is Quince


@pytest.mark.parametrize("imported", [False, True])
def test_a_built_in_name_cannot_be_taken_whether_its_module_is_imported_or_not(plugins, imported):
    if imported:
        plugins.get("pear")
    with pytest.raises(ConfigurationError, match="'pear' is already registered by plugins.pear"):

        @plugins.register("pear")
        class Mine:
            pass

    assert plugins.get("pear").__module__ == "plugins.pear"


def test_registering_the_same_class_again_is_allowed(plugins):
    """A notebook cell that runs twice."""

    def cell():
        @plugins.register("quince")
        class Quince:
            pass

        return Quince

    first, second = cell(), cell()
    assert first is not second and plugins.get("quince") is second


@pytest.mark.parametrize("name", ["", "Wanda", "two words", "2to4", "a-b"])
def test_names_are_lower_case_identifiers(plugins, name):
    with pytest.raises(ConfigurationError, match="lower-case identifier such as 'my_thing'"):
        plugins.register(name)


@dataclass
class Gadget:
    """Takes one parameter of every kind."""

    count: int = 1
    share: float = 0.5
    label: str = "a"
    loud: bool = False
    mode: str | None = None
    options: dict[str, int] | None = None
    names: list[str] | None = None
    free: Any = None

    def __post_init__(self):
        if self.share > 1:
            raise ConfigurationError("gadget needs share <= 1")


@pytest.fixture
def gadgets(plugins):
    plugins.register("gadget")(Gadget)
    return plugins


def test_build_gives_an_object_with_its_parameters(gadgets):
    built = gadgets.build("gadget", {"count": 3, "options": {"a": 1}, "names": ["x"], "mode": None}, "thing_kwargs")
    assert built == Gadget(count=3, options={"a": 1}, names=["x"])


def test_build_refuses_a_parameter_that_does_not_exist(gadgets):
    with pytest.raises(ConfigurationError) as caught:
        gadgets.build("gadget", {"cuont": 3}, "thing_kwargs")
    assert str(caught.value).startswith("unknown thing_kwargs key of thing 'gadget': 'cuont'. Did you mean 'count'?")
    assert "count, share, label" in str(caught.value)


@pytest.mark.parametrize(
    "key, value, wanted, got",
    [
        ("count", "3", "int", "str"),
        ("count", 3.0, "int", "float"),
        ("count", True, "int", "bool"),
        ("count", None, "int", "NoneType"),
        ("share", "1e-2", "float", "str"),  # what YAML makes of a number without a dot
        ("share", True, "float", "bool"),
        ("label", 3, "str", "int"),
        ("loud", 1, "bool", "int"),
        ("loud", "false", "bool", "str"),
        ("mode", 3, r"str \| None", "int"),
        ("options", [1], r"dict.*None", "list"),
        ("names", "x", r"list.*None", "str"),
    ],
)
def test_build_refuses_a_value_of_the_wrong_type(gadgets, key, value, wanted, got):
    with pytest.raises(ConfigurationError, match=f"thing_kwargs {key}=.* must be of type {wanted}, got {got}"):
        gadgets.build("gadget", {key: value}, "thing_kwargs")


def test_an_int_may_stand_for_a_float_and_any_takes_everything(gadgets):
    assert gadgets.build("gadget", {"share": 1, "free": object}, "thing_kwargs").share == 1


def test_build_lets_the_object_refuse_a_value(gadgets):
    with pytest.raises(ConfigurationError, match="gadget needs share <= 1"):
        gadgets.build("gadget", {"share": 2.0}, "thing_kwargs")


def test_unknown_tells_what_was_given_meant_and_allowed():
    assert unknown("thing", "aa", ["ab", "zz"]) == "unknown thing 'aa'. Allowed: ab, zz"
    assert unknown("thing", "abcd", ["abce"]) == "unknown thing 'abcd'. Did you mean 'abce'? Allowed: abce"
    assert "Did you mean 'x.B'?" in unknown("thing", "x.b", ["x.A", "x.B", "x.C"])  # first what differs in case alone
    assert unknown("thing", None, []) == "unknown thing None. Allowed: none"


@pytest.mark.parametrize("registry", [METHODS, FAMILIES, ALLOCATIONS], ids=lambda registry: registry.kind)
def test_every_built_in_entry_imports_and_sits_in_the_file_of_its_name(registry):
    assert isinstance(registry, Registry) and registry.names()
    for name in registry._modules():
        entry = registry.get(name)
        assert entry.__module__ == f"{registry.package}.{registry._modules()[name]}"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_registries_list_their_names_without_torch():
    done = run(
        "import sys\n"
        "from optimum_ssm.methods import METHODS\n"
        "from optimum_ssm.sparsity.allocations import ALLOCATIONS\n"
        "from optimum_ssm.families import FAMILIES\n"
        "assert METHODS.names() and ALLOCATIONS.names() and FAMILIES.names()\n"
        "import optimum_ssm.configuration\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules, 'heavy import'\n"
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_are_declared_without_torch():
    done = run("import sys, optimum_ssm.commands.ssm\nassert 'torch' not in sys.modules, 'heavy import'\n")
    assert done.returncode == 0, done.stderr
