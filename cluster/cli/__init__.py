"""The command line. Reads arguments and the environment, and prints; other parts do the work.

Each file has the commands of one kind: `serving` starts a cluster, `chat`, `generate` and `batch` talk with one,
`running` look at one and change it, `offline` need none, `checkpoints` make a checkpoint from another, `evaluate`
measures one, `completion` is for shells. `arguments` and `sampling` have the options that they share, `terminal` runs
each of them.
Exit codes: 0 done, 1 a request or a bench failed, its output could not be written or the doctor found something
missing, 2 wrong usage or a set-up that cannot work, 130 Ctrl-C, 141 the output's reader has gone.
"""

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn

from cluster.cli import doctor, terminal
from cluster.errors import ClusterError, SetupError
from cluster.version import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

EPILOG = """\
a first look, on any machine:   moe-cluster demo
a model by its name:            moe-cluster serve Qwen/Qwen1.5-MoE-A2.7B-Chat
your own checkpoint:            moe-cluster serve /path/to/it
then, in another terminal:      moe-cluster chat
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    return terminal.run(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    try:
        given = terminal.arguments(argv)
        try:
            parser = _parser()
        except ImportError as error:  # an installation with holes
            if given[:1] == ["doctor"]:
                command = doctor.parser(argparse.ArgumentParser(prog="moe-cluster doctor"))
                return doctor.run(command.parse_args(given[1:]), error)
            raise SetupError(f"{error}: `moe-cluster doctor` shows what this installation lacks") from error
        from cluster.bench.command import with_part

        args = parser.parse_args(with_part(given))
        code: int = args.run(args)
        return code
    except SetupError as error:
        terminal.complain(error)
        return 2
    except ClusterError as error:
        terminal.complain(error)
        return 1
    except KeyboardInterrupt:
        return 130


class _Parser(argparse.ArgumentParser):
    """Says wrong usage in one line, where argparse prints up to twenty; writes help and version as any other output,
    where argparse would not notice that it cannot be written."""

    def error(self, message: str) -> NoReturn:
        terminal.complain(f"{message}: see `{self.prog} --help`")
        self.exit(2)

    def _print_message(self, message: str, file: "SupportsWrite[str] | None" = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    """Raises ImportError where a package that the commands need is missing."""
    from cluster import bench
    from cluster.cli import batch, checkpoints, completion, evaluate, generate, offline, running, serving
    from cluster.cli.arguments import add_command
    from cluster.cli.chat import command as chat

    parser: argparse.ArgumentParser = _Parser(
        prog="moe-cluster",
        description="Serve Qwen2-MoE and dense Qwen2 models on Ray, attention and experts in processes of their own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    serving.add_commands(commands)
    chat.add_commands(commands)
    generate.add_commands(commands)
    batch.add_commands(commands)
    running.add_commands(commands)
    offline.add_commands(commands)
    checkpoints.add_commands(commands)
    evaluate.add_commands(commands)
    completion.add_commands(commands, _parser)
    bench.add_arguments(add_command(commands, "bench", bench.run, "measure tokens/s, side by side with other engines"))
    return parser
