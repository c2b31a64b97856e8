# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""Writes the pages that follow from the registries: one per method, the allocations, the command line, the contents.

python docs/generate.py            # write
python docs/generate.py --check    # fail if a page on disk is not what would be written
"""

import contextlib
import dataclasses
import inspect
import io
import sys
import textwrap
from argparse import ArgumentParser, HelpFormatter
from pathlib import Path

from optimum_ssm.commands.ssm import SSMCommand
from optimum_ssm.configuration import SSMPrunerConfig
from optimum_ssm.methods import METHODS
from optimum_ssm.methods.base import KINDS
from optimum_ssm.methods.structures import STRUCTURES
from optimum_ssm.recipes import recipe_names, recipe_path, recipe_text
from optimum_ssm.report import table
from optimum_ssm.sparsity.allocations import ALLOCATIONS


SOURCE = Path(__file__).parent / "source"
NOTICE = (
    "<!-- Copyright 2026 The optimum_ssm authors. All rights reserved. SPDX-License-Identifier: Apache-2.0 -->\n"
    "<!-- Written by docs/generate.py from the code: edit that, not this. -->\n"
)
CONTENTS = """\
# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
# Written by docs/generate.py: edit that, not this.
- title: Start
  sections:
    - {local: index, title: optimum_ssm}
    - {local: installation, title: Installation}
    - {local: quicktour, title: Quick tour}
- title: Understand
  sections:
    - {local: concepts, title: "What sparsity buys, and what it does not"}
    - {local: calibration, title: Calibration}
    - {local: structures, title: "Smaller models: states, heads, channels, blocks"}
    - {local: diagonal, title: "Diagonal systems: S5 and S4D"}
    - {local: training, title: Training with masks}
    - {local: results, title: Results and costs}
    - {local: architecture, title: Architecture}
- title: Look up
  sections:
    - {local: configuration, title: Configuration}
    - {local: cli, title: Command line}
    - local: methods/index
      title: Methods
      sections:
METHODS
    - local: structures/index
      title: Structured methods
      sections:
STRUCTURES
    - {local: allocations, title: Allocations}
    - local: recipes
      title: Recipes
      sections:
RECIPES
    - {local: api, title: API reference}
"""


RECIPES = """\
A recipe is a list of configs that run one after the other on the same model. These come with the library and are known by their
names wherever a recipe can be given; budget and text can be given beside them, for all passes:

```python
from optimum_ssm import load_recipe

pruner.prune("best")
pruner.prune(load_recipe("sparsessm", sparsity=0.6, dataset="my_text.txt"))
```

```bash
optimum-cli ssm prune MODEL -o pruned --recipe sparsessm --sparsity 0.6
```

A copy of a file, changed, is a recipe too: `--recipe ./mine.yaml`. `method: best` and `method: sparsessm` are the methods of these
names, see [Methods](methods/index). What a recipe does and what it costs is on its page."""


PAIRS = """\
A flag with `KEY=VALUE` takes several pairs, and a value is read as YAML: `largest=true`, `lr=0.001`, `0=20GiB cpu=60GiB`. A value
that is a mapping goes into braces, in quotes for the shell, with a space behind every colon:

```bash
optimum-cli ssm prune MODEL -o pruned --method sparsegpt --sparsity 0.5 --targets "in_proj.*" out_proj \\
    --allocation by_name --allocation-kwargs 'shares={in_proj.z: 0.6, in_proj.x: 0.5, "*.dt": 0}'
```

Names and globs in `--targets` and `--exclude` are quoted for the shell too, where they hold `*`. In a mapping a name that begins
with `*` needs quotes of its own, because to YAML a bare `*` is an alias. In a recipe the same is

```yaml
- method: sparsegpt
  sparsity: 0.5
  targets: ["in_proj.*", out_proj]
  allocation: by_name
  allocation_kwargs: {shares: {in_proj.z: 0.6, in_proj.x: 0.5, "*.dt": 0}}
```"""


def pages() -> dict[str, str]:
    """File name below docs/source to text."""
    found = {f"methods/{name}.mdx": method_page(name, method) for name, method in METHODS.items()}
    found |= {f"structures/{name}.mdx": structure_page(name, method) for name, method in STRUCTURES.items()}
    contents = CONTENTS
    listed = {"methods": METHODS.names(), "structures": STRUCTURES.names(), "recipes": recipe_names()}
    for folder, names in listed.items():
        entries = "\n".join(f"        - {{local: {folder}/{name}, title: {name}}}" for name in names)
        contents = contents.replace(folder.upper(), entries)
    found["_toctree.yml"] = contents
    found["methods/index.mdx"] = methods_page()
    found["structures/index.mdx"] = structures_page()
    found["allocations.mdx"] = allocations_page()
    found["recipes.mdx"] = recipes_page()
    found |= {f"recipes/{name}.mdx": recipe_page(name) for name in recipe_names()}
    found["configuration.mdx"] = configuration_page()
    found["cli.mdx"] = cli_page()
    return found


def method_page(name: str, method: type) -> str:
    """Facts, docstring and parameters of one method."""
    kinds = [kind for kind in KINDS if kind in method.kinds]
    facts = [
        ("source", method.source),
        ("prunes", ", ".join(f"`{kind}`" for kind in kinds)),
        ("default targets", ", ".join(f"`{target}`" for target in method.default_targets)),
        ("default scope", f"`{method.default_scope}`"),
        ("default allocation", f"`{method.default_allocation}`"),
        ("statistics", "; ".join(f"{kind}: {', '.join(method().statistics(kind)) or 'none'}" for kind in kinds)),
        ("changes kept weights", "yes" if method.updates_weights else "no"),
    ]
    lines = [NOTICE, f"# {name}", "", sentence(method.summary), "", *table(("", ""), facts), ""]
    lines += [
        docstring(method),
        "",
        "```python",
        f'SSMPrunerConfig(method="{name}", sparsity=0.5{example(method)})',
        "```",
    ]
    return "\n".join(lines) + "\n"


def structure_page(name: str, method: type) -> str:
    """Facts, docstring and parameters of one structured method."""
    facts = [
        ("source", method.source),
        ("axes", ", ".join(f"`{axis}`" for axis in method.axes)),
        ("default allocation with `uniform_sizes=False`", f"`{method.default_allocation}`"),
    ]
    call = f'SSMPrunerConfig(method="{name}", axis="{method.axes[0]}", sparsity=0.5{example(method)})'
    lines = [NOTICE, f"# {name}", "", sentence(method.summary), "", *table(("", ""), facts), "", docstring(method), ""]
    return "\n".join([*lines, "```python", call, "```"]) + "\n"


def structures_page() -> str:
    """The table of all structured methods."""
    rows = [(f"[`{name}`]({name})", method.summary, ", ".join(method.axes)) for name, method in STRUCTURES.items()]
    intro = (
        "A structured method scores whole units of an axis; what a unit owns is cut out of every tensor, and the config follows.\n"
        "What the axes are, which results load where and what can be gained: [Smaller models](../structures)."
    )
    lines = [NOTICE, "# Structured methods", "", intro, "", *table(("method", "scores by", "axes"), rows)]
    return "\n".join(lines) + "\n"


def example(method: type) -> str:
    """The method's own parameters with their defaults, as they are written in a config."""
    own = {field.name: field.default for field in dataclasses.fields(method)}
    return f", method_kwargs={own!r}" if own else ""


def methods_page() -> str:
    """The table of all methods."""
    rows = [
        (f"[`{name}`]({name})", method.summary, ", ".join(method.kinds), "yes" if method.updates_weights else "no")
        for name, method in METHODS.items()
    ]
    head = ("method", "scores by", "kinds of weight", "updates kept weights")
    intro = (
        "A method gets a weight and statistics of its input and gives back scores, higher meaning keep, or a reconstructed\n"
        "weight. Kinds of weight: `linear`, `conv` (the depthwise convolution) and `a_log` (the decay rates)."
    )
    return "\n".join([NOTICE, "# Methods", "", intro, "", *table(head, rows)]) + "\n"


def allocations_page() -> str:
    """All allocations with their parameters."""
    lines = [
        NOTICE,
        "# Allocations",
        "",
        "How the budget is spread over weights and blocks. To the entry: with `uniform` in every tensor, with the others in all together.",
    ]
    for name, entry in ALLOCATIONS.items():
        lines += ["", f"## {name}", "", f"{sentence(entry.summary)} Source: {entry.source}.", "", docstring(entry)]
    return "\n".join(lines) + "\n"


def recipes_page() -> str:
    """The table of all recipes that come with the library."""
    rows = [(f"[`{name}`](recipes/{name})", recipe_text(name)[0]) for name in recipe_names()]
    lines = [NOTICE, "# Recipes", "", RECIPES, "", *table(("recipe", ""), rows)]
    return "\n".join([*lines, "", "[[autodoc]] recipes.load_recipe"]) + "\n"


def recipe_page(name: str) -> str:
    """Text and passes of one recipe, from its file."""
    summary, text = recipe_text(name)
    rows = recipe_path(name).read_text(encoding="utf-8").splitlines()
    passes = "\n".join(row for row in rows if not row.startswith("#"))
    return "\n".join([NOTICE, f"# {name}", "", summary, "", text, "", "```yaml", passes.strip(), "```"]) + "\n"


def configuration_page() -> str:
    """The fields of the config."""
    rows = []
    for field in dataclasses.fields(SSMPrunerConfig):
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        rows.append((f"`{field.name}`", f"`{default!r}`", field.metadata["help"].replace("|", "\\|")))
    intro = (
        "The fields are also the flags of `ssm prune` and the keys of a recipe. A name that does not exist, a value of the wrong\n"
        "type or out of range, and two fields that contradict each other are refused with a message that says what is allowed."
    )
    lines = [NOTICE, "# Configuration", "", intro, "", *table(("field", "default", "meaning"), rows)]
    return "\n".join([*lines, "", "[[autodoc]] SSMPrunerConfig"]) + "\n"


def cli_page() -> str:
    """The help of every command."""
    intro = (
        "`optimum-cli ssm …`, `optimum-ssm …` and `python -m optimum_ssm …` are the same commands. An error is one line on stderr\n"
        "and exit code 1; a flag that does not exist or cannot be read ends in the usage, a line that says which, and exit "
        "code 2."
    )
    lines = [NOTICE, "# Command line", "", intro]
    for info in SSMCommand.SUBCOMMANDS:
        parser = ArgumentParser(f"optimum-cli ssm {info.name}", formatter_class=_Wide)
        info.subcommand_class.parse_args(parser)
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            parser.print_help()
        lines += ["", f"## ssm {info.name}", "", info.help, "", "```text", text.getvalue().rstrip(), "```"]
        lines += ["", PAIRS] if info.name == "prune" else []
    return "\n".join(lines) + "\n"


class _Wide(HelpFormatter):
    """Help at a fixed width, so that the page does not depend on the terminal."""

    def __init__(self, prog: str):
        super().__init__(prog, width=110, max_help_position=32)


def docstring(entry: type) -> str:
    """The docstring with its `Args:` as a list."""
    text, separator, arguments = inspect.getdoc(entry).partition("\nArgs:\n")
    if not separator:
        return text.strip()
    lines = textwrap.dedent(arguments).splitlines()
    items = [f"  {line.strip()}" if line.startswith(" ") else f"- {line}" for line in lines]
    return "\n".join([text.strip(), "", "Parameters:", "", *items])


def sentence(text: str) -> str:
    """Capitalised, with a full stop."""
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args().check
    known = set(pages())
    written = [path for folder in ("methods", "structures", "recipes") for path in (SOURCE / folder).glob("*.mdx")]
    strays = [path for path in written if f"{path.parent.name}/{path.name}" not in known]
    stale = [
        name for name, text in pages().items() if not (SOURCE / name).is_file() or (SOURCE / name).read_text() != text
    ]
    if check and (stale or strays):
        sys.exit(f"out of date, run python docs/generate.py: {', '.join([*stale, *(path.name for path in strays)])}")
    for stray in strays:
        stray.unlink()
    for name in stale:
        (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
        (SOURCE / name).write_text(pages()[name], encoding="utf-8")
        print(f"wrote {name}")
