"""Prompts that begin alike go to the replica that has their beginning: digests, the memory of places, the choice."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from engine_fakes import request
from hypothesis import given
from hypothesis import strategies as st

from cluster.runtime.front import prefix_balancer
from cluster.runtime.front.prefix_balancer import MAX_EXCESS, MAX_REPLICAS, STEP, STOPS, PrefixBalancer, digests_of

SYSTEM = tuple(range(1000, 1000 + 512))  # worth all requests more that there may be
NAMES = ("a", "b", "c")


def balancer_of(*names, **options):
    balancer = PrefixBalancer(**options)
    balancer.serve(names or NAMES)
    return balancer


def asked(prompt, **given):
    return replace(request("r", prompt), **given)


def send(balancer, prompt, replica, output=(), **given):
    """A request that `replica` takes and answers; returns the choice before."""
    choice = balancer.choose(asked(prompt, **given))
    balancer.taken(choice, replica)
    choice.output_token_ids += output
    balancer.ended(choice)
    return choice


@given(st.lists(st.integers(0, 3), max_size=80), st.lists(st.integers(0, 3), max_size=80))
def test_digests_are_alike_as_far_as_whole_steps_are(first, second):
    common = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
    common = min(len(first), len(second)) if common is None else common
    pairs = list(zip(digests_of(first), digests_of(second), strict=False))
    assert [a == b for a, b in pairs] == [(i + 1) * STEP <= common for i in range(len(pairs))]
    assert len(digests_of(first)) == len(first) // STEP


def test_steps_grow_with_the_beginning():
    """From 1,024 tokens on a step is the largest multiple of 16 within a 32nd of what lies before."""
    assert STOPS[:3] == (16, 32, 48)
    assert STOPS[63:67] == (1024, 1056, 1088, 1120)
    assert all(b - a <= max(STEP, a / 32) for a, b in pairwise(STOPS))
    assert len(digests_of(range(4096))) == 115
    assert len(digests_of(range(200_000))) == len(STOPS)


def test_a_beginning_goes_where_it_was_computed():
    balancer = balancer_of()
    send(balancer, SYSTEM, "b")
    assert balancer.choose(asked([*SYSTEM, 1, 2])).wanted == f"b+{MAX_EXCESS}"
    assert balancer.choose(asked(SYSTEM[:100])).wanted == "b+1"  # 96 tokens are worth one request
    assert balancer.choose(asked(SYSTEM[:40])).wanted == "b+0"


def test_the_next_turn_goes_where_the_last_answer_was_made():
    """Another conversation of the same beginning is at c, with another answer."""
    balancer = balancer_of()
    send(balancer, SYSTEM, "a", output=range(100))
    send(balancer, SYSTEM, "c", output=range(200, 300))
    assert balancer.choose(asked([*SYSTEM, *range(100), 7])).wanted == f"a+{MAX_EXCESS}"
    assert balancer.choose(asked([*SYSTEM, *range(200, 300), 7])).wanted == f"c+{MAX_EXCESS}"


def test_among_several_that_have_it_the_rest_of_the_prompt_chooses_at_all_ingresses_alike():
    first, second = balancer_of(), balancer_of("c", "b", "a")
    for balancer, order in ((first, "abc"), (second, "cab")):
        for name in order:
            send(balancer, SYSTEM, name)
    chosen = [
        [balancer.choose(asked([*SYSTEM, *[number] * STEP])).wanted for number in range(60)]
        for balancer in (first, second)
    ]
    assert chosen[0] == chosen[1]
    assert len(Counter(chosen[0])) == 3
    names = [word.split("+") for word in chosen[0][0].split()]
    assert [int(excess) for _, excess in names] == [1, 1, 1, MAX_EXCESS, MAX_EXCESS, MAX_EXCESS]
    assert sorted(name for name, _ in names[:3]) == ["a", "b", "c"]


def test_a_new_beginning_has_its_replica_too_where_that_one_is_hardly_busier():
    wanted = [
        balancer_of(*names).choose(asked([number] * STEP)).wanted for number in range(60) for names in ("abc", "cba")
    ]
    assert wanted[::2] == wanted[1::2]
    assert set(wanted) == {"a+1", "b+1", "c+1"}


@pytest.mark.parametrize(
    ("names", "given", "options"),
    [
        ("abc", {}, {"on": False}),
        ("a", {}, {}),
        ("abc", {"wants": "token_logprobs"}, {}),
        ("abc", {"prompt_token_ids": (1,) * (STEP - 1)}, {}),
        ("abc", {"num_replays": 1}, {}),
    ],
    ids=["by load", "one replica", "every row is needed", "a short prompt", "it goes on elsewhere"],
)
def test_a_request_may_go_anywhere(names, given, options):
    balancer = balancer_of(*names, **options)
    send(balancer, SYSTEM, "a")
    assert balancer.choose(asked(given.pop("prompt_token_ids", SYSTEM), **given)).wanted == ""


def test_a_request_that_goes_on_elsewhere_is_known_there():
    balancer = balancer_of()
    send(balancer, SYSTEM, "a")
    balancer.serve("bc")
    send(balancer, SYSTEM, "c", output=range(50), num_replays=1, output_token_ids=tuple(range(900, 950)))
    assert balancer.choose(asked([*SYSTEM, *range(900, 950), *range(50)])).wanted == f"c+{MAX_EXCESS}"


def test_adapters_share_no_beginning():
    balancer = balancer_of()
    send(balancer, SYSTEM, "a", adapter="french")
    assert not balancer.choose(asked(SYSTEM)).known
    assert balancer.choose(asked(SYSTEM, adapter="french")).known == ["a"]


def test_a_replica_that_is_gone_is_not_named_and_a_shorter_beginning_elsewhere_counts():
    balancer = balancer_of()
    send(balancer, [*SYSTEM, *range(64)], "a")
    send(balancer, SYSTEM, "b")
    assert balancer.choose(asked([*SYSTEM, *range(64)])).known == ["a"]
    balancer.serve("bc")
    assert balancer.choose(asked([*SYSTEM, *range(64)])).known == ["b"]


def test_outcomes_are_counted():
    outcomes = []
    balancer = balancer_of(count=outcomes.append)
    for replica in ("a", "a", "b", "b"):
        send(balancer, SYSTEM, replica)
    send(balancer, [1, 2, 3], "a")
    assert outcomes == ["new", "hit", "busy", "hit"]


def test_the_memory_is_bounded(monkeypatch):
    """Ten digests each: the ends of the longest unused prompts go first, what others begin with stays."""
    monkeypatch.setattr(prefix_balancer, "MAX_DIGESTS", 20)
    balancer = balancer_of()
    for number in range(4):
        send(balancer, [*SYSTEM[: 5 * STEP], *[number] * (5 * STEP)], "a")
    assert len(balancer._places) == 20
    assert balancer.choose(asked([*SYSTEM[: 5 * STEP], *[3] * (5 * STEP)])).known == ["a"]
    oldest = balancer.choose(asked([*SYSTEM[: 5 * STEP], *[0] * (5 * STEP)])).wanted
    assert oldest == "a+1"  # 80 tokens, and not 160
    for number in range(2 * MAX_REPLICAS):
        send(balancer, SYSTEM[:STEP], str(number))
    assert {len(names) for names in balancer._places.values()} == {1, MAX_REPLICAS}
