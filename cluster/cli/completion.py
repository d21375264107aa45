"""The command that teaches a shell the names of commands and options: completion."""

import argparse
from collections.abc import Callable

from cluster.cli.arguments import Commands, add_command

WHERE = """\
bash: eval "$(moe-cluster completion bash)" in ~/.bashrc
zsh:  moe-cluster completion zsh > a folder of $fpath/_moe-cluster
fish: moe-cluster completion fish > ~/.config/fish/completions/moe-cluster.fish
"""
SHELLS = ("bash", "zsh", "fish")


def add_commands(commands: Commands, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """parser: makes the whole command line's."""
    command = add_command(
        commands, "completion", lambda args: _completion(args, parser()), "print the completion of commands for a shell"
    )
    command.epilog, command.formatter_class = WHERE, argparse.RawDescriptionHelpFormatter
    command.add_argument("shell", choices=SHELLS, help="whose completion")


def _completion(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import shtab

    for each in _parsers(parser):
        for action in each._actions:
            if action.metavar in ("FILE", "OUT"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.metavar in ("MODEL", "DENSE"):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and all that are below it."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found += _parsers(below)
    return found
