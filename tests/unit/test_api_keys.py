"""The file of API keys, its callers and their limits. Times are seconds of a clock that the test moves."""

import hashlib
import logging
import os

import pytest
from serving_fakes import TickingClock

from cluster.errors import Overloaded, SetupError, Unauthenticated
from cluster.serving.admission.api_keys import ApiKeys, new_key, parse_keys

ALICE, BOB = "moe-alice", "moe-bob"


def line(name, key, *limits):
    return " ".join((name, hashlib.sha256(key.encode()).hexdigest(), *limits)) + "\n"


@pytest.fixture
def clock():
    return TickingClock()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "keys"
    path.write_text(line("alice", ALICE) + line("bob", BOB))
    return path


@pytest.fixture
def keys(file, clock):
    return ApiKeys(file, clock)


def limited(tmp_path, clock, *limits):
    path = tmp_path / "limited"
    path.write_text(line("alice", ALICE, *limits) + line("bob", BOB))
    return ApiKeys(path, clock)


def ask(keys, name="alice"):
    with keys.admitted(name):
        pass


# The file


def test_a_file_of_names_hashes_limits_and_comments_is_read():
    text = (
        f"# clients\n\n{line('alice', ALICE, 'requests_per_minute=60', 'concurrent=2')}{line('bob', BOB)}  # by hand\n"
    )
    alice, bob = parse_keys(text, "keys")
    assert (alice.name, alice.requests_per_minute, alice.concurrent, alice.tokens_per_minute) == ("alice", 60, 2, 0)
    assert alice.sha256 == hashlib.sha256(ALICE.encode()).digest()
    assert (bob.name, bob.concurrent) == ("bob", 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["keys has no key", "keys new"]),
        ("# nobody\n", ["has no key"]),
        ("alice\n", ["keys, line 1", "'alice'", "64 hex digits"]),
        (f"alice {'0' * 63}\n", ["line 1", "64 hex digits"]),
        (f"\nalice {'x' * 64}\n", ["line 2"]),
        (f"a/b {'0' * 64}\n", ["'a/b' is no name"]),
        (f"alice {'0' * 64} requests=1\n", ["'requests=1' is no limit", "requests_per_minute, concurrent"]),
        (f"alice {'0' * 64} concurrent=0\n", ["'concurrent=0'", "from 1"]),
        (f"alice {'0' * 64} concurrent=many\n", ["'concurrent=many'"]),
        (f"alice {'0' * 64} concurrent=1 concurrent=2\n", ["'concurrent=2'", "one each"]),
        (f"alice {'0' * 64}\nalice {'1' * 64}\n", ["line 2", "'alice'", "line before"]),
        (f"alice {'0' * 64}\nbob {'0' * 64}\n", ["line 2", "'bob' or its hash"]),
    ],
)
def test_a_broken_file_is_refused_with_its_line_and_what_to_do(text, words):
    with pytest.raises(SetupError) as refused:
        parse_keys(text, "keys")
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_a_missing_file_is_refused(tmp_path, clock):
    with pytest.raises(SetupError, match=r"nothing cannot be read .*wherever an ingress runs"):
        ApiKeys(tmp_path / "nothing", clock)


def test_a_fresh_key_is_long_never_the_same_and_known_by_its_line(tmp_path, clock):
    """43 characters of base64 are 258 bits: 256 of the key."""
    (first, first_line), (second, _) = new_key("alice"), new_key("alice")
    assert first != second
    assert first.startswith("moe-")
    assert len(first) == 47
    assert first not in first_line
    path = tmp_path / "new"
    path.write_text(first_line)
    keys = ApiKeys(path, clock)
    assert keys.identify(f"Bearer {first}") == "alice"
    with pytest.raises(SetupError, match="no name"):
        new_key("alice smith")


# Callers


def test_a_key_names_its_caller(keys):
    assert keys.identify(f"Bearer {ALICE}") == "alice"
    assert keys.identify(f"bearer {BOB}") == "bob"


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", ALICE, f"Basic {ALICE}"])
def test_a_caller_without_a_key_hears_how_to_send_one(keys, authorization):
    with pytest.raises(Unauthenticated, match="authorization: Bearer KEY"):
        keys.identify(authorization)


@pytest.mark.parametrize("key", ["wrong", ALICE[:-1], ALICE + "x", "alice", hashlib.sha256(ALICE.encode()).hexdigest()])
def test_an_unknown_key_is_refused_without_saying_it_again(keys, key):
    with pytest.raises(Unauthenticated, match="not known") as refused:
        keys.identify(f"Bearer {key}")
    assert key not in str(refused.value).split()


def test_every_hash_is_compared_in_constant_time_whichever_is_found(keys, monkeypatch):
    compared = []

    def compare(known, given):
        compared.append(known)
        return known == given

    monkeypatch.setattr("cluster.serving.admission.api_keys.compare_digest", compare)
    assert keys.identify(f"Bearer {ALICE}") == "alice"
    assert len(compared) == 2


# When the file changes


def test_a_changed_file_is_read_again_after_a_second(keys, file, clock):
    file.write_text(line("carol", "moe-carol"))
    assert keys.identify(f"Bearer {ALICE}") == "alice"
    clock.now_s += 1.0
    assert keys.identify("Bearer moe-carol") == "carol"
    with pytest.raises(Unauthenticated):
        keys.identify(f"Bearer {ALICE}")


def test_a_link_that_leads_to_another_file_counts_as_changed(tmp_path, clock):
    """As Kubernetes changes a mounted Secret: same size, and the times may be the same too."""
    for name, key in (("first", ALICE), ("second", BOB)):
        (tmp_path / name).write_text(line("alice", key))
        os.utime(tmp_path / name, (1, 1))
    link = tmp_path / "keys"
    link.symlink_to(tmp_path / "first")
    keys = ApiKeys(link, clock)
    link.unlink()
    link.symlink_to(tmp_path / "second")
    clock.now_s += 1.0
    assert keys.identify(f"Bearer {BOB}") == "alice"


@pytest.mark.parametrize("broken", ["alice\n", "", None])
def test_a_broken_new_file_leaves_the_old_keys_and_an_error_in_the_log(keys, file, clock, caplog, broken):
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    clock.now_s += 1.0
    with caplog.at_level(logging.ERROR, logger="cluster"):
        assert keys.identify(f"Bearer {ALICE}") == "alice"
    assert "stay as they were" in caplog.text
    assert str(file) in caplog.text
    file.write_text(line("carol", "moe-carol"))
    clock.now_s += 1.0
    assert keys.identify("Bearer moe-carol") == "carol"


# How much


def test_requests_of_a_minute_may_come_at_once_and_then_one_at_a_time(tmp_path, clock):
    """3 a minute: one every 20 s. 5 s after the third, 15 s are left."""
    keys = limited(tmp_path, clock, "requests_per_minute=3")
    for _ in range(3):
        ask(keys)
    clock.now_s += 5.0
    with pytest.raises(Overloaded, match=r"key 'alice' .*requests_per_minute=3: try again in 15\.0 s") as refused:
        ask(keys)
    assert refused.value.retry_after_s == pytest.approx(15.0)
    ask(keys, "bob")  # has no limit
    clock.now_s += 15.0
    ask(keys)
    with pytest.raises(Overloaded):
        ask(keys)


def test_unused_requests_are_not_saved_up(tmp_path, clock):
    keys = limited(tmp_path, clock, "requests_per_minute=2")
    clock.now_s += 3600.0
    for _ in range(2):
        ask(keys)
    with pytest.raises(Overloaded):
        ask(keys)


def test_a_place_is_free_again_when_its_request_ends_also_by_an_error(tmp_path, clock):
    keys = limited(tmp_path, clock, "concurrent=1")
    with pytest.raises(ValueError), keys.admitted("alice"):
        with pytest.raises(Overloaded, match=r"concurrent=1: try again in 1\.0 s"):
            ask(keys)
        raise ValueError
    ask(keys)


def test_a_request_that_is_refused_for_one_limit_does_not_count_for_another(tmp_path, clock):
    keys = limited(tmp_path, clock, "concurrent=1", "requests_per_minute=2")
    with keys.admitted("alice"), pytest.raises(Overloaded, match="concurrent"):
        ask(keys)
    ask(keys)
    with pytest.raises(Overloaded, match="requests_per_minute"):
        ask(keys)


def test_tokens_are_counted_when_a_request_ends_and_the_next_one_waits_for_them(tmp_path, clock):
    """60 a minute, one a second. 100 spent at once leave -40: 41 s until there is one."""
    keys = limited(tmp_path, clock, "tokens_per_minute=60")
    ask(keys)
    keys.spend("alice", 100)
    with pytest.raises(Overloaded, match=r"tokens_per_minute=60: try again in 41\.0 s"):
        ask(keys)
    clock.now_s += 41.0
    ask(keys)
    keys.spend("bob", 10**6)
    ask(keys, "bob")


def test_a_new_hash_for_a_name_keeps_its_use(tmp_path, clock):
    keys = limited(tmp_path, clock, "requests_per_minute=1")
    ask(keys)
    (tmp_path / "limited").write_text(line("alice", "moe-rotated", "requests_per_minute=1"))
    clock.now_s += 1.0
    assert keys.identify("Bearer moe-rotated") == "alice"
    with pytest.raises(Overloaded):
        ask(keys)


def test_a_request_of_a_key_that_is_taken_away_goes_on(keys, file, clock):
    with keys.admitted("bob"):
        file.write_text(line("alice", ALICE))
        clock.now_s += 1.0
        keys.identify(f"Bearer {ALICE}")
    keys.spend("bob", 10)
