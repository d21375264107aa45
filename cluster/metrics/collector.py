"""`/metrics` for all processes of a node, alive and dead. Knows the files of `process`, no metric by name.

Each scrape first clears up after processes that ended: their gauges go, their counters and histograms move
into one archive file for each type. So totals never fall, and the directory holds the files of living
processes and two more.
"""

import fcntl
import json
import logging
import os
import re
import socket
import socketserver
import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, generate_latest, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

from cluster.errors import SetupError
from cluster.metrics.exemplars import add_exemplars
from cluster.metrics.process import is_running
from cluster.private import private_folder

log = logging.getLogger(__name__)

_OWNED_FILE = re.compile(r"(?P<kind>[a-z]+)(_[a-z]+)?_(?P<pid>\d+)(-(?P<start>\d+))?\.(db|json|new)")
_JOURNAL = "fold.json"
_DAMAGED = (
    RuntimeError,
    struct.error,
    ValueError,
    IndexError,
)  # prometheus_client raises these on a broken file


class NodeCollector:
    """Serves the metrics of all processes that write to `multiproc_dir`.

    There is one collector a directory: the constructor raises SetupError when another one has it.
    """

    def __init__(self, multiproc_dir: Path, host: str, port: int) -> None:
        self._address = (host, port)
        self._server: ThreadingWSGIServer | None = None
        private_folder(multiproc_dir)
        self._lock_file = (multiproc_dir / "collector.lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel unlocks it when this process dies
        except OSError as error:
            self._lock_file.close()
            raise SetupError(f"another collector serves the metrics in {multiproc_dir}: stop it first") from error
        self._registry = CollectorRegistry()
        self._registry.register(_DirectoryCollector(multiproc_dir))

    def start(self) -> int:
        """Serves from a thread of its own; returns the bound port. Raises SetupError when it is taken."""
        host, port = self._address
        try:
            self._server = make_server(host, port, _only_metrics(make_wsgi_app(self._registry)),
                                       _server_class(host), _SilentHandler)  # fmt: skip
        except (OSError, OverflowError) as error:
            raise SetupError(
                f"metrics cannot be served on {host}:{port} ({error}): choose another metrics_port, 0 takes a free one"
            ) from error
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()
        bound_port: int = self._server.server_port
        log.info("metrics of this node are on http://%s:%d/metrics", host, bound_port)
        return bound_port

    def close(self) -> None:
        """Stops serving and gives the directory up; its files stay. May be called twice."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self._lock_file.close()

    def render(self) -> bytes:
        """Returns one scrape in the Prometheus text format. Clears up after dead processes; thread-safe."""
        return generate_latest(self._registry)


class _DirectoryCollector:
    """A prometheus_client collector over the files of a directory; one scrape at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._reported: set[Path] = set()

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            finish_fold(self._directory)
            clear_dead(self._directory)
            files = [str(path) for path in sorted(self._directory.glob("*.db")) if self._is_readable(path)]
            metrics = list(MultiProcessCollector.merge(files))  # type: ignore[no-untyped-call]
            add_exemplars(metrics, self._directory, lambda path: self._report(path, "exemplars"))
            return sorted(metrics, key=lambda metric: metric.name)

    def _is_readable(self, path: Path) -> bool:
        """False for a file that was just created, and for a damaged one, which is logged once."""
        if path.stat().st_size == 0:
            return False
        try:
            read_values(path)
        except _DAMAGED:
            self._report(path, "counts")
            return False
        return True

    def _report(self, path: Path, what: str) -> None:
        if path not in self._reported:
            self._reported.add(path)
            log.error("%s is damaged: its %s are missing from the metrics", path, what)


def clear_dead(directory: Path) -> None:
    """Removes the gauges and exemplars of processes that ended and folds their counts into the archives."""
    for path in directory.glob("exemplars_*"):
        if _is_dead(path):
            path.unlink(missing_ok=True)
    dead = [path for path in sorted(directory.glob("*.db")) if _is_dead(path)]
    for path in dead:
        if path.name.startswith("gauge_"):
            path.unlink()
    counted = [path for path in dead if not path.name.startswith("gauge_")]
    if counted:
        try:
            _write_fold(directory, counted)
        except OSError:
            # A full disk, for instance. The totals are right all the same: files that were not folded are still read.
            log.exception("the counts of dead processes in %s could not be folded", directory)
            return
        finish_fold(directory)
        log.info("folded the counts of %d files of dead processes", len(counted))


def _write_fold(directory: Path, files: list[Path]) -> None:
    """Adds `files` to copies of the archives. The copies count once the journal has its final name."""
    by_kind: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        by_kind[path.name.split("_")[0]].append(path)
    for kind, dead in by_kind.items():
        archive, fresh = _archive(directory, kind)
        totals: dict[str, float] = defaultdict(float)
        for path in [archive, *dead]:
            if not path.exists() or path.stat().st_size == 0:
                continue
            try:
                counts = read_values(path)
            except _DAMAGED:
                log.exception("%s is damaged: its counts are dropped", path)
                continue
            for key, value in counts.items():
                totals[key] += value
        fresh.unlink(missing_ok=True)  # half a copy, left by a collector that died
        copy = MmapedDict(str(fresh))  # type: ignore[no-untyped-call]
        for key, value in totals.items():
            copy.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
        copy.close()  # type: ignore[no-untyped-call]
    journal = directory / f"{_JOURNAL}.tmp"
    journal.write_text(json.dumps({"kinds": sorted(by_kind), "folded": [path.name for path in files]}))
    os.replace(journal, directory / _JOURNAL)


def finish_fold(directory: Path) -> None:
    """Carries out the journal, if any; again after a collector died on the way."""
    journal = directory / _JOURNAL
    if not journal.exists():
        return
    fold = json.loads(journal.read_text())
    for kind in fold["kinds"]:
        archive, fresh = _archive(directory, kind)
        if fresh.exists():
            os.replace(fresh, archive)
    for name in fold["folded"]:
        (directory / name).unlink(missing_ok=True)
    journal.unlink()


def read_values(path: Path) -> dict[str, float]:
    """Returns a file's raw values by their JSON keys. Raises one of _DAMAGED."""
    entries: Iterable[tuple[str, float, float, int]]
    entries = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
    counts = {key: value for key, value, _, _ in entries}
    for key in counts:
        json.loads(key)
    return counts


def _archive(directory: Path, kind: str) -> tuple[Path, Path]:
    """The archive of a type, and its copy in the making (which no scrape reads: it does not end in .db)."""
    return directory / f"{kind}_archive.db", directory / f"{kind}_archive.fold"


def _is_dead(path: Path) -> bool:
    owned = _OWNED_FILE.fullmatch(path.name)
    if owned is None:
        return False
    return not is_running(int(owned["pid"]), int(owned["start"]) if owned["start"] else None)


def _only_metrics(app: Callable[..., Any]) -> Callable[..., Any]:
    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["PATH_INFO"] == "/metrics":
            return app(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"metrics are at /metrics\n"]

    return serve


def _server_class(host: str) -> type[ThreadingWSGIServer]:
    class Server(ThreadingWSGIServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        def server_bind(self) -> None:
            # http.server's own looks the host's name up, which takes seconds where there is no name server.
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = host, self.server_address[1]
            self.setup_environ()

    return Server


class _SilentHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass
