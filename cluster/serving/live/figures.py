"""Latencies and traffic between two scrapes of a cluster's figures, in Prometheus' text format."""

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WINDOW_S = 30.0  # of which latencies are shown
FIRST_TOKEN = "moecluster_time_to_first_token_seconds"
BETWEEN_TOKENS = "moecluster_inter_token_latency_seconds"
ROUND_TRIP = "moecluster_dispatch_round_trip_seconds"
ROWS = "moecluster_dispatch_rows_total"
COMPUTE = "moecluster_shard_compute_seconds_sum"
WEIGHTS = "moecluster_shard_weights_bytes"
_WANTED = re.compile(
    rf"^(?P<name>(?:{FIRST_TOKEN}|{BETWEEN_TOKENS})_bucket|{ROUND_TRIP}_(?:sum|count)|{ROWS}|{COMPUTE}|{WEIGHTS})"
    r"\{(?P<labels>[^}]*)\} (?P<value>\S+)$",
    re.MULTILINE,
)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

LINK = "link"  # rows of one attention replica to one shard
Series = tuple[str, str]  # a metric's name; the bound of a bucket, the shard, or "replica/shard"
Scrape = dict[Series, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds, of those in the window: half of them took at most p50; None without any."""

    p50: float | None = None
    p95: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFigures:
    """rows_per_s: sent to it, a row being one token at one layer.  in_flight: rows that were on the way at a time.
    busy: the share of time in which it computed.  bytes: of its weights.
    """

    id: int
    rows_per_s: float
    in_flight: float
    busy: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFigures:
    """Between an attention replica, by the name that it has in the metrics (its slot), and a shard."""

    replica: str
    shard: int
    rows_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """links: those with rows since the last scrape."""

    first_token: Latency
    between_tokens: Latency
    shards: tuple[ShardFigures, ...]
    links: tuple[LinkFigures, ...]


def parse(exposition: str) -> Scrape:
    """Sums each series over nodes and attention replicas."""
    scrape: Scrape = {}
    for found in _WANTED.finditer(exposition):
        labels = dict(_LABEL.findall(found["labels"]))
        key = found["name"], labels.get("le") or labels.get("shard_id", "")
        scrape[key] = scrape.get(key, 0.0) + float(found["value"])
        if found["name"] == ROWS:
            link = LINK, f"{labels['replica']}/{labels['shard_id']}"
            scrape[link] = scrape.get(link, 0.0) + float(found["value"])
    return scrape


class FigureMeter:
    """For one thread."""

    def __init__(self) -> None:
        self._scrapes: deque[tuple[float, Scrape]] = deque()

    def observe(self, exposition: str, now: float) -> Figures | None:
        """now: monotonic seconds. None before the second scrape."""
        scrape = parse(exposition)
        while self._scrapes and now - self._scrapes[0][0] > WINDOW_S:
            self._scrapes.popleft()
        self._scrapes.append((now, scrape))
        if len(self._scrapes) < 2:
            return None
        first, (then, last) = self._scrapes[0][1], self._scrapes[-2]
        return Figures(
            first_token=_latency(FIRST_TOKEN, first, scrape),
            between_tokens=_latency(BETWEEN_TOKENS, first, scrape),
            shards=tuple(_shards(last, scrape, max(now - then, 1e-3))),
            links=tuple(_links(last, scrape, max(now - then, 1e-3))),
        )


def _shards(before: Scrape, after: Scrape, seconds: float) -> list[ShardFigures]:
    def grown(name: str, shard: str) -> float:
        return max(0.0, after.get((name, shard), 0.0) - before.get((name, shard), 0.0))

    figures = []
    for shard in sorted({key for name, key in after if name == WEIGHTS}, key=int):
        rows = grown(ROWS, shard)
        batches, waited_s = grown(f"{ROUND_TRIP}_count", shard), grown(f"{ROUND_TRIP}_sum", shard)
        # Little's law: as many are on the way as come in a second, times the seconds that each is on the way.
        in_flight = rows / seconds * (waited_s / batches) if batches else 0.0
        figures.append(
            ShardFigures(
                id=int(shard),
                rows_per_s=round(rows / seconds, 1),
                in_flight=round(in_flight, 2),
                busy=round(min(1.0, grown(COMPUTE, shard) / seconds), 3),
                bytes=int(after[WEIGHTS, shard]),
            )
        )
    return figures


def _links(before: Scrape, after: Scrape, seconds: float) -> Iterator[LinkFigures]:
    for (name, link), rows in sorted(after.items()):
        if name == LINK and (grown := rows - before.get((name, link), 0.0)) > 0:
            replica, _, shard = link.rpartition("/")
            yield LinkFigures(replica=replica, shard=int(shard), rows_per_s=round(grown / seconds, 1))


def _latency(name: str, before: Mapping[Series, float], after: Mapping[Series, float]) -> Latency:
    bounds = sorted(float(bound) for series, bound in after if series == f"{name}_bucket")
    counts = {float(bound): value for (series, bound), value in after.items() if series == f"{name}_bucket"}
    for (series, bound), value in before.items():
        if series == f"{name}_bucket" and float(bound) in counts:
            counts[float(bound)] -= value
    cumulative = [counts[bound] for bound in bounds]
    return Latency(p50=quantile(bounds, cumulative, 0.5), p95=quantile(bounds, cumulative, 0.95))


def quantile(bounds: list[float], cumulative: list[float], share: float) -> float | None:
    """As `histogram_quantile` of Prometheus: evenly spread within a bucket; the last bound but infinity at most."""
    if not cumulative or cumulative[-1] <= 0:
        return None
    rank, below, lower = share * cumulative[-1], 0.0, 0.0
    for bound, count in zip(bounds, cumulative, strict=True):
        if count >= rank:
            if bound == float("inf"):
                return round(lower, 5)
            return round(lower + (bound - lower) * (rank - below) / max(count - below, 1e-9), 5)
        below, lower = count, bound
    return None
