"""A batch over workers of Ray Data, each with a model, or with connections to a server, of its own.

The lines' places in the file travel, not the lines: each worker reads them there, so the file is at the same path on
every node. Faults, ids and answers are the driver's, as in `run`: a killed run goes on in the same way.
"""

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.batch.ledger import Ledger
from cluster.batch.lines import Line, parse
from cluster.batch.run import Answerer, Pace, patient
from cluster.runtime.start.ray_data import map_rows

BATCHES_AHEAD = 4  # a call of a worker has so many times its concurrency: each call ends with a few slow lines alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """cpus, gpus: of each.  ray_address: None starts a Ray of this machine."""

    num: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    ray_address: str | None = None


class Worker:
    """Answers lines in a process of Ray's. make: a context manager around an answerer."""

    def __init__(self, path: Path, pace: Pace, make: Callable[[], AbstractAsyncContextManager[Answerer]]) -> None:
        self._path, self._pace = path, pace
        self._loop = asyncio.new_event_loop()
        self._made = make()
        self._answerer = self._loop.run_until_complete(self._made.__aenter__())

    def __call__(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Takes id, offset and length of lines; returns id, custom_id and the answer's JSON."""
        with self._path.open("rb") as file:
            found = []
            for line_id, offset, length in zip(columns["id"], columns["offset"], columns["length"], strict=True):
                file.seek(int(offset))
                found.append(parse(file.read(int(length)).strip(), str(line_id)))
        replies = self._loop.run_until_complete(self._answers(found))
        return {"id": [line.id for line in found], "custom_id": [line.custom_id for line in found], "answer": replies}

    async def _answers(self, lines: Sequence[Line]) -> list[str]:
        places = asyncio.Semaphore(self._pace.concurrency)

        async def one(line: Line) -> str:
            async with places:
                return json.dumps((await patient(line, self._answerer, self._pace)).as_json())

        return list(await asyncio.gather(*map(one, lines)))


def run_spread(
    path: Path,
    lines: Iterable[Line],
    make: Callable[[], AbstractAsyncContextManager[Answerer]],
    ledger: Ledger,
    *,
    pace: Pace,
    workers: Workers,
    progress: Callable[[int], None],
) -> None:
    """As `run`. Raises ClusterError: the answers that came before are written."""
    pending, through = [], 0
    for line in lines:
        if line.id not in ledger.done and line.fault is None:
            pending.append({"id": line.id, "offset": line.offset, "length": line.length})
            continue
        if line.id not in ledger.done and line.fault is not None:
            ledger.write(line.id, line.custom_id, line.fault)
        through += 1
    progress(through)
    if not pending:
        return
    rows = map_rows(
        pending,
        Worker,
        (path.resolve(), pace, make),
        num_workers=workers.num,
        cpus=workers.cpus,
        gpus=workers.gpus,
        batch_size=BATCHES_AHEAD * pace.concurrency,
        address=workers.ray_address,
    )
    for row in rows:
        ledger.write(row["id"], row["custom_id"], json.loads(row["answer"]))
        through += 1
        progress(through)
