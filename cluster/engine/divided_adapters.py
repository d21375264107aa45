"""The LoRA adapters of a model that is divided among ranks: each reads its part of every adapter. Knows no step.

Rank 0 has the list (`Adapters`). Beside the steps it tells the others what to load, each time with a number of its own,
by which a step then names the adapter. Each answers once it has its part, or why not. A part is let go once no sequence
at rank 0 has the adapter any more.
"""

import json
import logging
from collections import deque
from dataclasses import asdict
from itertools import count
from threading import Thread
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch

from cluster.config.lora import AdapterSource
from cluster.engine.adapters import LoadAdapter
from cluster.engine.words import Words, as_numbers, as_text
from cluster.errors import CheckpointError, Unavailable
from cluster.model.adapters import Adapter, StepAdapters, step_adapters

log = logging.getLogger(__name__)

NOBODY = -1  # the number of rows of the base


class ToldAdapters:
    """Rank 0's side. One thread may load while another one calls the rest."""

    def __init__(self, words: Words) -> None:
        self._words = words
        self._counting = count()
        self._numbers: WeakKeyDictionary[Adapter, int] = WeakKeyDictionary()
        self._gone: deque[int] = deque()

    def at_all_ranks(self, load: LoadAdapter) -> LoadAdapter:
        """load: rank 0's own part. The result raises Unavailable, too; a load that fails leaves nothing anywhere."""

        def load_all(source: AdapterSource) -> Adapter:
            adapter = load(source)
            self._tell(source, adapter)
            return adapter

        return load_all

    def take_gone(self) -> list[int]:
        """The numbers of those that nobody has any more, each once."""
        return [self._gone.popleft() for _ in range(len(self._gone))]

    def packed(self, adapters: StepAdapters | None) -> np.ndarray:
        """[2, B] int64: the number of each sequence's adapter, and of its rows; B is 0 without any adapters."""
        owners = [] if adapters is None else adapters.owners
        numbers = [NOBODY if adapter is None else self._numbers[adapter] for adapter, _ in owners]
        return np.array([numbers, [num_rows for _, num_rows in owners]], dtype=np.int64)

    def close(self) -> None:
        self._words.tell(as_numbers(""))

    def _tell(self, source: AdapterSource, adapter: Adapter) -> None:
        """Waits until all have answered."""
        number = self._numbers[adapter] = next(self._counting)
        finalize(adapter, self._gone.append, number).atexit = False
        self._words.tell(as_numbers(json.dumps({"number": number, "source": asdict(source)})))
        failures = [f"rank {rank}: {failure}" for rank, failure in enumerate(self._words.answers(), 1) if failure]
        if failures:
            raise CheckpointError(failures[0])


class HeardAdapters:
    """The side of a rank from 1 on: loads in a thread of its own. All else is for the thread of the steps."""

    def __init__(self, words: Words, load: LoadAdapter) -> None:
        """load: this rank's part."""
        self._words, self._load = words, load
        self._loaded: dict[int, Adapter] = {}
        self._thread = Thread(target=self._run, name="adapters", daemon=True)
        self._thread.start()

    def of(self, packed: np.ndarray, device: torch.device) -> StepAdapters | None:
        """From what `ToldAdapters.packed` gave."""
        adapters = [None if number == NOBODY else self._loaded[number] for number in packed[0].tolist()]
        return step_adapters(adapters, packed[1].tolist(), device)

    def forget(self, numbers: list[int]) -> None:
        """Some of these may not have been loaded."""
        for number in numbers:
            self._loaded.pop(number, None)

    def close(self) -> None:
        """Waits for the thread's end, after rank 0's `close` or its end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while len(heard := self._words.hear()):
                order = json.loads(as_text(heard))
                self._words.answer(self._try(order["number"], AdapterSource(**order["source"])))
        except Unavailable as error:
            log.debug("no more adapters: %s", error)

    def _try(self, number: int, source: AdapterSource) -> str:
        """Why it is not loaded; empty if it is."""
        try:
            self._loaded[number] = self._load(source)
        except Exception as error:
            log.exception("the adapter %s is not loaded", source.name)
            return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        return ""
