# Copyright 2026 The optimum_ssm authors. All rights reserved.
# SPDX-License-Identifier: Apache-2.0
"""`optimum-ssm …` and `python -m optimum_ssm …`: the same commands as `optimum-cli ssm …`."""

from argparse import ArgumentParser

from .commands.ssm import SSMCommand
from .version import __version__


def main() -> None:
    """Parse the command line and run the command; without one, print the help and exit with 1."""
    parser = ArgumentParser("optimum-ssm", description=SSMCommand.COMMAND.help)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND")
    for info in SSMCommand.SUBCOMMANDS:
        info.subcommand_class(commands, command=info)
    args = parser.parse_args()
    if not hasattr(args, "func"):
        parser.print_help()
        parser.exit(1)
    args.func(args).run()


if __name__ == "__main__":
    main()
