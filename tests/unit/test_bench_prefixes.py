"""`moe-cluster bench prefixes`: its loads, and the figures that it computes from what servers tell. On fakes."""

import argparse
import json
import random
from collections import Counter
from itertools import count
from types import SimpleNamespace

import pytest

from cluster.bench import prefixes
from cluster.bench.command import run, with_part
from cluster.bench.prefixes import Turn, drawn, measure, summarize
from cluster.cli import main
from cluster.errors import SetupError, Unavailable

NUMBERS = {
    "conversations": 3, "turns": 2, "concurrency": 1, "prompt_tokens": 4, "output_tokens": 2, "systems": 2,
    "system_tokens": 8, "repeat": 2, "seed": 1,
}  # fmt: skip


def arguments(**given):
    return argparse.Namespace(**{**NUMBERS, "loads": ("turns", "shared"), "against": [], "json": None, **given})


class Server:
    """Has the beginnings of all prompts that it has seen, in blocks of 4 tokens, and answers with two tokens, 7 and 8.

    A request takes a second for each 4 tokens that it has not seen, on a clock of its own.
    """

    def __init__(self, fails_at=None):
        self.known, self.prompts, self.now, self.fails_at = set(), [], 0.0, fails_at

    def stream(self, prompt, params):
        assert (params.max_tokens, params.ignore_eos) == (2, True)
        self.prompts.append(prompt)
        if len(self.prompts) == self.fails_at:
            raise Unavailable("gone")
        ends = range(4, len(prompt) + 1, 4)
        cached = next((end for end in reversed(ends) if tuple(prompt[:end]) in self.known), 0)
        self.known |= {tuple(prompt[:end]) for end in ends}
        self.now += (len(prompt) - cached) / 4
        yield SimpleNamespace(token_ids=[7], usage=SimpleNamespace(prompt_tokens=0, cached_tokens=0))
        yield SimpleNamespace(token_ids=[8], usage=SimpleNamespace(prompt_tokens=len(prompt), cached_tokens=cached))


def test_turns_go_on_with_the_answers_and_find_their_beginning():
    """Of a conversation the first prompt has 4 tokens, the second 4 + 2 + 4, of which a block of 4 is known."""
    server = Server()
    [result] = measure({"a": server.stream}, arguments(loads=("turns",)), 50, lambda: None, clock=lambda: server.now)
    assert [len(prompt) for prompt in server.prompts] == [4, 10] * 6
    assert all(second[:6] == [*first, 7, 8] for first, second in zip(*[iter(server.prompts)] * 2, strict=True))
    assert (result.requests, result.failed) == (12, 0)
    assert result.hit_rate == pytest.approx(4 / 14)
    assert result.first_token_ms[0] == pytest.approx(1250)  # of 1 and 1.5 s
    assert result.tokens_per_s == pytest.approx(24 / 15)


def test_shared_beginnings_are_those_of_a_round_alone():
    server, other = Server(), Server()
    results = measure(
        {"a": server.stream, "b": other.stream}, arguments(loads=("shared",)), 50, lambda: None, clock=count().__next__
    )
    assert [result.address for result in results] == ["a", "b"]
    for asked in (server, other):
        rounds = [asked.prompts[:6], asked.prompts[6:]]
        assert {len(prompt) for prompt in asked.prompts} == {12}
        assert [len({tuple(prompt[:8]) for prompt in prompts}) for prompts in rounds] == [2, 2]
    assert not {tuple(prompt) for prompt in server.prompts} & {tuple(prompt) for prompt in other.prompts}


def test_loads_are_as_many_requests():
    for load in ("turns", "shared"):
        conversations = drawn(load, arguments(), 50, random.Random(0))
        assert sum(len(conversation) for conversation in conversations) == 6


def test_a_request_that_fails_is_counted_and_named():
    server = Server(fails_at=2)
    [result] = measure({"a": server.stream}, arguments(loads=("turns",)), 50, lambda: None)
    assert (result.requests, result.failed, result.errors) == (12, 1, ("gone",))


def test_figures_leave_failed_requests_out():
    turns = [
        Turn(first_token_s=1.0, num_tokens=3, prompt_tokens=10, cached_tokens=5), Turn(error="x"),
        Turn(first_token_s=3.0, num_tokens=1, prompt_tokens=30, cached_tokens=25),
    ]  # fmt: skip
    result = summarize("turns", "a", turns, took_s=2.0)
    assert (result.hit_rate, result.first_token_ms[0], result.tokens_per_s, result.failed) == (0.75, 2000.0, 2.0, 1)


class Client:
    def __init__(self, server, *, serves=True):
        self.stream, self.serves = server.stream, serves

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def is_serving(self, timeout_s):
        return self.serves

    def model_info(self):
        return SimpleNamespace(max_model_len=64, vocab_size=50)


def test_the_command_prints_a_line_a_load_and_server(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(prefixes.options, "connect", lambda args, **_: Client(Server()))
    argv = with_part(["bench", "prefixes", "--against", "b:2", "--json", str(tmp_path / "result.json")])
    argv += [word for name, number in NUMBERS.items() for word in (f"--{name.replace('_', '-')}", str(number))]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert Counter(line.split()[3] for line in shown.splitlines() if "| turns" in line or "| shared" in line) == {
        "127.0.0.1:9000": 2, "b:2": 2
    }  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text())[0]["hit_rate"] == pytest.approx(4 / 14)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"turns": 0}, "--turns is 0, at least 1"),
        ({"system_tokens": -1}, "--system-tokens is -1"),
        ({"against": ["http://x"]}, "HOST:PORT is needed"),
        ({"conversations": 1_000_000, "prompt_tokens": 1 << 20}, "make"),
        ({"turns": 2_000_000}, "--turns has"),
        ({"turns": 11}, "the longest prompt and answer have 66 tokens, the context has 64"),
        ({"system_tokens": 59}, "the longest prompt and answer have 65 tokens"),
    ],
)
def test_it_refuses(monkeypatch, given, message):
    monkeypatch.setattr(prefixes.options, "connect", lambda args, **_: Client(Server()))
    with pytest.raises(SetupError, match=message):
        run(arguments(bench="prefixes", address="a:1", **given))


def test_a_server_that_does_not_serve_is_named(monkeypatch):
    monkeypatch.setattr(prefixes.options, "connect", lambda args, **_: Client(Server(), serves=args.address == "a:1"))
    with pytest.raises(Unavailable, match="no server is ready at b:2"):
        run(arguments(bench="prefixes", address="a:1", against=["b:2"]))
