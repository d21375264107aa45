"""The names by which processes of different versions know the classes of what they exchange: they never change."""

import importlib
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
from last_version import ROOT, write_last_version

from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList, AdapterSource
from cluster.errors import InvalidRequest, ShardUnavailable
from cluster.evolving import evolving, sent
from cluster.experts.placement import plan_evenly
from cluster.experts.pulse import Sign
from cluster.outcome import Numbers
from cluster.runtime.control.controller import ExpertController
from cluster.runtime.front.response_store import ResponseCarrier, ResponseStoreActor
from cluster.runtime.workers.engine_actor import EngineActor
from cluster.runtime.workers.protocol import ClusterRecord, Membership
from cluster.runtime.workers.shard_actor import ExpertShardActor
from cluster.serving.openai.responses.store import Contents, Page, Progress, Reply, StoredResponse, StoreLimits
from cluster.status import ClusterStatus, Fault, ProcessInfo, ReplicaStatus, ShardStatus
from cluster.stream.frames import StreamOffer
from cluster.types import EngineRequest, EngineStats, Logprobs, SamplingParams, SequenceUpdate

PLAN = plan_evenly([0, 1], 4, 2)
CONFIG = ClusterConfig(model="model", expert_shards=3)
PROCESS = ProcessInfo(pid=7, node_id="n", gpu_ids=("0",), version="1", slot=2)
SHARD = ShardStatus(
    shard_id=1, actor="g:shard-1", state="up", loaded_bytes=3, total_bytes=4, respawns=2, process=PROCESS
)
REPLICA = ReplicaStatus(
    name="r", process=PROCESS, engine=None, asked_at=1.5, epoch=3, loaded_bytes=5, total_bytes=6,
    stats=EngineStats(running=1, waiting=2, used_blocks=3, num_blocks=4, generated_tokens=5, at=6.0, held=1),
)  # fmt: skip
EXCHANGED = (
    EngineRequest(request_id="a", prompt_token_ids=(1, 2), params=SamplingParams(seed=3, stop=("x",)), client="c"),
    SequenceUpdate(request_id="a", token_ids=(4,), logprobs=(Logprobs(4, -0.5, ((4, -0.5),)),), finish_reason="stop"),
    CONFIG,
    Membership(plan=PLAN, handles={}),
    ClusterRecord(version=1.0, plan=PLAN, target=2, config=CONFIG),
    ClusterStatus(
        epoch=3, shards=(SHARD,), replicas=(REPLICA,), metrics_addresses=("http://a",), draining=True, failure="f",
        plan=PLAN, published=True, uncovered_s=2.0, target_shards=2, work="w", load=[[1.0]], imbalance=1.5,
        faults=(Fault(at=1.0, what="x"),), config=CONFIG, process=PROCESS,
    ),
    Sign(progress=1, busy=True, stuck_s=2.0),
    StreamOffer(*range(len(StreamOffer.__dataclass_fields__))),
)  # fmt: skip
# Sent only to who asks for them: the last version knows none of these.
SINCE = (
    SequenceUpdate(request_id="a", numbers=Numbers(shape=(1,), data=bytes(4)), finish_reason="stop"),
    StoredResponse(response_id="a", client="c", response="{}", items="[]", events=("e",), running=True, ending="lost"),
    Progress(response_id="a", response="{}", first=1, events=("e",), ended=True),
    Reply(store_id="s", stop=("a",)),
    Page(events=("e",), num_events=2, ended=True),
    StoreLimits(max_bytes=1, max_responses=2, max_age_s=3.0),
    AdapterList(version=1.0, adapters=(AdapterSource(name="a", directory="/a", number=3),), next_number=4),
    Contents(store_id="s", limits=StoreLimits(max_bytes=1), ages_s=(1.0,)),
)
# The last version leaves out what it does not know.
DRAINED = ClusterStatus(
    epoch=3, shards=(), replicas=(), metrics_addresses=(), draining=False, leaving=(("n", 1.0, "no room"),)
)
FAILURES = (ShardUnavailable("shard 1 died", 1), InvalidRequest("no", "n"))
ACTORS = (ExpertController, ExpertShardActor, EngineActor)
ACTORS_SINCE = (ResponseStoreActor, ResponseCarrier)
NAMES = """
    cluster.config.cluster.ClusterConfig
    cluster.config.lora.AdapterList
    cluster.config.lora.AdapterSource
    cluster.errors.InvalidRequest
    cluster.errors.ShardUnavailable
    cluster.experts.placement.PlacementPlan
    cluster.experts.pulse.Sign
    cluster.outcome.Numbers
    cluster.runtime.actors.EngineActor
    cluster.runtime.actors.ExpertShardActor
    cluster.runtime.controller.ExpertController
    cluster.runtime.protocol.ClusterRecord
    cluster.runtime.protocol.ClusterStatus
    cluster.runtime.protocol.Fault
    cluster.runtime.protocol.Membership
    cluster.runtime.protocol.ProcessInfo
    cluster.runtime.protocol.ReplicaStatus
    cluster.runtime.protocol.ShardStatus
    cluster.runtime.front.response_store.ResponseCarrier
    cluster.runtime.front.response_store.ResponseStoreActor
    cluster.serving.openai.responses.store.Contents
    cluster.serving.openai.responses.store.Page
    cluster.serving.openai.responses.store.Progress
    cluster.serving.openai.responses.store.Reply
    cluster.serving.openai.responses.store.StoreLimits
    cluster.serving.openai.responses.store.StoredResponse
    cluster.stream.frames.StreamOffer
    cluster.types.EngineRequest
    cluster.types.EngineStats
    cluster.types.Logprobs
    cluster.types.SamplingParams
    cluster.types.SequenceUpdate
"""
READ_AND_ANSWER = """
import pickle, sys
values, failures, actors = pickle.load(sys.stdin.buffer)
answer = values, [(type(f).__name__, f.args) for f in failures], [a.__name__ for a in actors]
pickle.dump(answer, sys.stdout.buffer)
"""


class NamesIn(pickle.Unpickler):
    """Remembers the names of this package that a pickle refers to."""

    def __init__(self, file):
        super().__init__(file)
        self.seen = set()

    def find_class(self, module, name):
        if module.startswith("cluster."):
            self.seen.add(f"{module}.{name}")
        return super().find_class(module, name)


def test_what_is_exchanged_goes_by_the_names_that_it_had_first(tmp_path):
    path = tmp_path / "values"
    sent_values = (*EXCHANGED, *SINCE, DRAINED)
    path.write_bytes(pickle.dumps((sent_values, FAILURES, tuple(map(sent, ACTORS + ACTORS_SINCE)))))
    with path.open("rb") as file:
        reader = NamesIn(file)
        values, _, actors = reader.load()
    assert reader.seen == set(NAMES.split())
    assert values == sent_values
    assert actors == ACTORS + ACTORS_SINCE


def test_the_last_version_reads_what_this_one_sends_and_the_reverse(tmp_path):
    """Its process loads the values, and sends them back as it writes them."""
    write_last_version(tmp_path / "last")
    data = pickle.dumps(((*EXCHANGED, DRAINED), FAILURES, tuple(map(sent, ACTORS))))
    values, failures, actors = pickle.loads(run_python(READ_AND_ANSWER, tmp_path / "last", data))
    assert values == (*EXCHANGED, replace(DRAINED, leaving=()))
    assert failures == [("ShardUnavailable", ("shard 1 died", 1)), ("InvalidRequest", ("no", "n"))]
    assert actors == [actor.__name__ for actor in ACTORS]


SEND_ACTORS = """
import pickle, sys, ray.cloudpickle
from cluster.runtime.actors import EngineActor, ExpertShardActor
from cluster.runtime.controller import ExpertController
try:
    from cluster.runtime.ray_private.core import by_name
except ImportError:  # the last version
    by_name = lambda cls: cls
made = [ray.remote(by_name(cls)) for cls in (ExpertController, ExpertShardActor, EngineActor)]
collisions = ray._private.worker.global_worker.function_actor_manager.compute_collision_identifier
for actor in made:
    collisions(actor.__ray_metadata__.modified_class)  # as Ray does first
pickle.dump([ray.cloudpickle.dumps(actor.__ray_metadata__.modified_class) for actor in made], sys.stdout.buffer)
"""
READ_ACTORS = """
import json, pickle, sys
classes = [pickle.loads(data) for data in pickle.load(sys.stdin.buffer)]
print(json.dumps([[cls.__name__, [name for name in dir(cls) if not name.startswith("_")]] for cls in classes]))
"""


def run_python(script, folder, data=b""):
    """The output of a process that imports this package from `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", script], input=data, env={**os.environ, "PYTHONPATH": str(folder)}, cwd=folder,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_each_version_reads_the_actors_classes_that_the_other_sends_to_callers(tmp_path):
    """As Ray pickles them. A process that could not read one has a handle without methods."""
    write_last_version(tmp_path / "last")
    for sender, reader in ((ROOT, tmp_path / "last"), (tmp_path / "last", ROOT)):
        found = dict(json.loads(run_python(READ_ACTORS, reader, run_python(SEND_ACTORS, sender))))
        assert list(found) == ["ExpertController", "ExpertShardActor", "EngineActor"]
        assert {"wait_plan", "slot", "status", "apply"} <= set(found["ExpertController"])
        assert ("renew_lease" in found["ExpertController"]) == (reader is ROOT), "the reader's own methods"
        assert {"forward", "become", "sign"} <= set(found["ExpertShardActor"])
        assert {"poll", "submit"} <= set(found["EngineActor"])


def test_what_serve_starts_again_by_the_last_versions_names_is_found():
    """A replica of the version before may die while the next one is installed already."""
    for name in ("ingress.Ingress", "attention_replica.AttentionReplica", "autoscaling.replicas_by_load"):
        module, _, attribute = name.partition(".")
        assert hasattr(importlib.import_module(f"cluster.runtime.{module}"), attribute)


def test_a_class_whose_wire_name_does_not_give_it_is_not_sent():
    """Ray would send it as another class of the same name."""

    class EngineRequest:
        pass

    lost = evolving("cluster.types")(EngineRequest)
    with pytest.raises(AssertionError):
        sent(lost)
