"""The command that looks at a machine and an installation. Runs where packages of the other commands are missing."""

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict


def parser(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the command's options to its parser."""
    command.add_argument("--json", action="store_true", help="print one JSON object")
    return command


def _looking() -> AbstractContextManager[object]:
    """Shows that the command is at work, where rich is there for it."""
    try:
        from cluster.working import Working
    except ImportError:
        return nullcontext()
    return Working("looking at this machine and installation …")


def run(args: argparse.Namespace, failure: ImportError | None = None) -> int:
    """Returns 0 where a cluster can be served, 1 where something is missing for that.

    failure: of the other commands' import.
    """
    from cluster.doctor import Finding, examine

    with _looking():
        findings = examine()
    if failure is not None:
        advice = "install what is missing, or all again: pip install --force-reinstall moe-cluster"
        findings.append(Finding("commands", f"cannot be imported: {failure}", advice, missing=True))
    can_serve = not any(finding.missing for finding in findings)
    if args.json:
        print(json.dumps({"can_serve": can_serve, "findings": [asdict(finding) for finding in findings]}, indent=2))
        return 0 if can_serve else 1
    try:
        from cluster.console.offline import print_findings
    except ImportError:  # no rich
        for finding in findings:
            print(finding)
    else:
        print_findings(findings)
    return 0 if can_serve else 1
