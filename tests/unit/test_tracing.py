"""A request's trace, part by part: the ingress, the engine and its steps, a shard, and the way to the receiver."""

import asyncio
import contextvars
import logging
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from engine_fakes import CountingRunner, make_engine, request
from http_tools import MODEL, Front
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import values
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from serving_fakes import EchoBackend, write_tokenizer

from cluster import doctor
from cluster.config import ClusterConfig
from cluster.engine.loop import EngineLoop
from cluster.engine.traced import TracedRunner
from cluster.errors import SetupError, Unavailable
from cluster.logs import SeldomLog
from cluster.metrics import IngressMetrics, NodeCollector, new_registry
from cluster.metrics.exemplars import Exemplars, add_exemplars
from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.runtime.front import attention_replica
from cluster.serving.grpc.calls import GrpcCalls
from cluster.serving.service import ServiceLimits
from cluster.serving.text.tokenizer import Tokenizer
from cluster.tracing import products, settings
from cluster.tracing import spans as spans_module
from cluster.tracing.contexts import Place, pack, place_of, unpack
from cluster.tracing.dispatch import TracedDispatchMetrics
from cluster.tracing.engine import EngineTracing, in_detail
from cluster.tracing.products import QUIET_NS, ShardTracing
from cluster.tracing.requests import RequestTracing
from cluster.tracing.settings import TracingSettings
from cluster.tracing.spans import Spans, Way, open_spans

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = (f"00-{TRACE_ID}-{SPAN_ID}-{flags}" for flags in ("01", "00"))


class Kept:
    """Spans that stay in this process."""

    def __init__(self, ratio=1.0):
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(ParentBasedTraceIdRatio(ratio))
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = Spans(provider)

    def named(self, name):
        """The finished spans of that name, in the order of their begin."""
        found = [span for span in self._exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time)

    @property
    def names(self):
        return [span.name for span in self._exporter.get_finished_spans()]


@pytest.fixture
def kept():
    return Kept()


class InferenceStub:
    """The part of a service by which a gRPC front traces a call."""

    def __init__(self, spans):
        self.spans, self.limits = spans, ServiceLimits()


def is_under(span, parent):
    return span.parent.span_id == parent.context.span_id and span.context.trace_id == parent.context.trace_id


# On the way between processes


def test_a_place_travels_as_w3c_writes_it_and_packed():
    place = place_of(SAMPLED)
    assert place == Place(int(TRACE_ID, 16), int(SPAN_ID, 16))
    assert place.traceparent == SAMPLED
    assert place_of("") is None
    assert place_of("another-version") is None
    assert unpack(pack([place, Place(1, 2)]) + b"cut off") == [place, Place(1, 2)]


@pytest.mark.parametrize(("num_steps", "expected"), [(0, []), (1, [1, 2, 4, 8, 16]), (3, [1, 2, 3, 4, 8, 16])])
def test_a_long_answer_has_few_steps_in_detail(num_steps, expected):
    assert [step for step in range(1, 32) if in_detail(step, num_steps)] == expected


# The ingress


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def ask(front, path="/v1/chat/completions", headers=None, **body):
    body = {"model": MODEL, "max_tokens": 4, **body}
    if "chat" in path:
        body.setdefault("messages", [{"role": "user", "content": "a secret"}])
    return asyncio.run(front.post(path, body, headers=headers or {}))


def test_a_request_over_http_has_a_span_by_the_conventions_under_its_callers(kept, tokenizer):
    backend = EchoBackend()
    front = Front(tokenizer, backend, spans=RequestTracing(kept.spans, MODEL))
    answer = ask(front, headers={"traceparent": SAMPLED}, temperature=0.5, seed=3, stop=["another secret"])
    assert answer.status_code == 200
    [call], [span] = kept.named("POST /v1/chat/completions"), kept.named(f"chat {MODEL}")
    assert f"{call.context.trace_id:032x}" == TRACE_ID
    assert f"{call.parent.span_id:016x}" == SPAN_ID
    assert call.kind is SpanKind.SERVER
    assert call.attributes["http.response.status_code"] == 200
    assert is_under(span, call)
    given = {key: value for key, value in span.attributes.items() if key != "gen_ai.response.id"}
    assert given.pop("gen_ai.response.time_to_first_chunk") >= 0
    assert given == {
        "gen_ai.provider.name": "moe-cluster",
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.stream": True,
        "gen_ai.output.type": "text",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 20,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.seed": 3,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.usage.input_tokens": answer.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.response.finish_reasons": ("length",),
        "moecluster.outcome": "length",
    }
    [engine] = backend.requests
    assert place_of(engine.trace) == Place(span.context.trace_id, span.context.span_id)
    assert "secret" not in f"{dict(call.attributes)} {dict(span.attributes)}"


@pytest.mark.parametrize(
    ("headers", "num_spans"), [({}, 0), ({"traceparent": NOT_SAMPLED}, 0), ({"traceparent": SAMPLED}, 2)]
)
def test_a_ratio_is_of_requests_whose_callers_did_not_decide(tokenizer, headers, num_spans):
    kept, backend = Kept(ratio=0.0), EchoBackend()
    assert ask(Front(tokenizer, backend, spans=RequestTracing(kept.spans, MODEL)), headers=headers).status_code == 200
    assert len(kept.names) == num_spans
    assert bool(backend.requests[0].trace) == bool(num_spans)


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{SPAN_ID}-01", "\xff", "00-" + "1" * 9000])
def test_a_broken_traceparent_begins_a_trace_of_its_own(kept, tokenizer, header):
    front = Front(tokenizer, spans=RequestTracing(kept.spans, MODEL))
    assert ask(front, headers={"traceparent": header.encode("latin-1")}).status_code == 200
    [call] = kept.named("POST /v1/chat/completions")
    assert call.parent is None


def test_several_answers_to_one_call_are_in_one_trace(kept, tokenizer):
    front = Front(tokenizer, spans=RequestTracing(kept.spans, MODEL))
    assert ask(front, n=2).status_code == 200
    [call], spans = kept.named("POST /v1/chat/completions"), kept.named(f"chat {MODEL}")
    assert len(spans) == 2
    assert all(is_under(span, call) for span in spans)


def test_a_request_that_fails_says_so(kept, tokenizer):
    front = Front(tokenizer, spans=RequestTracing(kept.spans, MODEL))
    assert ask(front, messages=[{"role": "user", "content": "a" * 100}]).status_code == 400
    [span] = kept.named("request")  # it was never prepared
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "INVALID_ARGUMENT"
    [call] = kept.named("POST /v1/chat/completions")
    assert call.status.status_code is StatusCode.UNSET  # the client's fault
    assert (call.attributes["http.response.status_code"], call.attributes.get("error.type")) == (400, None)


class Failing:
    """A backend that answers nothing."""

    def __init__(self, error):
        self.error = error

    async def generate(self, request):
        raise self.error
        yield


FAULTS = [(Unavailable("no replica"), 503, "UNAVAILABLE"), (ValueError("a bug"), 500, "INTERNAL")]


@pytest.mark.parametrize(("error", "status", "code"), FAULTS)
def test_our_faults_over_http_are_errors_by_their_codes(kept, tokenizer, error, status, code):
    front = Front(tokenizer, Failing(error), spans=RequestTracing(kept.spans, MODEL))
    assert ask(front).status_code == status
    [call], [span] = kept.named("POST /v1/chat/completions"), kept.named(f"chat {MODEL}")
    assert call.attributes["http.response.status_code"] == status
    for each in (call, span):
        assert (each.status.status_code, each.attributes["error.type"]) == (StatusCode.ERROR, code)


@pytest.mark.parametrize(("error", "code"), [(error, code) for error, _, code in FAULTS])
def test_our_faults_over_grpc_are_errors_by_the_same_codes(kept, error, code):
    calls = GrpcCalls(InferenceStub(RequestTracing(kept.spans, MODEL)))
    with pytest.raises(type(error)), calls._traced({}, pb.GenerateRequest):
        raise error
    with calls._traced({}, pb.GenerateRequest):
        pass
    failed, well = kept.named("moecluster.v1.Generate")
    assert (failed.status.status_code, failed.attributes["error.type"]) == (StatusCode.ERROR, code)
    assert (well.status.status_code, well.attributes.get("error.type")) == (StatusCode.UNSET, None)
    assert [each.attributes["rpc.response.status_code"] for each in (failed, well)] == [code, "OK"]


def test_a_call_whose_body_is_refused_has_the_status_of_its_answer(kept, tokenizer):
    front = Front(tokenizer, spans=RequestTracing(kept.spans, MODEL))
    answer = asyncio.run(front.post("/v1/chat/completions", {}, headers={"content-type": "text/plain"}))
    assert answer.status_code == 415
    [call] = kept.named("POST")
    assert call.attributes["http.response.status_code"] == 415


@pytest.mark.parametrize(
    ("constraint", "expected"), [(None, "text"), (("json", "{}"), "json"), (("regex", "a+"), "text")]
)
def test_an_answer_is_json_where_json_was_asked_for(kept, constraint, expected):
    span = RequestTracing(kept.spans, MODEL).request("r")
    span.prepared(replace(request("r"), constraint=constraint), chat=True, stream=False)
    span.end("stop", 1, None)
    assert kept.named(f"chat {MODEL}")[0].attributes["gen_ai.output.type"] == expected


def test_pages_and_questions_without_a_key_have_no_span(kept, tokenizer):
    front = Front(tokenizer, spans=RequestTracing(kept.spans, MODEL))
    assert asyncio.run(front.get("/health", headers={"traceparent": SAMPLED})).status_code == 200
    assert kept.names == []


# The engine


class Shards:
    """As two shards: each step sends them 3 rows each in each of 2 layers."""

    def __init__(self, metrics):
        self.metrics, self.traces = metrics, []

    def trace(self, places):
        self.traces.append(dict(places))

    def work(self):
        for _ in range(2):
            for shard_id in range(2):
                self.metrics.sent(shard_id, 3, 100)
                self.metrics.returned(shard_id, 0.25, 60)


class DispatchingRunner(CountingRunner):
    def __init__(self, shards):
        super().__init__()
        self.shards = shards

    def run(self, batch):
        self.shards.work()
        return super().run(batch)


class TracedEngine:
    """An engine on a runner that counts, with three shards, of which the last never gets rows."""

    def __init__(self, kept, num_steps=2, **limits):
        self.metrics = TracedDispatchMetrics(new_registry(), "r")
        self.shards = Shards(self.metrics)
        self.engine = make_engine(**limits)
        self.tracing = EngineTracing(kept.spans, self.metrics, self.shards.trace, num_steps)
        self.engine.runner = TracedRunner(DispatchingRunner(self.shards), self.tracing, lambda: range(3))

    def run(self, *requests):
        for each in requests:
            self.tracing.arrived(each)
            self.engine.submit(each)
        while self.engine.has_work:
            self.tracing.told(self.engine.step())


def traced(request_id, trace=SAMPLED, **params):
    return replace(request(request_id, **params), trace=trace)


def test_an_engines_phases_follow_each_other_and_hold_its_steps(kept):
    engine = TracedEngine(kept)
    engine.run(traced("a", max_tokens=6))
    [whole] = kept.named("engine")
    assert f"{whole.context.trace_id:032x}" == TRACE_ID
    assert f"{whole.parent.span_id:016x}" == SPAN_ID
    assert whole.attributes["moecluster.generated_tokens"] == 6
    assert whole.attributes["moecluster.finish_reason"] == "length"
    [queue], [prefill], [decode] = (kept.named(name) for name in ("queue", "prefill", "decode"))
    assert all(is_under(phase, whole) for phase in (queue, prefill, decode))
    assert (queue.start_time, queue.end_time) == (whole.start_time, prefill.start_time)
    assert prefill.end_time == decode.start_time
    assert decode.end_time == whole.end_time
    assert (prefill.attributes["moecluster.steps"], decode.attributes["moecluster.steps"]) == (1, 5)
    steps = kept.named("step")
    assert [step.attributes["moecluster.number"] for step in steps] == [1, 2, 4]  # of six
    assert [is_under(step, prefill) for step in steps] == [True, False, False]
    assert all(is_under(step, decode) for step in steps[1:])


def test_a_steps_crossings_are_one_span_for_each_shard_that_got_rows(kept):
    engine = TracedEngine(kept, num_steps=1)
    engine.run(traced("a", max_tokens=1))
    [step] = kept.named("step")
    crossings = [kept.named(f"dispatch to shard {shard_id}") for shard_id in range(3)]
    assert [len(spans) for spans in crossings] == [1, 1, 0]
    [first], [second], _ = crossings
    assert is_under(first, step)
    assert is_under(second, step)
    assert first.kind is SpanKind.CLIENT
    assert dict(first.attributes) == {
        "moecluster.shard_id": 0, "moecluster.crossings": 2, "moecluster.rows": 6, "moecluster.sent_bytes": 200,
        "moecluster.received_bytes": 120, "moecluster.round_trip_s": 0.5, "moecluster.longest_s": 0.25,
        "moecluster.fallbacks": 0, "moecluster.hedged": 0, "moecluster.rerouted_rows": 0,
    }  # fmt: skip
    begin, end = engine.shards.traces
    assert begin[0] == pack([Place(first.context.trace_id, first.context.span_id)])
    assert end == {}


def test_a_thousand_tokens_make_few_spans(kept):
    engine = TracedEngine(kept, num_steps=8, num_blocks=300)
    engine.run(traced("a", max_tokens=990))
    # 8 first steps and those of 16, 32, … 512, each with two shards'; the request, its queue, prefill and decode
    assert len(kept.names) == 3 * (8 + 6) + 4


def test_requests_that_are_not_traced_leave_no_span_and_tell_no_shard(kept):
    engine = TracedEngine(kept)
    engine.run(request("a"), traced("b", trace=""), traced("c", trace="of another version"))
    assert kept.names == []
    assert engine.shards.traces == []


def test_each_traced_request_of_a_step_has_the_step_in_its_own_trace(kept):
    engine = TracedEngine(kept, num_steps=1)
    other = SAMPLED.replace(TRACE_ID, "1" * 32)
    engine.run(traced("a", max_tokens=1), traced("b", trace=other, max_tokens=1), request("c", max_tokens=1))
    steps = kept.named("step")
    assert {f"{step.context.trace_id:032x}" for step in steps} == {TRACE_ID, "1" * 32}
    assert all(step.attributes["moecluster.step_sequences"] == 3 for step in steps)
    assert [len(unpack(of_shard)) for of_shard in engine.shards.traces[0].values()] == [2, 2, 2]


def test_a_step_that_raises_ends_its_spans(kept):
    engine = TracedEngine(kept)
    engine.engine.runner.runner.errors = [ValueError("a bug")]
    engine.run(traced("a", max_tokens=1))
    assert "step" in kept.names
    assert engine.shards.traces[-1] == {}
    [whole] = kept.named("engine")
    assert whole.status.status_code is StatusCode.ERROR
    assert whole.attributes["error.type"] == "INTERNAL"
    assert kept.named("step")[0].status.status_code is StatusCode.ERROR


def test_a_step_that_runs_again_in_halves_is_one_step_of_several_attempts(kept):
    """The step of three raises, then its halves run: of one sequence and of two."""
    engine = TracedEngine(kept)
    engine.engine.runner.runner.errors = [ValueError("a bug")]
    engine.run(*(traced(name, max_tokens=2) for name in "abc"))
    assert [phase.attributes["moecluster.steps"] for phase in kept.named("prefill")] == [1, 1, 1]
    assert [phase.attributes["moecluster.steps"] for phase in kept.named("decode")] == [1, 1, 1]
    found = sorted(
        (step.attributes["moecluster.number"], step.attributes["moecluster.attempt"]) for step in kept.named("step")
    )
    assert found == [(1, 1)] * 3 + [(1, 2)] * 3 + [(2, 1)] * 3


def test_an_engine_that_breaks_ends_the_spans_of_its_requests(kept):
    engine = TracedEngine(kept)
    loop = EngineLoop(engine.engine, engine.tracing)

    def broken():
        raise ValueError("a bug")

    engine.engine.step = broken
    loop.submit([traced("a", max_tokens=2)])
    loop.start()
    with pytest.raises(ValueError, match="a bug"):
        loop.poll(20, 0)
    [whole] = kept.named("engine")
    assert whole.attributes["error.type"] == "INTERNAL"
    assert "queue" in kept.names


def test_the_engines_loop_reports_arrivals_refusals_and_ends(kept):
    engine = TracedEngine(kept)
    loop = EngineLoop(engine.engine, engine.tracing)
    loop.submit([traced("a", max_tokens=2), traced("a", prompt=(2,)), traced("b", max_tokens=2)])
    loop.cancel(["b"])
    loop.start()
    number, ended = 0, []
    while len(ended) < 3:
        number, updates = loop.poll(10, number)
        ended += [update.finish_reason for update in updates if update.finish_reason]
    loop.stop()
    assert len(kept.named("engine")) == 2  # a second one of the same id is refused, and is not that of the first


# A shard


def test_a_shards_products_for_a_step_are_one_span_of_each_trace(kept, monkeypatch):
    now = [10_000_000_000]
    shard = ShardTracing(3, clock=lambda: now[0])
    shard.follow(TracingSettings())
    monkeypatch.setattr("cluster.tracing.spans.open_spans", lambda *args, **attributes: kept.spans)
    places = [place_of(SAMPLED), Place(7, 8)]
    shard.computed(pack(places), 9_000_000_000, [(2, 0.1, 0.5)])
    now[0] += 500_000_000
    shard.computed(pack(places), 10_100_000_000, [(3, 0.2, 0.25), (1, 0.0, 0.25)])
    shard.send()
    assert kept.names == []  # more may come
    now[0] += QUIET_NS
    shard.send()
    spans = kept.named("experts of shard 3")
    assert [(span.context.trace_id, span.parent.span_id) for span in spans] == places
    assert {(span.start_time, span.end_time) for span in spans} == {(9_000_000_000, 10_500_000_000)}
    assert dict(spans[0].attributes) == {
        "moecluster.products": 3, "moecluster.rows": 6, "moecluster.waited_s": pytest.approx(0.3),
        "moecluster.computed_s": 1.0, "moecluster.longest_s": 0.5,
    }  # fmt: skip
    shard.send()
    assert len(kept.names) == 2


def test_a_shard_whose_cluster_traces_no_more_keeps_nothing(kept):
    now = [0]
    shard = ShardTracing(0, clock=lambda: now[0])
    shard.follow(None)
    shard.computed(pack([Place(1, 2)]), 0, [(1, 0.0, 0.0)])
    now[0] += QUIET_NS
    shard.send()
    assert kept.names == []


def test_a_shard_that_is_told_of_another_receiver_closes_the_way_to_the_first(monkeypatch):
    now, opened = [0], []

    class Closing(Kept):
        def __init__(self):
            super().__init__()
            self.spans.close = lambda: opened.remove(self)

    def open_kept(*args, **attributes):
        opened.append(Closing())
        return opened[-1].spans

    monkeypatch.setattr("cluster.tracing.spans.open_spans", open_kept)
    shard = ShardTracing(0, clock=lambda: now[0])

    def work(endpoint):
        shard.follow(None if endpoint is None else TracingSettings(endpoint=endpoint))
        shard.computed(pack([Place(1, 2)]), now[0], [(1, 0.0, 0.0)])
        now[0] += QUIET_NS
        shard.send()
        return list(opened)

    [first] = work("http://a")
    assert work("http://a") == [first]
    [second] = work("http://b")
    assert second is not first
    assert work(None) == []


def test_a_shard_counts_the_products_that_it_leaves_out(monkeypatch, caplog):
    monkeypatch.setattr(products, "seldom", SeldomLog(products.seldom._log))
    shard = ShardTracing(0, clock=lambda: 0)
    for i in range(products.MAX_STEPS + 1):
        shard.computed(pack([Place(1, i)]), 0, [(1, 0.0, 0.0)])
    assert "a traced product is left out: 1024 steps are under way here" in caplog.text


# To the receiver


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_reach_a_receiver_over_either_protocol(receiver, protocol, monkeypatch):
    port = receiver.grpc_port if protocol == "grpc" else receiver.http_port
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=of-the-receiver")
    spans = open_spans(
        TracingSettings(endpoint=f"http://127.0.0.1:{port}", protocol=protocol), "engine", replica="attention#1"
    )
    trace_id = f"{port:032x}"
    spans.begin("step", Place(port, 5), rows=3).end()
    spans.flush()
    [span] = receiver.trace(trace_id, bool)
    assert (span.name, span.parent_id, span.attributes) == ("step", f"{5:016x}", {"moecluster.rows": 3})
    assert span.resource["service.name"] == "moe-cluster"
    assert span.resource["moecluster.replica"] == "attention#1"
    assert span.resource["deployment.environment.name"] == "tests"
    assert {key.lower(): value for key, value in receiver.headers[-1].items()}["api-key"] == "of-the-receiver"


def test_the_standard_variables_say_where_and_how_much(receiver, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.http_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracing = RequestTracing(open_spans(TracingSettings(), "ingress"), MODEL)
    with tracing.call("left out", {}):
        assert tracing.request("r") is None
    with tracing.call("wanted", {"traceparent": SAMPLED}):
        pass
    tracing.flush()
    [span] = receiver.trace(TRACE_ID, bool)
    assert (span.name, span.resource["service.name"]) == ("wanted", "ours")
    assert receiver.headers[-1]["path"] == "/v1/traces"


def test_a_protocol_that_is_not_known_is_refused(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    with pytest.raises(SetupError, match="is 'http/json', grpc or http/protobuf is needed"):
        open_spans(TracingSettings(), "ingress")


def test_nobody_waits_for_a_receiver_that_is_down(caplog):
    """It takes connections and answers nothing. 10,000 spans are more than the queue holds: the rest is dropped."""
    sdk = logging.getLogger("opentelemetry.sdk._shared_internal")
    for each in [each for each in sdk.filters if isinstance(each, spans_module._Seldom)]:
        sdk.removeFilter(each)  # it knows the lines of other tests
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING):
        spans = open_spans(TracingSettings(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}"), "ingress")
        for _ in range(10_000):
            spans.begin("lost", Place(1, 2)).end()
    full = [record for record in caplog.records if record.getMessage() == "Queue full, dropping Span."]
    assert len(full) == 1  # a line a minute


class Receiver(SpanExporter):
    """Takes spans or does not."""

    def __init__(self, result):
        self.result, self.spans = result, []

    def export(self, spans):
        self.spans += spans
        return self.result


def test_spans_that_a_receiver_did_not_take_are_counted_and_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(spans_module, "seldom", SeldomLog(spans_module.log))
    way = Way(Receiver(SpanExportResult.FAILURE))
    assert not way.is_down
    way.export([object()] * 3)
    assert way.is_down
    assert "spans do not reach the receiver of traces: 3 are lost up to now" in caplog.text
    held = threading.Event()

    class Stuck(TracerProvider):
        def force_flush(self, timeout_millis=30000):
            held.wait(20)

    Spans(Stuck(), way).flush()  # comes back, though nothing is sent
    held.set()


def test_closing_sends_what_is_left_and_ends_the_way():
    receiver, closed = Receiver(SpanExportResult.SUCCESS), threading.Event()
    receiver.shutdown = closed.set
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Way(receiver), schedule_delay_millis=60_000))
    spans = Spans(provider)
    spans.begin("last", Place(1, 2)).end()
    spans.close()
    assert closed.wait(20)
    assert [span.name for span in receiver.spans] == ["last"]


class Remote:
    """As a method of an actor: `answer` is awaited by its caller."""

    def __init__(self, answer):
        self.remote = answer


@pytest.mark.parametrize("hangs", [False, True])
def test_a_replica_that_ends_sends_its_spans_and_its_engines_and_waits_for_no_dead_one(monkeypatch, hangs):
    monkeypatch.setattr(attention_replica, "FLUSH_S", 0.01 if hangs else 20.0)
    flushed = []

    async def of_engine():
        flushed.append("engine")
        await asyncio.sleep(3600 if hangs else 0)

    async def of_replica():
        flushed.append("replica")

    async def end(tracing):
        replica = SimpleNamespace(
            _tracing=tracing, _context=contextvars.copy_context(), _flush_traces=of_replica,
            engine=SimpleNamespace(flush_traces=Remote(of_engine)),
        )  # fmt: skip
        await attention_replica.AttentionReplica.__del__(replica)

    asyncio.run(end(None))
    assert flushed == []
    asyncio.run(end(object()))
    assert sorted(flushed) == ["engine", "replica"]


def test_lines_that_are_left_out_are_counted_in_the_next_one(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(spans_module.time, "monotonic", lambda: now[0])
    seldom, written = spans_module._Seldom(), []
    for seconds in (100, 101, 102, 161):
        now[0] = float(seconds)
        record = logging.LogRecord("sdk", logging.WARNING, "", 0, "Queue full, dropping %s.", ("Span",), None)
        if seldom.filter(record):
            written.append(record.getMessage())
    assert written == ["Queue full, dropping Span.", "Queue full, dropping Span. (and 2 more in the 61 s before)"]


# Without the packages


def test_a_cluster_without_the_extra_refuses_tracing_in_one_line(monkeypatch):
    settings.check_installed(ClusterConfig(model="m", tracing=True))
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    settings.check_installed(ClusterConfig(model="m"))
    with pytest.raises(SetupError, match=r"pip install 'moe-cluster\[tracing\]' on every node"):
        settings.check_installed(ClusterConfig(model="m", tracing=True))


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector:4317"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(SetupError, match="http://collector:4317 is needed"):
        ClusterConfig(model="m", tracing_endpoint=endpoint)


def test_the_doctor_says_whether_traces_can_be_sent(monkeypatch):
    def line():
        [found] = [str(finding) for finding in doctor.examine() if finding.subject == "traces"]
        return found

    assert line() == "ok  traces: over OTLP, with `tracing: true`"
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    assert line() == "ok  traces: not without `pip install 'moe-cluster[tracing]'`"


# Beside metrics


DAMAGED = [
    b"", b"{", b"[]", b'{"m": []}', b'{"m": {"0.05": 3}}', b'{"m": {"0.05": ["no hex", 1, 2]}}', b"\xff",
    b'{"m": {"0.05": ["aa", "no number", 2]}}', b'{"m": {"0.05": ["aa", null, 2]}}', b'{"m": {"0.05": [5, 1, 2]}}',
]  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_costs_its_exemplars_and_no_page(tmp_path, content, caplog):
    (tmp_path / "exemplars_1.json").write_bytes(content)
    whole = Exemplars(tmp_path / "exemplars_2.json")
    whole.note("moecluster_time", (0.05,), 0.01, "a" * 32)
    metric = HistogramMetricFamily("moecluster_time", "h", buckets=[("0.05", 1), ("+Inf", 1)], sum_value=0.01)
    damaged = []
    add_exemplars([metric], tmp_path, damaged.append)
    assert [path.name for path in damaged] == ["exemplars_1.json"]
    assert metric.samples[0].exemplar.labels == {"trace_id": "a" * 32}


def test_a_file_that_has_just_gone_is_nothing_to_report(tmp_path):
    (tmp_path / "exemplars_1.json").symlink_to(tmp_path / "gone")
    damaged = []
    add_exemplars([], tmp_path, damaged.append)
    assert damaged == []


def test_a_bucket_names_its_last_traced_request(tmp_path, monkeypatch):
    """Of all processes of the node; those of a process that has ended are gone."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    metrics = IngressMetrics(new_registry())
    for seconds, trace_id in ((0.03, "a" * 32), (0.04, "b" * 32), (99.0, "c" * 32)):
        metrics.first_token(seconds)
        metrics.example("first_token", seconds, trace_id)
    other = Exemplars(tmp_path / "exemplars_1.json", clock=lambda: 5.0)  # of a process that lives, long ago
    other.note("moecluster_time_to_first_token_seconds", (0.05, 1.0), 0.05, "d" * 32)
    other.note("moecluster_time_to_first_token_seconds", (0.05, 1.0), 0.7, "e" * 32)
    dead = tmp_path / "exemplars_999999-1.json"
    Exemplars(dead).note("moecluster_time_to_first_token_seconds", (1.0,), 0.2, "f" * 32)
    collector = NodeCollector(tmp_path, "127.0.0.1", 0)
    text = openmetrics.generate_latest(collector._registry).decode()
    collector.close()
    found = {
        sample.labels["le"]: (sample.exemplar.labels["trace_id"][0], sample.exemplar.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar is not None
    }
    assert found == {"0.05": ("b", 0.04), "1.0": ("e", 0.7), "+Inf": ("c", 99.0)}
    assert not dead.exists()
