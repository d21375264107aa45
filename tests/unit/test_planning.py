"""The planner: what a step costs, how engines share shards and cores, a cluster in virtual time, the smallest one."""

import json
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from engine_fakes import make_engine, request
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.checkpoint.made.published import PUBLISHED
from cluster.checkpoint.sizes import sizes_of
from cluster.cli import main
from cluster.config import read_model_config
from cluster.errors import SetupError
from cluster.planning.calibration import Calibration, describe_shapes, read_calibration, write_calibration
from cluster.planning.costs import FrontCosts, StepTime, StepWork
from cluster.planning.curve import Curve
from cluster.planning.engine import EngineModel, Limits
from cluster.planning.hardware import GPUS, find_gpu
from cluster.planning.load import ClosedLoad, Lengths, OpenLoad, Request, TraceLoad
from cluster.planning.roofline import Roofline
from cluster.planning.search import Goal, Search
from cluster.planning.sharing import SharedCores, step_s
from cluster.planning.simulation import ClusterModel, Simulation

LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_waiting=100, cache_tokens=100_000, block_size=16)
MODEL = read_model_config(PUBLISHED["Qwen1.5-MoE-A2.7B"])


class Flat:
    """10 ms a step and 1 ms a row in an attention replica; the shards 4 ms together, of which 1 ms is hidden; 2 ms a
    crossing."""

    def attention_s(self, work):
        return 0.010 + 0.001 * work.rows

    def shared_s(self, rows):
        return 0.001

    def shard_s(self, rows, num_shards, imbalance=1.0):
        return 0.004 * imbalance / num_shards

    def crossing_s(self, rows, num_shards):
        return 0.002


def simulate(load, **cluster):
    chosen = ClusterModel(**{"replicas": 1, "shards": 1, "limits": LIMITS, **cluster})
    return Simulation(chosen, Flat(), load).run()


# Parts of a step


def test_a_curve_goes_straight_between_its_points_and_on_behind_them():
    curve = Curve.through([(10, 5.0), (1, 2.0), (20, 5.0), (30, 9.0)])
    assert [curve.at(x) for x in (0, 1, 4, 10, 15, 30, 40)] == [2, 2, 3, 5, 5, 9, 13]
    assert Curve(((1.0, 3.0),)).at(100) == 3


def test_a_step_alone_hides_what_the_shared_experts_hide():
    """10 + 1 + 2 of crossing + 4 - 1; on CPUs two shards take 2 each: 11 + 2 + 2 x 2 core milliseconds."""
    work = StepWork(rows=1, samples=1, context=0)
    assert StepTime.of(Flat(), work, 1, 1.0).alone == pytest.approx(0.016)
    assert StepTime.of(Flat(), work, 2, 1.0).core_seconds == pytest.approx(0.017)
    assert StepTime.of(Flat(), work, 0, 1.0).alone == pytest.approx(0.011)


def test_engines_that_share_are_between_their_bounds():
    """One with a shard of its own takes its time; of many, each round takes all of their shard time, at least."""
    time = StepTime(attention=0.010, shared=0.0, shard=0.005, crossing=0.0, num_shards=1)
    assert step_s(time, 1, cores=None) == pytest.approx(0.015)
    rounds = [step_s(time, k, cores=None) for k in range(1, 50)]
    assert all(later > earlier for earlier, later in pairwise(rounds))
    assert all(max(0.015, k * 0.005) <= took <= 0.015 + k * 0.005 for k, took in enumerate(rounds, 1))
    assert rounds[-1] == pytest.approx(49 * 0.005, rel=0.01)


def test_processes_on_one_machine_share_its_cores():
    """Four engines of 15 core milliseconds and 1 of the front, on 2 cores of which 0.4 are taken: 64 / 1.6."""
    time = StepTime(attention=0.010, shared=0.0, shard=0.005, crossing=0.0, num_shards=1)
    cores = SharedCores(num_cores=2, front=FrontCosts(background_cores=0.4))
    took = step_s(time, 4, cores=cores, front_s=0.001)
    assert 0.040 <= took <= 0.040 + 0.015
    assert cores.times(3).left == pytest.approx(4.8)


def test_what_is_in_front_waits_for_shared_cores_too():
    """Between a client and its engine are 20 ms, both ways. On one core a step takes longer, and so do the ways."""
    load = partial(ClosedLoad, Lengths(prompt_tokens=1, output_tokens=1), concurrency=1, num_requests=9)
    alone = simulate(load(), latency_s=0.020)
    assert alone.first_token_s[-1] == pytest.approx(alone.mean_step_s + 0.020)
    crowded = simulate(load(), latency_s=0.020, cores=SharedCores(num_cores=1, front=FrontCosts()))
    longer = crowded.mean_step_s / alone.mean_step_s
    assert longer > 1.1
    assert crowded.first_token_s[-1] == pytest.approx(longer * (alone.mean_step_s + 0.020))


def test_an_h200_makes_the_steps_that_were_measured_on_one():
    """BENCHMARKS.md: 32 sequences split over two shards, 65 steps a request, 10.3 requests/s. The shards shared one
    GPU, so the experts are read as by one."""
    roofline = Roofline(MODEL, sizes_of(MODEL, "bfloat16"), find_gpu("h200"))
    alone = StepTime.of(roofline, StepWork(rows=32, samples=32, context=32 * 96), 1, 1.0).alone
    assert alone == pytest.approx(32 / 10.3 / 65, rel=0.1)


def test_published_figures_are_in_the_document():
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    for gpu in GPUS.values():
        row = f"| {gpu.name} | {gpu.memory_bytes / 1e9:.0f} GB | {gpu.bytes_s / 1e12:g} TB/s | {gpu.flops / 1e12:g} |"
        assert row in page


# One engine


@st.composite
def loads(draw):
    """(step at which it comes, prompt tokens, output tokens) of some requests."""
    some = st.tuples(st.integers(0, 30), st.integers(1, 150), st.integers(1, 12))
    return sorted(draw(st.lists(some, min_size=1, max_size=14)))


@given(loads())
@settings(max_examples=25, deadline=None)
def test_a_modelled_engine_computes_the_tokens_that_the_real_one_computes(arrivals):
    """In as many steps, give or take one, as long as the cache has room: the scheduler's own answer is the oracle."""
    real = make_engine(num_blocks=4000, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=500)
    model = EngineModel(replace(LIMITS, max_num_seqs=4, max_num_batched_tokens=32))
    expected, found, number = [], [], 0
    while number <= 30 or real.has_work:
        for place, (at, prompt_tokens, output_tokens) in enumerate(arrivals):
            if at == number:
                first = 1000 * (place + 1)  # no two prompts begin alike
                real.submit(request(str(place), range(first, first + prompt_tokens), max_tokens=output_tokens))
                model.add(Request(place, 0.0, prompt_tokens, output_tokens))
        before = len(real.runner.steps)
        real.step()
        expected += [sum(tokens for _, tokens in step) for step in real.runner.steps[before:]]
        if (step := model.plan(1)) is not None:
            found.append(step.work.rows)
            model.finish(step, 1)
        number += 1
    assert sum(found) == sum(expected)
    assert abs(len(found) - len(expected)) <= 1
    assert not model.num_requests


@given(loads(), st.integers(200, 400))
@settings(max_examples=60, deadline=None)
def test_every_request_ends_however_small_the_cache_is(arrivals, cache_tokens):
    load = TraceLoad([(at / 100, prompt, output) for at, prompt, output in arrivals])
    record = simulate(load, limits=replace(LIMITS, cache_tokens=cache_tokens), replicas=2)
    assert len(record.whole_s) == len(arrivals)
    assert record.output_tokens == sum(output for _, _, output in arrivals)


def test_the_latest_loses_its_tokens_where_the_cache_is_full():
    """Room for 40 tokens and half a block each: two of 10 + 20 tokens do not fit, and the second begins again, until
    the first is through."""
    model = EngineModel(replace(LIMITS, cache_tokens=56))
    for number in range(2):
        model.add(Request(number, 0.0, 10, 20))
    ended = []
    while (step := model.plan(1)) is not None:
        ended += [request.number for request in model.finish(step, step.steps).ended]
    assert ended == [0, 1]
    assert model.num_preempted


def test_alike_steps_are_made_at_once_up_to_the_next_end():
    """A prompt's step brings the first of 5 tokens, then 4 steps alike bring the others."""
    model = EngineModel(LIMITS)
    model.add(Request(0, 0.0, 10, 5))
    first = model.plan(100)
    model.finish(first, 1)
    others = model.plan(100)
    assert (first.work.rows, first.steps, others.work.rows, others.steps) == (10, 1, 1, 4)
    assert others.work.context == 10 + 1.5  # 10, 11, 12, 13


# A cluster


def test_a_lone_request_takes_the_sum_of_its_steps():
    """A prompt of 8: 10 + 8 + 2 + 3 ms; two tokens of 16 ms each; half of 6 ms on its way there, half back."""
    record = simulate(
        ClosedLoad(Lengths(prompt_tokens=8, output_tokens=3), concurrency=1, num_requests=2), latency_s=0.006
    )
    assert record.first_token_s == pytest.approx([0.029, 0.029])
    assert record.per_token_s == pytest.approx([0.016, 0.016])
    assert record.whole_s == pytest.approx([0.061, 0.061])
    assert record.end_s == pytest.approx(0.122)


def test_many_replicas_answer_as_one_does_under_their_share_of_the_load():
    """Where nothing is shared but the shards, which are idle, ten with leaps over steps are ten times one without."""
    lengths = Lengths(prompt_tokens=20, output_tokens=30)
    one = simulate(OpenLoad(lengths, rate=2.0, num_requests=400), shards=0)
    ten = simulate(OpenLoad(lengths, rate=20.0, num_requests=4000), shards=0, replicas=10)
    means = [sum(record.whole_s) / len(record.whole_s) for record in (one, ten)]
    assert means[1] == pytest.approx(means[0], rel=0.05)


def test_a_full_queue_refuses():
    record = simulate(
        OpenLoad(Lengths(prompt_tokens=8, output_tokens=50), rate=1000.0, num_requests=50),
        limits=replace(LIMITS, max_num_seqs=2, max_waiting=3),
    )
    assert record.refused == 50 - len(record.whole_s) > 0


# The smallest cluster


def search(**cluster):
    base = ClusterModel(**{"replicas": 1, "shards": 1, "limits": LIMITS, **cluster})
    return Search(costs=Flat(), cluster=base, most_shards=2)


GOAL = Goal(rate=30.0, lengths=Lengths(prompt_tokens=8, output_tokens=20), first_token_s=0.5, per_token_s=0.040)


def test_the_smallest_cluster_that_keeps_the_goal_is_found():
    """One fewer does not keep it."""
    finder = search()
    trial = finder.find(GOAL)
    assert trial.keeps(GOAL)
    replicas, shards = trial.cluster.replicas, trial.cluster.shards
    assert replicas > 1
    assert not finder.attempt(GOAL, replicas - 1, shards).keeps(GOAL)


def test_an_impossible_goal_is_refused_with_the_nearest_possible_one():
    """A lone step takes 16 ms, with two shards 14: none can bring a token in 5."""
    finder = search()
    with pytest.raises(
        SetupError, match=r"no cluster keeps --ttft 0.5 and --itl 0.005 .*: --ttft 0.5 --itl (\d\S+)"
    ) as met:
        finder.find(replace(GOAL, per_token_s=0.005))
    nearest = float(str(met.value).rsplit(" ", 1)[1])
    assert finder.find(replace(GOAL, per_token_s=nearest)).per_token_s[1] <= nearest


# A calibration


CALIBRATION = Calibration(
    model=describe_shapes(MODEL), dtype="bfloat16", machine="Machine: 2 cores.", num_cores=2, memory_bytes=24 << 30,
    num_layers=24, num_experts=60, top_k=4, rows=Curve(((1.0, 0.1), (16.0, 0.2))), samples=Curve(((1.0, 0.0),)),
    context_s=1e-6, shared=Curve(((1.0, 0.01),)), experts=Curve(((1.0, 0.024), (17.0, 0.184))), call_s=0.0005,
    crossing=Curve(((1.0, 0.001),)), stretch=1.1,
    front=FrontCosts(request_s=0.002, latency_s=0.01), client=FrontCosts(),
)  # fmt: skip


def test_a_shard_of_two_has_half_of_the_products_and_all_of_its_calls():
    """24 calls of 0.5 ms; of the other 12 and 172 ms a half. At 1.5 times the mean load: 12 + 129."""
    assert CALIBRATION.shard_s(1, 1) == pytest.approx(0.024)
    assert CALIBRATION.shard_s(1, 2) == pytest.approx(0.018)
    assert CALIBRATION.shard_s(17, 2, 1.5) == pytest.approx(0.012 + 0.129)


def test_a_calibration_is_written_and_read(tmp_path):
    path = tmp_path / "calibration.json"
    write_calibration(CALIBRATION, path)
    assert read_calibration(path) == CALIBRATION


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "is no calibration"),
        ("[]", "is of another version or none"),
        ('{"version": 0}', "is of another version or none"),
        ('{"version": 1}', "is no calibration"),
        ('{"version": 1, "rows": {"points": [[1, "x"]]}}', "is no calibration"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(tmp_path, content, named):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(SetupError, match=named):
        read_calibration(path)


@pytest.mark.parametrize("value", ["NaN", "-1", "1e400", str(10**400), "true", "[]", '"x"'])
@pytest.mark.parametrize("name", ["num_cores", "memory_bytes", "context_s", "stretch", "request_s"])
def test_numbers_that_no_machine_has_are_refused_in_one_line(tmp_path, name, value):
    path = tmp_path / "calibration.json"
    write_calibration(CALIBRATION, path)
    path.write_text(re.sub(rf'"{name}": [^,\n]+', f'"{name}": {value}', path.read_text(), count=1))
    with pytest.raises(SetupError, match=rf"is no calibration \({name}") as met:
        read_calibration(path)
    assert len(str(met.value).splitlines()) == 1


# The command


@pytest.fixture
def model_dir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen1.5-MoE-A2.7B"]))
    return tmp_path


def test_plan_says_what_hardware_a_load_needs(model_dir, capsys):
    options = ["--gpu", "h200", "--rate", "2", "--input", "500", "--output", "50", "--ttft", "1", "--itl", "0.08"]
    assert main(["plan", str(model_dir), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["capacity"]["attention_replicas"] == 1
    assert len(found["expert_shards"]) == found["capacity"]["expert_shards"] == 1
    assert found["capacity"]["unit_seconds_per_million_output_tokens"] == pytest.approx(2e6 / (2 * 50))
    assert found["capacity"]["per_token_s"]["p90"] <= 0.08
    assert main(["plan", str(model_dir), *options]) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines are as wide as the terminal
    assert "1 attention replica and 1 expert shard: 2 x h200, a GPU for each process" in out
    assert "bottleneck: crossings" in out


def test_plan_counts_machines_by_a_calibration(model_dir, tmp_path, capsys):
    """The dense half has 6.2 GB, the experts 24.9: at least two of the 12.9 GB that a core has."""
    path = tmp_path / "calibration.json"
    write_calibration(CALIBRATION, path)
    options = ["--calibration", str(path), "--rate", "0.1", "--input", "16", "--output", "8", "--itl", "5"]
    assert main(["plan", str(model_dir), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["capacity"]
    assert (found["expert_shards"], found["units"]) == (3, 2)
    write_calibration(replace(CALIBRATION, model="another"), path)
    assert main(["plan", str(model_dir), *options]) == 2
    assert "is of another model (another, bfloat16)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--rate", "2"], "give --gpu NAME or --calibration FILE"),
        (["--gpu", "h200"], "--gpu is of a plan of hardware: give --rate too"),
        (["--gpu", "h300", "--rate", "2"], "--gpu h300 is not in the table: b200, h200"),
        (["--gpu", "h200", "--rate", "0"], "--rate is 0"),
        (["--gpu", "h200", "--rate", "nan"], "--rate is nan"),
        (["--gpu", "h200", "--rate", "2", "--shards", "3"], "--shards and --rate are two questions"),
        (["--gpu", "h200", "--rate", "2", "--quantization", "int8"], "--quantization was not measured"),
        (
            ["--gpu", "h200", "--rate", "2", "--input", "9000"],
            "make 9,300 tokens, the model's context has 8,192",
        ),
        (["--gpu", "h200", "--rate", "2", "--itl", "0.001"], "the nearest that one keeps: --ttft 1 --itl 0.0"),
        (["--calibration", "/missing/file", "--rate", "2"], "cannot be read: No such file"),
        (["--shards", "0"], "0 expert shards for 60 experts"),
        (["--gpu", "h200", "--rate", "1e6"], "at most 30,000 requests are simulated; plan a part"),
        (["--gpu", "h200", "--rate", "1e-30"], "--rate is 1e-30"),
        (["--input", "20"], "--input does nothing without --rate"),
        (["--max-num-seqs", "2"], "--max-num-seqs is of a plan of hardware"),
        (["--mean-life", "20"], "--mean-life does nothing without --trace"),
        (["--imbalance", "2"], "--imbalance does nothing without --trace"),
        (["--gpu", "h200", "--trace", "x", "--start", "5"], "--start does nothing without --max-attention-replicas"),
        (["--gpu", "h200", "--trace", "x", "--recovery", "5"], "--recovery does nothing without --mean-life"),
        (
            ["--gpu", "h200", "--trace", "x", "--attention-replicas", "3", "--max-attention-replicas", "2"],
            "--max-attention-replicas is 2, less than --attention-replicas, 3",
        ),
        (
            ["--calibration", "x", "--trace", "x", "--max-attention-replicas", "2"],
            "--max-attention-replicas is of GPUs",
        ),
    ],
)
def test_plans_that_are_impossible_are_refused_in_one_line(model_dir, capsys, options, named):
    assert main(["plan", str(model_dir), *options]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert named in line


def test_answers_of_one_token_have_no_further_ones(model_dir, capsys):
    options = ["--gpu", "h200", "--rate", "2", "--output", "1", "--itl", "0.001"]
    assert main(["plan", str(model_dir), *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["capacity"]["per_token_s"]["p90"] == 0
    assert main(["plan", str(model_dir), *options]) == 0
    assert "each further one" not in capsys.readouterr().out


def test_a_cut_simulation_is_mentioned():
    trial = search().attempt(replace(GOAL, rate=1000.0, first_token_s=1e6), replicas=1, shards=1)
    assert (trial.num_requests, trial.is_cut) == (30_000, True)


def test_a_dense_model_is_replayed_without_shards(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen2-7B"]))
    line = {"arrival_s": 0, "prompt_tokens": 9, "output_tokens": 9}
    trace = trace_file(tmp_path / "requests.jsonl", [line])
    assert main(["plan", str(tmp_path), "--gpu", "h200", "--trace", trace]) == 0
    assert "1 request in 0 s: 1 answered" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen1.5-MoE-A2.7B"]))
    assert main(["plan", str(tmp_path), "--gpu", "h200", "--trace", trace]) == 2
    assert "give --shards too, at least 1 of h200" in capsys.readouterr().err


def test_a_machine_without_room_is_told_of_no_gpu(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen2-72B"]))
    path = tmp_path / "calibration.json"
    config = read_model_config(PUBLISHED["Qwen2-72B"])
    write_calibration(replace(CALIBRATION, model=describe_shapes(config)), path)
    assert main(["plan", str(tmp_path), "--calibration", str(path), "--rate", "1"]) == 2
    assert "machines with more memory for each core are needed" in capsys.readouterr().err


def test_a_model_without_room_names_the_smallest_gpu_that_has(tmp_path, capsys):
    """Qwen2-72B: 145 GB."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen2-72B"]))
    assert main(["plan", str(tmp_path), "--gpu", "h100", "--rate", "1"]) == 2
    assert "b200 is the smallest that has" in capsys.readouterr().err


def trace_file(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_a_trace_is_replayed_with_failures_and_scaling(model_dir, tmp_path, capsys):
    lines = [{"timestamp": 100 * i, "input_length": 200, "output_length": 40} for i in range(200)]
    options = ["--gpu", "h200", "--shards", "1", "--trace", trace_file(tmp_path / "requests.jsonl", lines)]
    assert main(["plan", str(model_dir), *options, "--json"]) == 0
    quiet = json.loads(capsys.readouterr().out)["trace"]
    assert (quiet["answered"], quiet["refused"], quiet["failures"]) == (200, 0, 0)
    assert 20 < quiet["took_s"] < 40  # the last one comes at 19.9
    events = ["--mean-life", "5", "--recovery", "2", "--max-attention-replicas", "3", "--start", "1"]
    assert main(["plan", str(model_dir), *options, *events, "--json"]) == 0
    broken = json.loads(capsys.readouterr().out)["trace"]
    assert broken["answered"] + broken["refused"] == 200
    assert broken["failures"] > 0
    assert broken["answer_s"][2] > quiet["answer_s"][2]
    assert main(["plan", str(model_dir), *options]) == 0
    assert "200 answered, 0 refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 lacks its arrival"),
        ('{"arrival_s": "x", "prompt_tokens": 1, "output_tokens": 1}', "arrival_s is 'x', a number"),
        ('{"arrival_s": 1, "prompt_tokens": 0, "output_tokens": 1}', "prompt_tokens is 0, a whole number from 1"),
        ('{"arrival_s": 1, "prompt_tokens": 9000000, "output_tokens": 1}', "has a request of 9,000,001 tokens"),
        ("", "has no request"),
        (
            '{"arrival_s": 1, "prompt_tokens": 8000, "output_tokens": 200}',
            "8,200 tokens, the model's context has 8,192",
        ),
        ('{"arrival_s": NaN, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s is nan"),
        ('{"arrival_s": -1, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s is -1"),
        ('{"arrival_s": 1e400, "prompt_tokens": 1, "output_tokens": 1}', "arrival_s is inf"),
        (f'{{"arrival_s": {10**400}, "prompt_tokens": 1, "output_tokens": 1}}', "arrival_s is a whole number of"),
        (f'{{"arrival_s": 1, "prompt_tokens": {10**400}, "output_tokens": 1}}', "prompt_tokens is a whole number of"),
        (
            '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n'
            '{"arrival_s": 1e9, "prompt_tokens": 1, "output_tokens": 1}',
            "11,574 days long",
        ),
    ],
)
def test_a_trace_that_cannot_be_replayed_is_refused_in_one_line(model_dir, tmp_path, capsys, line, named):
    path = tmp_path / "requests.jsonl"
    path.write_text(line)
    assert main(["plan", str(model_dir), "--gpu", "h200", "--shards", "1", "--trace", str(path)]) == 2
    [refusal] = capsys.readouterr().err.splitlines()
    assert named in refusal
