# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli ssm`: prune, evaluate and inspect state-space language models."""

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .benchmark import BenchmarkCommand
from .compare import CompareCommand
from .eval import EvalCommand
from .inspect import InspectCommand
from .methods import MethodsCommand
from .prune import PruneCommand


class SSMCommand(BaseOptimumCLICommand):
    """The group; alone it prints its help."""

    COMMAND = CommandInfo("ssm", help="Prune, evaluate and inspect state-space language models (Mamba, Mamba-2).")
    SUBCOMMANDS = (
        CommandInfo("prune", help="Prune a model and save it.", subcommand_class=PruneCommand),
        CommandInfo("eval", help="Measure perplexity.", subcommand_class=EvalCommand),
        CommandInfo("benchmark", help="Measure size, memory and speed.", subcommand_class=BenchmarkCommand),
        CommandInfo("inspect", help="Show a checkpoint's sparsity by component.", subcommand_class=InspectCommand),
        CommandInfo(
            "compare",
            help="Prune each component by each method; table and picture.",
            subcommand_class=CompareCommand,
        ),
        CommandInfo("methods", help="List methods, allocations and families.", subcommand_class=MethodsCommand),
    )
