"""A shard's end of its streams: one thread that waits, reads what has arrived from all callers, computes, answers.

Requests of one layer that are here together become one product. The oldest waiting request's layer is next, so a
request waits at most for what arrived before it. The thread waits for nothing to make a group larger.

A second thread, the deputy, looks a few times a second. While the first one computes, it does the rest of the work
(callers connect, their requests are read), and tells the callers whose requests wait that the work goes on.
"""

import logging
import selectors
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cluster.errors import ClusterError, ShardUnavailable
from cluster.experts.pulse import Pulse
from cluster.experts.transport import ExpertBatch
from cluster.stream import frames
from cluster.stream.buffers import Staging, memory
from cluster.stream.callers import Callers
from cluster.stream.frames import Header, Kind, StreamOffer
from cluster.stream.groups import WaitingRequests, one_batch, staged_parts
from cluster.stream.peer import Peer, Request
from cluster.stream.steady import Steady, SteadyBackend
from cluster.tracing.products import OnTraced

log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT_S = 0.25  # between two looks of the deputy; a quarter of what callers wait for, where that is less
MIN_BEAT_S = 0.02


class StreamBackend(Protocol):
    """Computes the rows. Only the server's first thread calls `forward`."""

    device: torch.device

    def forward(self, batch: ExpertBatch, waited_s: float) -> Tensor:
        """[T, H] in the rows' dtype. waited_s: since the oldest of its rows was sent. Raises ClusterError."""


class StreamServer:
    """Listens on a Unix socket (Linux) and on TCP, from `start` to `close`. node: a name of this host.
    pulse: of the backend, where other threads compute with it too.  steady: the backend once more, for native code.
    on_traced: called by its threads, of requests that are traced."""

    def __init__(
        self,
        backend: StreamBackend,
        *,
        host: str,
        node: str,
        pulse: Pulse | None = None,
        steady: SteadyBackend | None = None,
        on_traced: OnTraced = lambda packed, began, products: None,
        max_group_rows: int = 8192,
        beat_s: float = BEAT_S,
    ) -> None:
        self._backend = backend
        self._pulse = pulse or Pulse()
        self._on_traced = on_traced
        self._steady = Steady(steady, self._pulse.watch, on_traced)
        self._on_cpu = backend.device.type == "cpu"
        self._beat_s = beat_s
        self._turn = threading.Lock()  # of the thread that uses the fields below; no thread has it during a product
        self._waiting = WaitingRequests(max_group_rows)
        self._callers = Callers(host, node, backend.device, self._waiting, on_request=self._take_in)
        self._staging = Staging()
        self._lent: Peer | None = None  # the caller whose requests the native loop answers
        self._closing = self._cut = self._damage = False
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._serve, "stream-server"), (self._stand_in, "stream-deputy"))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Blocks for the product under way; callers see their connection end. Safe to call again."""
        if self._closing:
            return
        self._closing = True
        self._closed.set()
        self.wake()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._callers.close()

    def cut(self) -> None:
        """Ends all connections, as a network may: to rehearse recovery."""
        self._cut = True
        self.wake()

    def damage(self) -> None:
        """Damages the next answer, as a network may: to rehearse recovery."""
        self._damage = True
        self.wake()

    def wake(self) -> None:
        """The first thread looks at what has changed."""
        self._steady.stop()
        self._callers.wake()

    @property
    def offer(self) -> StreamOffer:
        return self._callers.offer

    @property
    def num_connections(self) -> int:
        return len(self._callers.peers)

    def _serve(self) -> None:
        with self._turn:
            while not self._closing:
                if not (self._waiting or self._damage) and (peer := self._steady.caller()) is not None:
                    self._lend(peer)
                self._read_and_write(0.0 if self._waiting else None)
                if self._waiting:
                    self._compute(self._waiting.next_group())

    def _lend(self, peer: Peer) -> None:
        """The native loop answers this caller, until anything unusual happens; the deputy does all else meanwhile."""
        self._callers.lend(peer, True)
        self._lent = peer
        self._turn.release()
        ahead, unsent = b"", b""
        try:
            if not (self._closing or self._cut or self._damage):
                ahead, unsent = self._steady.serve(peer, self._callers.fileno(), 4 * self._beat_s)
        finally:
            self._turn.acquire()
            self._lent = None
            self._callers.lend(peer, False)
        self._steady.came_back(unusual=bool(ahead))
        self._steady.account()
        self._steady.let_go()
        peer.unread(ahead)
        if unsent:
            self._callers.send(peer, unsent)
        if peer in self._callers.peers:
            self._callers.attend_to(peer, selectors.EVENT_READ)

    def _stand_in(self) -> None:
        """The deputy's work."""
        progress = self._pulse.progress()
        while not self._closed.wait(self._beat_s):
            if not self._turn.acquire(timeout=self._beat_s):
                continue  # the first thread has the turn: it computes nothing
            try:
                if not self._closing:
                    self._read_and_write(0.0)
                    self._steady.account()
                    if self._lent and (self._waiting or self._steady.is_outdated):
                        self.wake()
                    before, progress = progress, self._pulse.progress()
                    if progress != before:
                        self._beat()
            finally:
                self._turn.release()

    def _beat(self) -> None:
        """Tells all callers whose requests wait that the work goes on, but for those who do not read their answers."""
        head, now = Header(kind=Kind.ALIVE).pack(), time.monotonic()
        for peer in [p for p in self._callers.peers if p.features & frames.SIGNS and self._waits(p) and not p.outgoing]:
            self._callers.send(peer, head)
            for request in self._waiting.of(peer):
                request.heard_at = now

    def _take_in(self, request: Request) -> None:
        self._beat_s = max(MIN_BEAT_S, min(self._beat_s, request.timeout_s / 4))
        self._steady.came(request.peer)

    def _read_and_write(self, timeout_s: float | None) -> None:
        self._callers.read_and_write(timeout_s)
        if self._cut:
            self._cut = False
            self._callers.drop_all()

    def _waits(self, peer: Peer) -> bool:
        return self._steady.computes if peer.lent else peer.waits

    def _compute(self, group: Sequence[Request]) -> None:
        now = time.monotonic()
        for request in [r for r in group if now - r.heard_at >= r.timeout_s]:
            self._answer(request, Kind.UNAVAILABLE, b"the caller's time was over before its rows' turn came")
        group = [r for r in group if now - r.heard_at < r.timeout_s]
        if not group:
            return
        waited_s = max(0.0, time.time() - min(r.head.sent_at for r in group))  # hosts' clocks may differ
        try:
            batch = one_batch(group, self._backend.device)
            out = self._work(lambda: self._backend.forward(batch, waited_s))
        except ShardUnavailable as error:
            self._fail(group, Kind.UNAVAILABLE, str(error))
        except Exception as error:
            if not isinstance(error, ClusterError):
                log.exception("layer %d failed", group[0].head.layer_id)
            self._fail(group, Kind.FAILED, f"{type(error).__name__}: {error}")
        else:
            for request in group:
                if request.trace:
                    self._note(request, waited_s, time.monotonic() - now)
            self._hand_back(group, out)

    def _note(self, request: Request, waited_s: float, computed_s: float) -> None:
        """A product was made for a request that is traced, with others or alone. computed_s: from its turn on."""
        began = time.time_ns() - int(computed_s * 1e9)
        self._on_traced(request.trace, began, [(request.head.rows, waited_s, computed_s)])

    def _work(self, work: Callable[[], T]) -> T:
        """Does what may take long; the deputy does everything else meanwhile."""
        self._turn.release()
        self._pulse.begin(on_cpu=self._on_cpu)
        try:
            return work()
        finally:
            self._pulse.end()
            self._turn.acquire()

    def _hand_back(self, group: Sequence[Request], out: Tensor) -> None:
        """Gives each caller his part of a product [T, H]."""
        staged = staged_parts(group, out, self._staging)
        if out.is_cuda:
            self._work(torch.cuda.current_stream(out.device).synchronize)  # a caller reads as soon as he has the frame
        for request, copy in zip(group, staged, strict=True):
            self._answer(request, Kind.ANSWER, memory(copy[0]) if copy else b"")
            if copy and not request.peer.outgoing:
                self._staging.give_back(copy[1])

    def _fail(self, group: Sequence[Request], kind: Kind, message: str) -> None:
        """One caller's wrong ids must not fail the others' rows: a group that fails is computed one by one."""
        if len(group) == 1:
            self._answer(group[0], kind, message.encode())
            return
        for request in group:
            self._compute([request])

    def _answer(self, request: Request, kind: Kind, payload: bytes | memoryview) -> None:
        peer, head = request.peer, request.head
        if not self._callers.give_back(request):
            return
        answer = Header(
            kind=kind, request_id=head.request_id, payload_bytes=len(payload), dtype=head.dtype, layer_id=head.layer_id,
            rows=head.rows, hidden_size=head.hidden_size, slot=head.slot if kind is Kind.ANSWER else 0,
        )  # fmt: skip
        packed = answer.pack(payload)
        if self._damage:
            self._damage = False
            packed = packed[:-1] + bytes([packed[-1] ^ 1])
        self._callers.send(peer, packed, payload)
