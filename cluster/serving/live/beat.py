"""The part of a cluster that changes all the time, from one reading to the next. Knows no clock."""

from dataclasses import dataclass

import numpy as np

from cluster.serving.live.figures import FigureMeter, Figures
from cluster.serving.live.reading import Counts, Reading
from cluster.types import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaBeat:
    """used: the share of its KV cache.  cache_tokens: that the whole cache holds."""

    name: str
    running: int
    waiting: int
    held: int
    used: float
    cache_tokens: int
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardBeat:
    """tokens_per_s: that its experts computed, over all layers, an expert's token each.  share: of all shards'."""

    id: int
    tokens_per_s: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """seconds: since the last one.  epoch: of the plan whose layers `tokens` has.
    tokens: [sparse layers][experts] tokens in these seconds; None where no expert had any.
    tokens_per_s: made for clients.  imbalance: the slowest shard's load against the mean, over the last minutes.
    figures: None without news of them.
    """

    number: int
    seconds: float
    epoch: int
    tokens: list[list[int]] | None
    tokens_per_s: float
    imbalance: float
    uncovered_s: float
    shards: tuple[ShardBeat, ...]
    replicas: tuple[ReplicaBeat, ...]
    figures: Figures | None


class BeatMaker:
    """Keeps the last reading. For one thread."""

    def __init__(self) -> None:
        self._last: Reading | None = None
        self._figures = FigureMeter()
        self._number = 0

    def beat(self, reading: Reading) -> Beat:
        last, self._last = self._last, reading
        seconds = 0.0 if last is None else max(reading.at - last.at, 1e-3)
        counted = {} if last is None else _new_tokens(last, reading)
        tokens = np.sum(list(counted.values()), axis=0) if counted else None
        replicas = tuple(_replicas(last, reading))
        self._number += 1
        return Beat(
            number=self._number,
            seconds=round(seconds, 3),
            epoch=reading.status.epoch,
            tokens=tokens.tolist() if tokens is not None and tokens.any() else None,
            tokens_per_s=round(sum(replica.tokens_per_s for replica in replicas), 1),
            imbalance=round(reading.status.imbalance, 3),
            uncovered_s=round(reading.status.uncovered_s, 1),
            shards=tuple(_shards(counted, seconds)),
            replicas=replicas,
            figures=self._figures.observe(reading.exposition, reading.at) if reading.exposition else None,
        )


def _new_tokens(last: Reading, reading: Reading) -> dict[int, Counts]:
    """By shard. A process that was not there before begins with its first counters."""
    counted: dict[int, Counts] = {}
    for source, counts in reading.counters.items():
        before = last.counters.get(source)
        if before is not None and before.shape == counts.shape:
            new = np.maximum(counts - before, 0)
            shard_id = source[0]
            counted[shard_id] = counted[shard_id] + new if shard_id in counted else new
    return counted


def _shards(counted: dict[int, Counts], seconds: float) -> list[ShardBeat]:
    sums = {shard_id: int(tokens.sum()) for shard_id, tokens in sorted(counted.items())}
    total = sum(sums.values())
    return [
        ShardBeat(id=shard_id, tokens_per_s=round(number / seconds, 1), share=round(number / total if total else 0, 4))
        for shard_id, number in sums.items()
    ]


def _replicas(last: Reading | None, reading: Reading) -> list[ReplicaBeat]:
    beats = []
    for name, stats in reading.stats.items():
        before = None if last is None else last.stats.get(name)
        beats.append(
            ReplicaBeat(
                name=name,
                running=stats.running,
                waiting=stats.waiting,
                held=stats.held,
                used=round(stats.used_blocks / max(1, stats.num_blocks), 4),
                cache_tokens=stats.num_blocks * stats.block_size,
                tokens_per_s=_rate(before, stats),
            )
        )
    return beats


def _rate(before: EngineStats | None, stats: EngineStats) -> float:
    if before is None or stats.at <= before.at:
        return 0.0
    return round(max(0, stats.generated_tokens - before.generated_tokens) / (stats.at - before.at), 1)
