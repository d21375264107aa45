"""LoRA adapters of a running cluster: how requests name them, who may change them, and how engines get them."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from configs import dense
from control_fakes import task_error
from http_tools import MODEL, Front
from lora_tools import write_adapter
from serving_fakes import EchoBackend, byte_ids, make_service, write_tokenizer
from test_grpc_server import FakeContext
from test_live_changes import FakeOperations, bearer, key_file
from test_live_feed import FakeSource, feed_of

from cluster.checkpoint.made.synthetic import write_checkpoint
from cluster.config import ClusterConfig
from cluster.config.lora import AdapterList
from cluster.errors import CheckpointError, InvalidRequest, NotFound, SetupError, Unavailable
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.runtime.control.adapters import SharedAdapters
from cluster.runtime.control.shards import Shards
from cluster.runtime.front.operations import RayOperations
from cluster.runtime.workers import directory
from cluster.serving.admission.admission import Admission, AdmissionLimits
from cluster.serving.grpc.handlers import GrpcInferenceService
from cluster.serving.text.prompts import Prompt
from cluster.serving.text.tokenizer import Tokenizer
from cluster.types import SamplingParams, SequenceUpdate

BASE = dense(num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=32)
BODY = {"prompt": "ab", "max_tokens": 2}
TURN = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def pair():
    return torch.zeros(2, 16), torch.zeros(16, 2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_an_adapter_is_named_as_the_model_over_http(tokenizer):
    front = Front(tokenizer, adapters=("law", "medicine"))

    async def run():
        for path, body in (
            ("/v1/completions", BODY | {"n": 2}), ("/v1/chat/completions", TURN), ("/v1/messages", TURN),
            ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ):  # fmt: skip
            answer = await front.post(path, {**body, "model": "law"})
            assert (answer.status_code, answer.json()["model"]) == (200, "law"), path
            assert front.backend.requests[-1].adapter == "law"
        plain = await front.post("/v1/completions", {**BODY, "model": MODEL})
        assert (plain.json()["model"], front.backend.requests[-1].adapter) == (MODEL, "")

    asyncio.run(run())


def test_adapters_are_listed_with_their_base_and_an_unknown_one_is_refused_by_name(tokenizer):
    front = Front(tokenizer, adapters=("law",))

    async def run():
        listed = (await front.get("/v1/models")).json()["data"]
        assert [(one["id"], one["parent"]) for one in listed] == [(MODEL, None), ("law", MODEL)]
        assert (await front.get("/v1/models/law")).json()["parent"] == MODEL
        for answer in (
            await front.post("/v1/completions", {**BODY, "model": "tax"}),
            await front.get("/v1/models/tax"),
        ):
            assert answer.status_code == 404
            assert "'tax' is not served here: this server has 'tiny' and the adapters law" in answer.text
        document = (await front.get("/openapi.json")).json()["components"]["schemas"]["CompletionRequest"]
        assert {"enum": [MODEL, "law"], "type": "string"} in document["properties"]["model"]["anyOf"]

    asyncio.run(run())


def test_a_field_names_it_over_grpc_and_an_unknown_one_is_not_found(tokenizer):
    service = make_service(tokenizer, EchoBackend(), adapters=("law",))
    handlers = GrpcInferenceService(service, raise_failures=False)

    async def ask(adapter):
        context = FakeContext()
        request = pb.GenerateRequest(text="ab", adapter=adapter, sampling_params=pb.SamplingParams(max_tokens=2))
        answer = await handlers.Generate(request.SerializeToString(), context)
        return answer, context

    async def run():
        answer, context = await ask("law")
        assert (tuple(answer.token_ids), context.code) == (byte_ids("ab"), None)
        _, context = await ask("tax")
        assert (context.code.name, context.details) == (
            "NOT_FOUND", "the adapter 'tax' is not served here; served: law"
        )  # fmt: skip
        info = await handlers.GetModelInfo(b"", FakeContext())
        assert list(info.adapters) == ["law"]

    asyncio.run(run())


def test_an_engine_of_a_version_without_adapters_answers_nothing_in_its_stead(tokenizer):
    """It would compute with the base alone: its updates name no adapter."""
    backend = EchoBackend(script=[SequenceUpdate(request_id="x", token_ids=(1,), finish_reason="stop")])
    service = make_service(tokenizer, backend, adapters=("law",))
    with pytest.raises(Unavailable, match="is of an older version, which knows no adapter"):
        asyncio.run(service.generate(Prompt(text="a", adapter="law"), SamplingParams(max_tokens=1)))


class Changes(FakeOperations):
    def load_adapter(self, name, directory, *, in_place):
        return self._make("load", name, directory, in_place)

    def unload_adapter(self, name):
        return self._make("unload", name)


def test_an_admin_key_alone_changes_adapters_by_vllms_calls(tokenizer, tmp_path):
    root, admin = key_file(tmp_path / "admins", "root")
    admission = Admission(None, AdmissionLimits(max_watchers=2), admins=root, clock=lambda: 0.0)
    fake = Changes()
    front = Front(tokenizer, admission=admission, live=feed_of(FakeSource()), operations=fake)
    load = ("/v1/load_lora_adapter", {"lora_name": "law", "lora_path": "/a/law"})
    unload = ("/v1/unload_lora_adapter", {"lora_name": "law"})

    async def run():
        for path, body in (load, unload):
            assert (await front.post(path, body)).status_code in (401, 403)
        assert fake.made == []
        answer = await front.post(*load, headers=bearer(admin))
        assert (answer.status_code, answer.json()["state"]) == (200, "done")
        await front.post(load[0], load[1] | {"load_inplace": True}, headers=bearer(admin))
        await front.post(*unload, headers=bearer(admin))
        fake.error = NotFound("the adapter 'law' is not loaded; loaded: none", "lora_name")
        assert (await front.post(*unload, headers=bearer(admin))).status_code == 404

    asyncio.run(run())
    assert fake.made[:3] == [("load", "law", "/a/law", False), ("load", "law", "/a/law", True), ("unload", "law")]


class FakeEngine:
    """Takes lists, `adapt.remote` and `adapted.remote`; refuses one with a directory that is in `damaged`.

    is_new: else it has the methods too, as Ray's handle of one of an older version, and nobody may call them.
    """

    def __init__(self, damaged=(), *, is_new=True):
        self.list, self.damaged, self.is_new = AdapterList(), damaged, is_new
        self.adapt = SimpleNamespace(remote=self._adapt)
        self.adapted = SimpleNamespace(remote=self._adapted)

    async def _adapt(self, wanted):
        assert self.is_new
        if any(adapter.name in self.damaged for adapter in wanted.adapters):
            raise task_error(CheckpointError("it is damaged there"))
        self.list = wanted

    async def _adapted(self):
        assert self.is_new
        return self.list


class Cluster:
    """A controller's adapters with two engines, on a checkpoint and two adapters of it, `a` and `b`."""

    def __init__(self, path, *, second=None, **fields):
        write_checkpoint(path / "model", BASE, seed=1)
        for name in ("a", "b"):
            write_adapter(path / name, {"model.layers.0.self_attn.q_proj": pair()})
        self.engines = [FakeEngine(), second or FakeEngine()]
        replicas = [
            SimpleNamespace(name=f"r{i}", engine=engine, process=SimpleNamespace(takes_adapters=engine.is_new))
            for i, engine in enumerate(self.engines)
        ]
        self.known = SimpleNamespace(known=lambda: tuple(replicas))
        self.path, self.noted = path, []
        config = ClusterConfig(model=str(path / "model"), **fields)
        self.state = SimpleNamespace(config=config, adapters=AdapterList(), note=self.noted.append)
        self.adapters = self.made()

    def made(self, now=100.0):
        return SharedAdapters(self.state, Shards(), self.known, lambda: now)

    def load(self, name, **options):
        return asyncio.run(self.adapters.load(name, str(self.path / name), **{"in_place": False, **options}))

    @property
    def names(self):
        return [engine.list.names for engine in self.engines]


def test_every_engine_gets_an_adapter_and_a_new_controller_the_engines_list(tmp_path):
    it = Cluster(tmp_path)
    assert it.load("a") == "the adapter a is loaded at 2 attention replicas"
    it.load("b")
    asyncio.run(it.adapters.unload("a"))
    assert it.names == [("b",), ("b",)] == [it.adapters.current.names] * 2
    successor = it.made(0.0)
    asyncio.run(successor.recover(0.0))
    assert successor.current == it.adapters.current
    asyncio.run(successor.load("a", str(tmp_path / "a"), in_place=False))  # though its clock is behind
    assert it.names == [("b", "a"), ("b", "a")]


def test_a_failure_at_one_engine_takes_the_adapter_back_everywhere(tmp_path):
    it = Cluster(tmp_path, second=FakeEngine(damaged=("b",)))
    it.load("a")
    with pytest.raises(CheckpointError, match="it is damaged there"):
        it.load("b")
    assert it.names == [("a",), ("a",)] == [it.adapters.current.names] * 2


def test_what_cannot_be_loaded_is_refused_before_any_engine_hears_of_it(tmp_path):
    it = Cluster(tmp_path, max_loras=1, model_id="mine")
    for name, path, error, part in (
        ("x", "relative", InvalidRequest, "an absolute path is needed"),
        ("x y", tmp_path / "a", SetupError, "a name of up to 128"),
        ("mine", tmp_path / "a", SetupError, "has the model's own name"),
        ("x", tmp_path / "nowhere", CheckpointError, "is not a directory"),
    ):
        with pytest.raises(error, match=part):
            asyncio.run(it.adapters.load(name, str(path), in_place=False))
    it.load("a")
    with pytest.raises(InvalidRequest, match="'a' is loaded already: unload it first"):
        it.load("a")
    before = it.adapters.current.find("a")
    it.load("a", in_place=True)
    assert it.adapters.current.find("a") != before
    with pytest.raises(SetupError, match="1 adapters are loaded, as many as max_loras allows"):
        it.load("b")
    with pytest.raises(NotFound, match="the adapter 'b' is not loaded; loaded: a"):
        asyncio.run(it.adapters.unload("b"))


def test_a_replica_of_an_older_version_is_named(tmp_path):
    it = Cluster(tmp_path, second=FakeEngine(is_new=False))
    with pytest.raises(Unavailable, match="attention replica r1 is of an older version: roll it first"):
        it.load("a")
    assert it.engines[0].list.names == ()


def test_an_engine_asks_no_controller_of_an_older_version_for_its_adapters(monkeypatch):
    """The handle has the method, but that controller would end at the call."""
    monkeypatch.setattr(directory.ray, "get", lambda answer: answer)
    config, version = ClusterConfig(model="m", lora_adapters={"a": "/a"}), -1.0
    new = AdapterList(version=3.0)

    def adapter_list():
        assert version >= 0
        return new

    controller = SimpleNamespace(
        status=SimpleNamespace(remote=lambda: SimpleNamespace(adapters_version=version)),
        adapter_list=SimpleNamespace(remote=adapter_list),
    )
    assert directory.adapter_list(controller, config).names == ("a",)
    version = 0.0
    assert directory.adapter_list(controller, config) == new


def test_a_redeployed_configuration_changes_what_it_names(tmp_path):
    it = Cluster(tmp_path, lora_adapters={"a": str(tmp_path / "a")})
    assert it.adapters.current.names == ("a",)
    before = it.state.config
    it.state.config = ClusterConfig(
        model=before.model, lora_adapters={"b": str(tmp_path / "b"), "c": str(tmp_path / "c")}
    )
    asyncio.run(it.adapters.follow(before, it.state.config))
    assert it.names == [("b",), ("b",)]
    assert len(it.noted) == 1
    assert "c is not a directory" in it.noted[0]


def test_an_ingress_looks_again_after_a_change_and_a_missing_adapter_is_not_found():
    looks = []

    async def look():
        looks.append(1)

    async def unload(name):
        if name == "x":
            raise task_error(NotFound("the adapter 'x' is not loaded; loaded: none", "lora_name"))
        return "the adapter a is unloaded"

    it = RayOperations(SimpleNamespace(unload_adapter=SimpleNamespace(remote=unload)), lambda: None, look)
    assert asyncio.run(it.unload_adapter("a")) == "the adapter a is unloaded"
    with pytest.raises(NotFound, match="not loaded"):
        asyncio.run(it.unload_adapter("x"))
    assert looks == [1]
