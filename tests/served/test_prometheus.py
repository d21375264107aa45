"""A real Prometheus scrapes the served application with the rules of deploy/, a real Alertmanager gets the alerts.

Both run with the files of deploy/, with seconds for minutes. A shard is killed for longer than a respawn takes.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlencode, urlsplit
from urllib.request import urlopen

import httpx2
import promql_parser
import pytest
import yaml
from promql import DEPLOY, RULES, expressions, rules, selectors
from served_tools import wait_until

from cluster.client.grpc_client import Client
from cluster.types import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BINARIES = {"PROMETHEUS": "prometheus", "ALERTMANAGER": "prometheus-alertmanager"}
OWN = {"up", "ALERTS"}  # Prometheus's
# Metrics that appear in a scrape only after these events.
AFTER_THE_EVENT = {
    "moecluster_controller_respawns_total": "a shard died",
    "moecluster_controller_changes_total": "experts were moved, or could not be",
    "moecluster_responses_evicted_total": "a kept response made room for a newer one",
}


def binary(variable: str) -> str:
    found = os.environ.get(variable) or shutil.which(BINARIES[variable])
    if found is None:
        pytest.skip(f"{BINARIES[variable]} is not installed")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Receiver:
    """The webhook behind both of Alertmanager's receivers. received: (receiver, alert name, status), as they came."""

    def __init__(self) -> None:
        received = self.received = list[tuple[str, str, str]]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                alert_group = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                received.extend(
                    (alert_group["receiver"], a["labels"]["alertname"], a["status"]) for a in alert_group["alerts"]
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Watch:
    """Prometheus and Alertmanager over one target, and the receiver of their alerts."""

    def __init__(self, folder, target: str) -> None:
        self.receiver = Receiver()
        self._prometheus, self._alertmanager = (f"127.0.0.1:{free_port()}" for _ in range(2))
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "500ms"}
        config["alerting"]["alertmanagers"][0]["static_configs"] = [{"targets": [self._alertmanager]}]
        config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] == "moe-cluster"]
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        alerting = yaml.safe_load((DEPLOY / "prometheus" / "alertmanager.yaml").read_text())
        page, ticket = alerting["route"]["routes"][0], alerting["route"]
        page |= {"group_wait": "0s", "group_interval": "1s"}
        ticket |= {"group_wait": "1s", "group_interval": "1s"}
        for receiver in alerting["receivers"]:
            receiver["webhook_configs"] = [{"url": self.receiver.url}]
        quick = yaml.safe_load(RULES.read_text())
        for rule in (rule for group in quick["groups"] for rule in group["rules"] if "for" in rule):
            rule["for"] = "1s"
        for name, content in (("prometheus", config), ("alertmanager", alerting), ("rules", quick)):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
        self._log = folder / "log"
        self._processes = [
            self._start(binary("ALERTMANAGER"), f"--config.file={folder}/alertmanager.yaml",
                        f"--storage.path={folder}/alerts", f"--web.listen-address={self._alertmanager}",
                        "--cluster.listen-address="),
            self._start(binary("PROMETHEUS"), f"--config.file={folder}/prometheus.yaml",
                        f"--storage.tsdb.path={folder}/series", f"--web.listen-address={self._prometheus}"),
        ]  # fmt: skip

    def _start(self, *command: str) -> "subprocess.Popen[bytes]":
        with self._log.open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The results of an expression now. Raises HTTPError for one that Prometheus refuses."""
        with urlopen(f"http://{self._prometheus}/api/v1/query?{urlencode({'query': expression})}", timeout=60) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def value(self, expression: str) -> float | None:
        """The value of an expression with one result; None without a result."""
        results = self.query(expression) if self.is_ready() else []
        return float(results[0]["value"][1]) if results else None

    def state(self) -> str:
        """Of the target: its health, its last scrape's seconds and error."""
        with urlopen(f"http://{self._prometheus}/api/v1/targets", timeout=60) as reply:
            [target] = json.load(reply)["data"]["activeTargets"]
        return f"{target['health']} in {target['lastScrapeDuration']} s: {target['lastError'] or 'no error'}"

    def names(self) -> set[str]:
        with urlopen(f"http://{self._prometheus}/api/v1/label/__name__/values", timeout=60) as reply:
            return set(json.load(reply)["data"])

    def is_ready(self) -> bool:
        for process in self._processes:
            assert process.poll() is None, self._log.read_text()
        try:
            return all(
                urlopen(f"http://{address}/-/ready", timeout=60).status == 200
                for address in (self._prometheus, self._alertmanager)
            )
        except OSError:
            return False

    def alerts(self) -> dict[str, dict[str, Any]]:
        """Alertmanager's alerts, by alert name."""
        with urlopen(f"http://{self._alertmanager}/api/v2/alerts", timeout=60) as reply:
            return {alert["labels"]["alertname"]: alert for alert in json.load(reply)}

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.wait()
        self.receiver.close()


@pytest.fixture(scope="module")
def watch(application: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    served = application.running()
    wait_until(lambda: bool(served.status().metrics_addresses), "the metrics are served")
    watch = Watch(tmp_path_factory.mktemp("prometheus"), urlsplit(served.status().metrics_addresses[0]).netloc)
    try:
        wait_until(lambda: watch.value("up") == 1, "a first scrape")
        body = {"input": "count me", "max_output_tokens": 1}  # the store of responses starts with the first one
        httpx2.post(f"{served.http_url}/v1/responses", json=body, timeout=60).raise_for_status()
        with Client(f"127.0.0.1:{served.grpc_port}") as client:
            try:
                wait_until(lambda: _traffic_is_seen(client, watch), "the rates of traffic")
            except AssertionError as error:
                raise AssertionError(f"{error}; {watch.state()}; {served.status()}") from error
        yield watch
    finally:
        watch.close()


def _traffic_is_seen(client: Client, watch: Watch) -> bool:
    """A rate needs two scrapes, and many metrics appear with the first request."""
    for _ in client.stream("count me", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)):
        pass
    return watch.value("moecluster_responses_kept") is not None and all(
        watch.value(f"sum(rate({metric}[1m]))")
        for metric in ("moecluster_dispatch_rows_total", "moecluster_expert_tokens_total")
    )


def test_no_alert_fires_in_a_healthy_cluster(watch):
    assert watch.query('ALERTS{alertstate="firing", severity="critical"}') == []
    assert watch.value("up") == 1


def test_every_expression_is_evaluated_and_a_panel_has_something_to_show(watch):
    """Except panels of events that have not happened."""
    empty = []
    for place, expression in expressions().items():
        results = watch.query(expression)
        named = {selector.name for selector in selectors(promql_parser.parse(expression))}
        if not results and not place.startswith("rules.yaml") and not named & AFTER_THE_EVENT.keys():
            empty.append(place)
    assert empty == []


def test_a_killed_shard_pages_and_the_page_ends_when_it_is_back(watch, served):
    """Its experts have no other copy here. It is killed again when it is back before Prometheus has noticed.

    The ticket that a shard is missing follows from the page, which inhibits it.
    """

    def paged():
        alerts = watch.alerts()
        ticket = alerts.get("MoeClusterShardsMissing")
        if page := alerts.get("MoeClusterExpertWithoutCopy"):
            pages.append(page)
            if ticket and ticket["status"]["inhibitedBy"] == [page["fingerprint"]]:
                assert ticket["status"]["state"] == "suppressed"
                return True
        shard = served.status().shards[1]
        if shard.state == "up" and shard.process is not None:
            os.kill(shard.process.pid, signal.SIGKILL)
        return False

    pages: list[dict[str, Any]] = []
    wait_until(paged, "Alertmanager has the page, and the ticket is inhibited")
    alert = pages[-1]
    assert alert["labels"] == {
        "alertname": "MoeClusterExpertWithoutCopy",
        "job": "moe-cluster",
        "severity": "critical",
    }
    assert re.match(r"\d+ experts of moe-cluster", alert["annotations"]["description"])
    wait_until(lambda: "MoeClusterExpertWithoutCopy" not in watch.alerts(), "the page has ended")
    received = watch.receiver.received
    wait_until(lambda: ("page", "MoeClusterExpertWithoutCopy", "resolved") in received, "and it says so")
    assert ("page", "MoeClusterExpertWithoutCopy", "firing") in received
    wait_until(lambda: served.status().covered, "the shard is back")


def test_every_metric_in_rules_and_dashboards_is_in_the_scrape(watch):
    """After a shard was killed; AFTER_THE_EVENT gives the reason for each missing metric."""
    asked = {s.name for expression in expressions().values() for s in selectors(promql_parser.parse(expression))}
    records = {rule["record"] for rule in rules() if "record" in rule}
    assert asked - records - OWN - watch.names() <= AFTER_THE_EVENT.keys()
    assert AFTER_THE_EVENT.keys() <= asked
