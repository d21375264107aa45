"""An engine's end of one stream: sends rows as frames, reads answers and tells them apart. Knows no other shard."""

import logging
import secrets
import select
import socket
import time
from collections.abc import Callable
from functools import partial
from hmac import compare_digest

import torch
from torch import Tensor

from cluster.errors import ClusterError, ProtocolError, ShardUnavailable
from cluster.experts.transport import ExpertBatch
from cluster.stream import frames
from cluster.stream.buffers import ReceiveBuffers, Staging, memory
from cluster.stream.frames import HEADER, NO_TIMEOUT, Header, Kind, StreamOffer
from cluster.stream.region import Region, make_region
from cluster.stream.sockets import has_room, prepare_socket, remaining
from cluster.stream.span_news import SpanNews

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0


class StreamBroken(Exception):
    """The connection is of no further use. Stays within this package."""


class StreamConnection:
    """One connection to one shard. Used by one thread."""

    def __init__(self, offer: StreamOffer, shard_id: int, node: str, device: torch.device) -> None:
        """Connects and proves that it knows the secret. To a shard on this host (node) it goes over the Unix socket and
        shares memory of `device` for the rows. Raises OSError, ProtocolError.
        """
        self.shard_id = shard_id
        if offer.unix_name and offer.node == node:
            self._sock = socket.socket(socket.AF_UNIX)
            address: str | tuple[str, int] = f"\0{offer.unix_name}"
        else:
            self._sock = socket.socket(socket.AF_INET6 if ":" in offer.host else socket.AF_INET)
            address = (offer.host, offer.port)
        self.num_heard = 0  # frames that came: each is a sign of life
        self._next_id = 1
        self._abandoned: set[int] = set()
        self._early: dict[int, Tensor | ClusterError] = {}
        self._head = memoryview(bytearray(HEADER.size))
        self._poll = select.poll()
        self._buffers = ReceiveBuffers(device.type == "cuda")
        self._staging = Staging()
        self._region: Region | None = None
        self._slots: dict[int, int] = {}
        self._release: Callable[[], None] | None = None
        self._ahead = b""  # read from the socket already
        self._features, self.span_news = 0, SpanNews()
        self.last_lane_id = 1 << 62  # of the requests that `lanes.py` sends; those of `send` are far below
        try:
            self._sock.settimeout(CONNECT_TIMEOUT_S)
            prepare_socket(self._sock)
            self._sock.connect(address)
            self._shake_hands(offer.secret)
            if self._sock.family == socket.AF_UNIX:
                self._share_memory(device)
            self._sock.settimeout(None)
            self._poll.register(self._sock, select.POLLIN)
        except BaseException:
            self._sock.close()
            raise

    def send(self, batch: ExpertBatch, timeout_s: float | None = None) -> int:
        """Blocks until the kernel has all bytes; returns the request's id. Raises StreamBroken."""
        rows = batch.hidden_states
        slot = self._region.take(rows.nbytes) if self._region is not None else 0
        staged: tuple[Tensor, Tensor | None] | None = None
        if slot:
            assert self._region is not None
            self._region.rows(slot, rows.shape[0], rows.shape[1], rows.dtype).copy_(rows)
        else:
            staged = self._staging.copy(rows)
        if rows.is_cuda:  # the rows' copy above: ids and weights that are on the host already wait for nothing
            torch.cuda.current_stream(rows.device).synchronize()
        ids, weights = batch.topk_ids.to(torch.int32), batch.topk_weights
        parts = [memory(ids.contiguous().cpu()), memory(weights.contiguous().cpu())]
        if staged is not None:
            parts.append(memory(staged[0]))
        request_id, self._next_id = self._next_id, self._next_id + 1
        head = Header(
            kind=Kind.REQUEST,
            request_id=request_id,
            payload_bytes=sum(map(len, parts)),
            dtype=rows.dtype,
            layer_id=batch.layer_id,
            rows=rows.shape[0],
            hidden_size=rows.shape[1],
            topk=batch.topk_ids.shape[1],
            epoch=batch.epoch,
            timeout_ms=NO_TIMEOUT if timeout_s is None else min(int(timeout_s * 1000), NO_TIMEOUT - 1),
            slot=slot,
            sent_at=time.time(),
        )
        if slot:
            self._slots[request_id] = slot
        self._send_all([*self.span_news.frames(), memoryview(head.pack(*parts)), *parts])
        if staged is not None:
            self._staging.give_back(staged[1])
        return request_id

    def trace(self, places: bytes) -> None:
        """The requests from now on belong to these packed spans. An older shard is not told; one that does not read now
        hears of it in front of the next request. Raises StreamBroken."""
        if self._features & frames.TRACES:
            self.span_news.follow(places)
            if has_room(self._sock):
                self._send_all(self.span_news.frames())

    def receive(self, request_id: int, like: Tensor, timeout_s: float) -> Tensor:
        """Blocks for one request's rows, with the width and dtype of `like`. They are valid until the next call, which
        may use the same memory.

        Raises StreamBroken; the shard's ClusterError; TimeoutError, after which the rows may be asked for again.
        """
        deadline = time.monotonic() + timeout_s
        self._free_last()
        while request_id not in self._early:
            head = self._read_head(deadline)
            if head.kind is Kind.ALIVE:
                continue
            answer = self._read_answer(head, like, deadline)
            if head.request_id == request_id and isinstance(answer, Tensor):
                return answer
            if head.request_id in self._abandoned:
                self._abandoned.discard(head.request_id)
            else:
                self._early[head.request_id] = answer.clone() if isinstance(answer, Tensor) else answer
            self._free_last()
        early = self._early.pop(request_id)
        if isinstance(early, ClusterError):
            raise early
        return early

    def _send_all(self, rest: list[memoryview]) -> None:
        """Raises StreamBroken."""
        try:
            while rest:
                rest = remaining(rest, self._sock.sendmsg(rest))
        except OSError as error:
            raise StreamBroken(str(error)) from error

    def abandon(self, request_id: int) -> None:
        """Nobody will ask for this answer: it is dropped when it comes."""
        if self._early.pop(request_id, None) is None:
            self._abandoned.add(request_id)

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def can_lend(self) -> bool:
        """Whether it has a slot for a lane, which tells no news of spans, and no answer is under way."""
        under_way = self._early or self._abandoned or self._slots
        return self._region is not None and self._region.has_free and not under_way and self.span_news.is_told

    def borrow_slot(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> tuple[int, Tensor]:
        """A slot of the shared memory, and the rows there; `return_slot` or `adopt` ends it."""
        assert self._region is not None
        slot = self._region.take(num_rows * hidden_size * dtype.itemsize)
        return slot, self._region.rows(slot, num_rows, hidden_size, dtype)

    def return_slot(self, slot: int) -> None:
        assert self._region is not None
        self._region.give(slot)

    def adopt(self, request_id: int, slot: int, ahead: bytes) -> None:
        """A request that was sent elsewhere in a borrowed slot: from now on `receive` finds its answer, which begins
        with the bytes `ahead`."""
        self._slots[request_id] = slot
        self._ahead += ahead

    def _free_last(self) -> None:
        """Frees the memory of the answer that was read last, for the next one."""
        if self._release is not None:
            self._release()
            self._release = None

    def close(self) -> None:
        self._sock.close()

    def _shake_hands(self, secret: bytes) -> None:
        magic, version, self._features, nonce = frames.GREETING.unpack(self._exactly(frames.GREETING.size))
        frames.check_version(magic, version)
        our_nonce = secrets.token_bytes(frames.NONCE_BYTES)
        proof = frames.mac(secret, b"client", nonce)
        self._sock.sendall(frames.HELLO.pack(frames.MAGIC, frames.VERSION, frames.FEATURES, our_nonce, proof))
        magic, version, proof = frames.WELCOME.unpack(self._exactly(frames.WELCOME.size))
        frames.check_version(magic, version)
        if not compare_digest(proof, frames.mac(secret, b"server", our_nonce)):
            raise ProtocolError(f"the process that answers at shard {self.shard_id}'s address does not know its secret")

    def _share_memory(self, device: torch.device) -> None:
        """Offers the shard memory for the rows. Without shared memory they go through the socket."""
        region = make_region(device)
        if region is None:
            return
        head = Header(kind=Kind.SHARE, payload_bytes=len(region.descriptor))
        socket.send_fds(self._sock, [head.pack(region.descriptor) + region.descriptor], region.fds)
        region.close_fds()
        answer = Header.unpack(self._exactly(HEADER.size))
        while answer.kind is Kind.ALIVE:
            answer = Header.unpack(self._exactly(HEADER.size))
        message = self._exactly(answer.payload_bytes).decode(errors="replace")
        if answer.kind is Kind.ANSWER:
            self._region = region
        else:
            log.warning("rows go to shard %d through a socket: %s", self.shard_id, message)

    def _exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            part = self._sock.recv(num_bytes - len(data))
            if not part:
                raise ConnectionResetError("closed during the handshake")
            data += part
        return data

    def _read_head(self, deadline: float) -> Header:
        if not self._ahead and not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        self._fill(self._head, deadline)
        try:
            head = Header.unpack(self._head)
        except ProtocolError as error:
            raise StreamBroken(str(error)) from error
        if head.kind in (Kind.REQUEST, Kind.SHARE):
            raise StreamBroken(f"the shard sent a frame of kind {head.kind.name}")
        if head.kind is Kind.ALIVE:
            _check(head, memoryview(b""))
        self.num_heard += 1
        return head

    def _read_answer(self, head: Header, like: Tensor, deadline: float) -> Tensor | ClusterError:
        slot = self._slots.pop(head.request_id, 0)
        if slot:
            assert self._region is not None
            self._release = partial(self._region.give, slot)
        if head.kind is not Kind.ANSWER:
            words = bytearray(head.payload_bytes)
            self._fill(memoryview(words), deadline)
            _check(head, memoryview(words))
            message = words.decode(errors="replace")
            if head.kind is Kind.REFUSED:
                raise StreamBroken(f"the shard refused a frame: {message}")
            if head.kind is Kind.UNAVAILABLE:
                return ShardUnavailable(message, self.shard_id)
            return ClusterError(f"shard {self.shard_id} failed: {message}")
        if (head.hidden_size, head.dtype) != (like.shape[1], like.dtype):
            raise StreamBroken("the shard answered with rows of another shape or dtype")
        if head.slot != slot:
            raise StreamBroken("the shard answered in another slot")
        if slot:
            assert self._region is not None
            _check(head, memoryview(b""))
            return self._region.rows(slot, head.rows, head.hidden_size, head.dtype)
        buffer = self._buffers.take(head.payload_bytes)
        self._release = partial(self._buffers.give, buffer)
        payload = memory(buffer)[: head.payload_bytes]
        self._fill(payload, deadline)
        _check(head, payload)
        return buffer[: head.payload_bytes].view(head.dtype).view(head.rows, -1).to(like.device)

    def _fill(self, target: memoryview, deadline: float) -> None:
        """Fills the target with a part of a frame that has begun to come. Raises StreamBroken, also for a shard that
        stops in the middle."""
        if self._ahead:
            count = min(len(target), len(self._ahead))
            target[:count], self._ahead = self._ahead[:count], self._ahead[count:]
            target = target[count:]
        while target:
            try:
                count = self._sock.recv_into(target, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise StreamBroken("the shard stopped in the middle of an answer") from None
                continue
            except OSError as error:
                raise StreamBroken(str(error)) from error
            if not count:
                raise StreamBroken("the shard closed it")
            target = target[count:]


def _check(head: Header, payload: memoryview) -> None:
    """Raises StreamBroken for a damaged frame."""
    try:
        head.check(payload)
    except ProtocolError as error:
        raise StreamBroken(str(error)) from error
