"""The help of each command, and the lines that `moe-cluster scale` shows while it waits."""

import argparse
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cluster.cli import _parser, running


def options(parser, command="moe-cluster"):
    """(command, option) of this parser and of all parsers below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(below, f"{command} {name}")
        else:
            yield command, action


def has_default(action):
    """A value is used where none is given; an empty text or list is none, and 0 is one."""
    default = action.default
    return default != argparse.SUPPRESS and (type(default) in (int, float) or bool(default))


def test_each_option_has_a_help_text_which_says_its_default():
    silent = [
        f"{command} {'/'.join(action.option_strings) or action.dest}"
        for command, action in options(_parser())
        if not action.help or (has_default(action) and "default" not in action.help)
    ]
    assert silent == []


def test_a_number_that_may_be_left_out_has_its_meaning_in_the_help_text():
    silent = [
        f"{command} {'/'.join(action.option_strings)}"
        for command, action in options(_parser())
        if action.type in (int, float)
        and action.default is None
        and not any(word in action.help for word in ("default", "unset", "instead", "of `moe-cluster serve`"))
    ]
    assert silent == []


def test_scaling_shows_each_number_of_replicas_once_on_a_line_of_its_own(monkeypatch, capsys):
    numbers = iter([1, 1, 1, 2, 2, 3, 3])
    cluster = SimpleNamespace(
        scale_attention=lambda wanted: f"{wanted} attention replicas are asked for",
        attention_replicas=lambda: next(numbers),
    )
    monkeypatch.setattr(running, "_running", lambda args: nullcontext(cluster))
    monkeypatch.setattr(running.time, "sleep", lambda seconds: None)
    assert running._scale(argparse.Namespace(expert_shards=None, attention_replicas=3)) == 0
    shown = capsys.readouterr()
    assert shown.out == "3 attention replicas are asked for\n"
    assert shown.err == "1 of 3 run\n2 of 3 run\n3 attention replicas run\n"


@pytest.mark.parametrize("named", ["Qwen2-MoE", "dense Qwen2"])
def test_the_description_names_both_families(named):
    assert named in _parser().description
