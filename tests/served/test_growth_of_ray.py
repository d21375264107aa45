"""Nothing of a served cluster grows with the requests that it has answered: no process's memory, no log file.

GROWTH_REQUESTS: how many are sent; the figures for 20,000 are in BENCHMARKS.md (`--log-cli-level=info -o
log_cli=true` shows them).
"""

import logging
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_listening import family

from cluster.pb.moecluster.v1 import inference_pb2 as pb
from cluster.pb.moecluster.v1 import inference_pb2_grpc

pytestmark = [pytest.mark.ray, pytest.mark.slow]

log = logging.getLogger(__name__)

REQUESTS = int(os.environ.get("GROWTH_REQUESTS", "2000"))
WARM_UP = 500
GCS_BYTES = 1 << 20  # per 1,000 requests; it was 4.2 MB
PROCESS_BYTES = 4 << 20  # per 1,000 requests, of any other process; the allocator's steps allow no less
LOG_BYTES = 20  # for each request; a line of one was 159
LOG_BYTES_A_SECOND = 3000  # of all Ray's processes, with or without requests


def memory() -> dict[str, int]:
    """Anonymous bytes of each process of this Ray, by name and pid: HAProxy, its supervisor and the text workers are
    children of Ray's actors."""
    found: dict[str, int] = {}
    for pid in family(os.getpid())[1:]:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        except OSError:
            continue  # gone
        if "RssAnon" in status:  # a zombie has none
            found[f"{short_name(command)} {pid}"] = int(status["RssAnon"].split()[0]) << 10
    return found


def short_name(command: str) -> str:
    """A title of Ray's, a Python module with its arguments, or a program."""
    if command.startswith("ray::"):
        return command
    module = re.search(r" -m (cluster\..*)", command)
    return module[1] if module else Path(command.split()[0]).name


def log_sizes(session: Path) -> Counter[str]:
    """Bytes of the log files by name; rotated files count with the first one."""
    sizes = Counter[str]()
    for path in session.rglob("logs/**/*.*"):
        if path.is_file() and not path.is_symlink():
            sizes[re.sub(r"\.[0-9]+$", "", path.name)] += path.stat().st_size
    return sizes


def test_neither_memory_nor_logs_grow_with_the_requests_that_were_answered(served, channel, ray_cluster):
    session = Path(ray_cluster._private.worker._global_node.get_session_dir_path()).parent
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    params = pb.SamplingParams(temperature=0, repetition_penalty=1, max_tokens=1, ignore_eos=True)

    def ask(number):
        """Token ids, a text and a conversation in turn: no two are alike."""
        turn = pb.ChatMessage(role="user", content=f"question {number}")
        kinds = (
            {"token_ids": pb.TokenIds(ids=[number % 1000])},
            {"text": f"text {number}"},
            {"chat": pb.ChatMessages(messages=[turn])},
        )
        asked = pb.GenerateRequest(**kinds[number % len(kinds)], sampling_params=params)
        return len(stub.Generate(asked, timeout=120).token_ids)

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(ask, range(WARM_UP))) == WARM_UP
        time.sleep(5)  # reports that come every few seconds have been sent
        memory_before, logs_before, began = memory(), log_sizes(session), time.monotonic()
        assert sum(pool.map(ask, range(REQUESTS))) == REQUESTS
        time.sleep(5)
    thousands, seconds = REQUESTS / 1000, time.monotonic() - began
    grown = {name: size - memory_before[name] for name, size in memory().items() if name in memory_before}
    written = log_sizes(session)
    written.subtract(logs_before)
    logged = written.total()
    for name, size in Counter(grown).most_common(40):
        log.info("%s: %.1f MB, %+.2f MB", name, memory_before[name] / 1e6, size / 1e6)
    log.info("logs: %d bytes over %d requests in %.0f s: %s", logged, REQUESTS, seconds, written.most_common(5))
    assert {name.split()[0] for name in grown} >= {"haproxy", "cluster.serving.text.worker"}, sorted(grown)
    [gcs] = [size for name, size in grown.items() if name.startswith("gcs_server ")]
    assert gcs < thousands * GCS_BYTES
    assert {name: size for name, size in grown.items() if size > thousands * PROCESS_BYTES} == {}
    assert logged < LOG_BYTES * REQUESTS + LOG_BYTES_A_SECOND * seconds
