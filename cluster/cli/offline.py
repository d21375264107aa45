"""The commands that need no cluster: doctor, ray-env, keys, and plan, which is in `plan`."""

import argparse
import shlex
import sys

from cluster.cli import doctor, plan
from cluster.cli.arguments import Commands, add_command


def add_commands(commands: Commands) -> None:
    plan.add_commands(commands)

    doctor.parser(add_command(commands, "doctor", doctor.run, "show what this machine and installation have and lack"))

    add_command(commands, "ray-env", _ray_env, "print what `ray start` needs in its environment, for a shell to eval")

    keys = add_command(commands, "keys", _keys_new, "make API keys for clients")
    new = keys.add_subparsers(metavar="ACTION", required=True).add_parser(
        "new", help="print a fresh key, and its line for the file of --api-keys-file or --admin-keys-file"
    )
    new.add_argument("name", metavar="NAME", help="of its client, for logs and for turns between clients")


def _ray_env(args: argparse.Namespace) -> int:
    from cluster.runtime.front.haproxy import ray_environment

    print("umask 077")  # so that only this user can open Ray's files and sockets
    for name, value in ray_environment().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _keys_new(args: argparse.Namespace) -> int:
    from cluster.serving.admission.api_keys import new_key

    key, line = new_key(args.name)
    print(f"the key, for its user; it is kept nowhere:\n{key}\nits line for the file of keys:", file=sys.stderr)
    print(line)
    return 0
