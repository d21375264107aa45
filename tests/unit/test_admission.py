"""Admission as an HTTP front would ask it: headers by lower-case names and an address, no gRPC anywhere."""

import subprocess
import sys
from contextlib import ExitStack

import pytest
from serving_fakes import TickingClock

from cluster.errors import Forbidden, Overloaded, Unauthenticated, Unavailable
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.admission.api_keys import ApiKeys, new_key
from cluster.serving.admission.keyless import KeylessLimits

PEER = "192.0.2.7"


def answer(admission, headers, peer=PEER):
    """One request for tokens; returns its HTTP status and its client."""
    try:
        with admission.call(headers, peer) as client, admission.generation(client):
            return 200, client
    except (Forbidden, Overloaded, Unauthenticated, Unavailable) as error:
        return error.http_status, str(error)


@pytest.fixture
def keyed(tmp_path):
    """Returns an admission with the key of alice, for one call at a time and 60 tokens a minute, and her headers."""
    secret, line = new_key("alice")
    (tmp_path / "keys").write_text(f"{line} concurrent=1 tokens_per_minute=60")
    clock = TickingClock()
    limits = AdmissionLimits(keyless=KeylessLimits(calls_per_minute=3))
    return Admission(ApiKeys(tmp_path / "keys", clock), limits, clock=clock), {"authorization": f"Bearer {secret}"}


def test_a_key_in_the_headers_is_the_client_and_none_or_a_wrong_one_is_401_then_429(keyed):
    admission, headers = keyed
    assert answer(admission, headers | {"x-client-id": "bob"}) == (200, "alice")
    for refused in ({}, {"authorization": "Bearer guess"}, {"x-client-id": "alice"}):
        assert answer(admission, refused)[0] == 401
    assert answer(admission, {})[0] == 429
    assert answer(admission, headers) == (200, "alice")


def test_a_key_is_held_to_its_limits(keyed):
    """100 tokens of 60 leave -40: 41 s until there is one again."""
    admission, headers = keyed
    with admission.call(headers, PEER):
        assert "concurrent=1" in answer(admission, headers)[1]
    admission.spend("alice", 100)
    assert answer(admission, headers)[1].endswith("tokens_per_minute=60: try again in 41.0 s")


def test_without_keys_a_client_is_its_own_name_else_the_proxys_word_else_its_address():
    admission = Admission()
    assert answer(admission, {"x-client-id": "team", "x-forwarded-for": "198.51.100.4"}) == (200, "team")
    assert answer(admission, {"x-forwarded-for": "198.51.100.4"}) == (200, "198.51.100.4")
    assert answer(admission, {}) == (200, PEER)


def test_calls_room_streams_and_draining_refuse_each_with_its_status():
    """Room for two generations and three calls; one client may have one generation at a time."""
    limits = AdmissionLimits(max_calls=3, max_streams_per_client=1)
    admission = Admission(limits=limits, room=lambda: 2, clock=TickingClock())
    with ExitStack() as running:
        for name in ("a", "b"):
            client = running.enter_context(admission.call({"x-client-id": name}, PEER))
            running.enter_context(admission.generation(client))
        assert admission.num_running == 2
        assert "as many as it may" in answer(admission, {"x-client-id": "a"})[1]
        assert answer(admission, {"x-client-id": "c"}) == (
            429,
            "all attention replicas are full: try again in 0.1 s",
        )
        running.enter_context(admission.call({}, PEER))
        assert "has 3 requests" in answer(admission, {})[1]
    assert admission.num_running == 0
    assert answer(admission, {"x-client-id": "a"}) == (200, "a")
    admission.drain()
    assert answer(admission, {})[0] == 503
    with admission.call({}, PEER):
        pass  # draining ends no call that asks for no tokens


def test_an_accepted_generation_begins_while_draining_where_there_is_room():
    admission = Admission(room=lambda: 1, clock=TickingClock())
    admission.drain()
    with admission.generation("a", accepted=True):
        assert admission.num_running == 1
        with pytest.raises(Overloaded, match="full"), admission.generation("b", accepted=True):
            pass
    with pytest.raises(Unavailable, match="shutting down"), admission.generation("a"):
        pass


def test_a_front_for_this_machine_only_refuses_other_peers_whatever_their_headers_say():
    admission = Admission(local_only=True)
    assert answer(admission, {"x-forwarded-for": "127.0.0.1"})[0] == 403
    assert answer(admission, {"x-forwarded-for": "198.51.100.4"}, "::1") == (200, "198.51.100.4")


def test_admission_and_text_load_without_grpc():
    code = (
        "import sys, cluster.serving.admission.admission, cluster.serving.service\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'grpc' or name.startswith('cluster.pb')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("seconds", "written"), [(0.1, "0.1"), (1.0, "1.0"), (41.04, "41.0"), (60.0, "60.0")])
def test_a_refusal_for_a_while_says_and_carries_how_long(seconds, written):
    error = Overloaded.later("the queue is full", seconds)
    assert str(error) == f"the queue is full: try again in {written} s"
    assert error.retry_after_s == seconds
