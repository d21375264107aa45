"""Errors as Ray and Serve wrote them (shortened), and the line that a user needs."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.errors import SetupError
from cluster.runtime.last_words import MAX_CHARS, last_words
from cluster.runtime.start import failure as module
from cluster.runtime.start.failure import why_not_started

SERVE = "Deploying application moe-cluster failed: Failed to update the deployments ['AttentionReplica']."
NO_MEMORY = """\
The deployment failed to start 3 times in a row. See controller logs for details. Error:
\x1b[36mray::ServeReplica:moe-cluster:AttentionReplica.initialize_and_get_metadata()\x1b[39m (pid=708, ip=127.0.0.1)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "attention_replica.py", line 87, in __init__
    self._engine_pid: int = await self.engine.ready.remote()
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, \x1b[36mray::EngineActor
  File "_refs/__init__.py", line 5311, in empty_like
    return torch.empty_permuted(
RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to \
allocate 35184372072448 bytes. Error code 12 (Cannot allocate memory)

The above exception was the direct cause of the following exception:

cluster.errors.SetupError: attention replica 4jz: the engine did not start: The actor died because of an error raised \
in its creation task, \x1b[36mray::EngineActor.__init__()\x1b[39m (pid=765)
"""
DAMAGED = """\
RuntimeError: Traceback (most recent call last):
safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered

The above exception was the direct cause of the following exception:

cluster.errors.CheckpointError: /m/model.safetensors is not a complete safetensors file (…): download it again
"""
KILLED = """\
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
    The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. The process was killed by SIGKILL by OOM killer.

cluster.errors.SetupError: attention replica 4jz: the engine did not start: The actor died unexpectedly before finishing
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            NO_MEMORY,
            "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 35184372072448 bytes. Error code 12 (Cannot allocate memory)",
        ),
        (DAMAGED, "/m/model.safetensors is not a complete safetensors file (…): download it again"),
        (
            KILLED,
            "Worker unexpectedly exits with a connection error code 2. End of file. The process was killed by SIGKILL "
            "by OOM killer.",
        ),
        ("ray.exceptions.OutOfMemoryError: Task was killed: no room", "OutOfMemoryError: Task was killed: no room"),
        (SERVE, ""),
        ("", ""),
    ],
    ids=["no memory", "damaged file", "killed", "killed by Ray", "Serve's own", "nothing"],
)  # fmt: skip
def test_the_line_that_says_why_is_found(text: str, expected: str) -> None:
    assert last_words(text) == expected


def test_a_word_without_end_is_cut() -> None:
    assert last_words(f"ValueError: {'x' * 10_000}") == f"ValueError: {'x' * (MAX_CHARS - 12)} …"


def serve_says(monkeypatch: pytest.MonkeyPatch, **messages: str) -> None:
    deployments = {name: SimpleNamespace(message=message) for name, message in messages.items()}
    status = SimpleNamespace(applications={"moe-cluster": SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr(module.serve, "status", lambda: status)


def test_a_deployments_words_are_heard_through_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_says(monkeypatch, Ingress="", AttentionReplica=DAMAGED)
    found = why_not_started(RuntimeError(SERVE), "moe-cluster", lambda: SimpleNamespace(failure=""))  # type: ignore[arg-type,return-value]
    assert found == "/m/model.safetensors is not a complete safetensors file (…): download it again"


def test_the_controllers_failure_goes_first_and_haproxys_alert_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_says(monkeypatch, AttentionReplica=NO_MEMORY)
    status: Any = lambda: SimpleNamespace(failure="shard 1 cannot load")  # noqa: E731
    assert why_not_started(RuntimeError(SERVE), "moe-cluster", status) == "shard 1 cannot load"
    alert = "HAProxy did not start:\n[ALERT] (12) : cannot bind socket\nmore"
    assert why_not_started(RuntimeError(alert), "moe-cluster", status) == "[ALERT] (12) : cannot bind socket"


def test_without_anything_else_serves_last_line_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_says(monkeypatch)

    def status() -> Any:
        raise SetupError("there is no expert controller")

    assert why_not_started(RuntimeError(f"a\n\n{SERVE}\n"), "moe-cluster", status) == SERVE
    assert why_not_started(RuntimeError(""), "other", status) == "RuntimeError('')"
