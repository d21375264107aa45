"""The benchmark's report, and the machine that it names."""

import dataclasses
import json
import os

from cluster.bench.machine import Machine, parse_cpuinfo, this_machine
from cluster.bench.report import Report, to_json, to_markdown
from cluster.bench.sampling import SAMPLINGS
from cluster.bench.throughput import Point, Spread, Workload
from cluster.bench.worker import SystemResult

WORKLOAD = Workload(batches=(1, 4), prompt_tokens=8, output_tokens=5, repeats=3, vocab_size=100)
MACHINE = Machine(
    cpu="Example CPU",
    cpu_features=("avx2", "amx_bf16"),
    num_cores=2,
    memory_bytes=24 << 30,
    gpus=(),
    versions=(("Python", "3.11.2"), ("torch", "2.13.0")),
)


def result(name: str, prefill: float, decode: float) -> SystemResult:
    points = tuple(
        Point(
            batch=batch,
            prefill=Spread(prefill * batch, prefill * batch - 1, prefill * batch + 1),
            decode=Spread(decode, decode, decode),
        )
        for batch in (1, 4)
    )
    return SystemResult(name=name, detail="cpu, 2 threads", load_s=1.25, points=points)


REPORT = Report(
    machine=MACHINE,
    checkpoint="4 layers",
    workload=WORKLOAD,
    reference="transformers",
    results=(result("transformers", 100.0, 20.0), result("local", 150.0, 10.0)),
    failures=("ray, 2 shards: no room",),
)


def test_the_report_reads_as_a_table_with_ratios() -> None:
    """local / transformers: prefill 150 / 100 and 600 / 400, decode 10 / 20."""
    assert to_markdown(REPORT) == (
        "Machine: 2 cores of Example CPU (avx2, amx_bf16), 24 GiB memory; Python 3.11.2, torch 2.13.0.\n"
        "\n"
        "Checkpoint: 4 layers; random prompts of 8 tokens, 5 generated, greedy. Tokens/s: median of 3 "
        "(lowest-highest), and as a ratio to transformers.\n"
        "\n"
        "| batch | system       | prefill        | ratio | decode           | ratio |\n"
        "| ----- | ------------ | -------------- | ----- | ---------------- | ----- |\n"
        "| 1     | transformers | 100 (99.0-101) | 1.00  | 20.0 (20.0-20.0) | 1.00  |\n"
        "| 1     | local        | 150 (149-151)  | 1.50  | 10.0 (10.0-10.0) | 0.50  |\n"
        "| 4     | transformers | 400 (399-401)  | 1.00  | 20.0 (20.0-20.0) | 1.00  |\n"
        "| 4     | local        | 600 (599-601)  | 1.50  | 10.0 (10.0-10.0) | 0.50  |\n"
        "\n"
        "- transformers: cpu, 2 threads; ready in 1.2 s\n"
        "- local: cpu, 2 threads; ready in 1.2 s\n"
        "- FAILED: ray, 2 shards: no room\n"
    )


def test_a_run_with_two_samplings_names_each_row_s() -> None:
    """Each sampling is divided by the reference's own: 150 / 100 in prefill, and with chat 10 / 40 in decode."""
    results = []
    for system, chat_decode in zip(REPORT.results, (40.0, 10.0), strict=True):
        chat = [
            dataclasses.replace(point, sampling="chat", decode=Spread(chat_decode, chat_decode, chat_decode))
            for point in system.points
        ]
        results.append(dataclasses.replace(system, points=(*system.points, *chat)))
    workload = dataclasses.replace(WORKLOAD, samplings=(SAMPLINGS["greedy"], SAMPLINGS["chat"]))
    report = dataclasses.replace(REPORT, workload=workload, results=tuple(results))
    text = to_markdown(report)
    assert "5 generated, greedy, chat (temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05). Tok" in text
    assert "| batch | sampling | system       | prefill        | ratio | decode           | ratio |\n" in text
    assert "| 1     | greedy   | local        | 150 (149-151)  | 1.50  | 10.0 (10.0-10.0) | 0.50  |\n" in text
    assert "| 1     | chat     | local        | 150 (149-151)  | 1.50  | 10.0 (10.0-10.0) | 0.25  |\n" in text
    read = json.loads(to_json(report))
    assert [point["sampling"] for point in read["results"][0]["points"]] == ["greedy", "greedy", "chat", "chat"]
    assert read["workload"]["samplings"][1]["top_k"] == 20


def test_latencies_are_milliseconds_of_the_same_figures() -> None:
    """local, batch 4: 4 · 8 tokens at 600 tokens/s are 53.3 ms, 4 tokens at 10 tokens/s 400 ms."""
    text = " ".join(to_markdown(REPORT, latency=True).split())
    assert "| 4 | local | 53.3 (53.2-53.4) | 0.67 | 400 (400-400) | 2.00 |" in text


def test_without_the_reference_there_are_no_ratios() -> None:
    text = to_markdown(dataclasses.replace(REPORT, results=REPORT.results[1:]))
    assert "| 150 (149-151) | -     | 10.0 (10.0-10.0) | -     |" in text


def test_the_json_has_every_figure() -> None:
    read = json.loads(to_json(REPORT))
    assert read["results"][1]["points"][1]["prefill"] == {"median": 600.0, "low": 599.0, "high": 601.0}
    assert read["workload"]["output_tokens"] == 5
    assert read["failures"] == ["ray, 2 shards: no room"]


def test_cpuinfo_gives_the_first_model_and_what_decides_speed() -> None:
    text = "processor\t: 0\nmodel name\t: First\nflags\t\t: fpu avx2 amx_bf16\n\nmodel name\t: Second\n"
    assert parse_cpuinfo(text) == ("First", ("avx2", "amx_bf16"))
    assert parse_cpuinfo("CPU part : 0xd40\nFeatures : fp sve bf16\n") == ("", ("sve", "bf16"))


def test_the_machine_is_described_by_its_parts() -> None:
    machine = this_machine()
    assert machine.num_cores == len(os.sched_getaffinity(0))
    assert 1 << 28 < machine.memory_bytes < 1 << 50
    assert [name for name, _ in machine.versions][:3] == ["Python", "torch", "ray"]
