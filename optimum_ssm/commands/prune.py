# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`ssm prune MODEL`: the whole way from a checkpoint to a pruned one."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..configuration import SSMPrunerConfig, parse_recipe
from ..errors import ConfigurationError
from ..methods import METHODS
from ..methods.structures import STRUCTURES
from ..recipes import OVERRIDES, load_recipe, recipe_names
from ..sparsity.allocations import ALLOCATIONS
from .base import SSMLeafCommand, add_loading_flags, add_perplexity_flags, loading_kwargs, perplexity_kwargs
from .flags import add_flags, given


class PruneCommand(SSMLeafCommand):
    """Load, prune, measure if asked, save and push if asked."""

    resume_from: str | None = None
    saved = False

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Flags of the config, of loading, of the output and of the measurement."""
        parser.add_argument("model", help="Hub id or directory, in transformers or original state-spaces format")
        parser.add_argument("-o", "--output", required=True, help="directory for the pruned checkpoint")
        parser.add_argument("--overwrite", action="store_true", help="replace a non-empty output directory")
        parser.add_argument(
            "--recipe",
            help="instead of the pruning flags, apart from budget and text: YAML or JSON file with one or more passes, or "
            f"one of: {', '.join(recipe_names())}",
        )
        parser.add_argument("--evaluate", metavar="DATASET", help="measure perplexity before and after on this text")
        parser.add_argument("--push-to-hub", metavar="REPO_ID", help="also upload the result, card included")
        parser.add_argument("--private", action="store_true", default=None, help="make the new repository private")
        parser.add_argument(
            "--remote-code",
            action="store_true",
            help="put the modelling code beside a result that no class of transformers can load",
        )
        names = {"method": sorted({*METHODS.names(), *STRUCTURES.names()}), "allocation": ALLOCATIONS.names()}
        add_flags(parser, SSMPrunerConfig, names)
        add_perplexity_flags(parser)
        add_loading_flags(parser)

    def execute(self, args: Namespace) -> None:
        """Refuse what can be refused before the model is loaded, then do the work."""
        flags = given(args, SSMPrunerConfig)
        if args.recipe is not None and (taken := {name for name in flags if name not in OVERRIDES}):
            raise ConfigurationError(f"--recipe already says what to prune; leave out {', '.join(_spelled(taken))}")
        recipe = load_recipe(args.recipe, **flags) if args.recipe is not None else parse_recipe(flags)
        from ..calibration.ranks import current_ranks
        from ..hub.directory import check_free
        from ..pruner import SSMPruner

        check_free(Path(args.output), args.overwrite)
        if Path(args.model).is_dir() and Path(args.model).resolve() == Path(args.output).resolve():
            raise ConfigurationError(
                f"--output is the model's own directory {args.output}: the dense model would be lost"
            )
        self.resume_from = _resume_from(recipe, args.output)
        say = print if current_ranks().main else lambda text: None  # under `accelerate launch` one process speaks
        pruner = SSMPruner.from_pretrained(args.model, recipe, **loading_kwargs(args))
        if args.evaluate is not None:
            pruner.evaluate(args.evaluate, **perplexity_kwargs(args))
        pruner.prune()
        if args.evaluate is not None:
            pruner.evaluate(args.evaluate, **perplexity_kwargs(args))
        say(pruner.report)
        pruner.save_pretrained(args.output, overwrite=args.overwrite, remote_code=args.remote_code)
        self.saved = True
        say(f"saved to {args.output}")
        if args.push_to_hub is not None:
            where = {"private": args.private, "token": args.token, "remote_code": args.remote_code}
            say(f"pushed to {pruner.push_to_hub(args.push_to_hub, **where)}")

    def left_behind(self, args: Namespace) -> str:
        """The saved model, or the finished blocks of `--resume-from`."""
        if self.saved:
            upload = f", the upload to {args.push_to_hub} may not be complete" if args.push_to_hub is not None else ""
            return f"the model is saved to {args.output}{upload}"
        if self.resume_from is not None and os.path.isdir(self.resume_from):
            return f"no model was saved; finished blocks are in {self.resume_from}, and the same command goes on with the others"
        return super().left_behind(args)


def _resume_from(recipe: list[SSMPrunerConfig], output: str) -> str | None:
    """Where finished blocks go; not where the model goes, which would be found out after the work."""
    target = Path(output).resolve()
    for config in recipe:
        place = None if config.resume_from is None else Path(config.resume_from).resolve()
        if place is not None and target in (place, *place.parents):
            raise ConfigurationError(
                f"resume_from={str(config.resume_from)!r} lies in the output directory {output}; give another"
            )
    return next((config.resume_from for config in recipe if config.resume_from is not None), None)


def _spelled(flags: set[str]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name in sorted(flags)]
