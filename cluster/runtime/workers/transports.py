"""Carriers between processes. `RayTransport`: each batch is one Ray actor call. Streams are negotiated here.

Tensors travel as bytes: Ray keeps small ones inside the call and moves large ones through its object store, and
neither side pays for pickling tensors. T: rows, H: hidden size, K: experts a token.
"""

import time
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
import torch
from torch import Tensor

from cluster.config import ClusterConfig
from cluster.errors import ClusterError, ShardUnavailable
from cluster.experts.direct import LaneSource
from cluster.experts.pulse import Sign
from cluster.experts.transport import ExpertBatch, ExpertTransport
from cluster.metrics import DispatchMetrics
from cluster.runtime.process import process_info
from cluster.runtime.ray_private.core import actor_id
from cluster.stream.client import StreamTransport
from cluster.stream.frames import StreamOffer

WireBatch = tuple[float, int, int, str, int, bytes, bytes, bytes]
"""When it was sent (seconds of the wall clock), layer_id, epoch, dtype of the rows, T, rows [T, H], ids [T, K] int32,
weights [T, K] float32. To a shard that takes it, of a batch that is traced: the spans to which it belongs, packed."""
_WIRE_FIELDS = 8  # that every version knows

# numpy has no bfloat16: such rows travel as the integers of their bits.
_BITS = {"bfloat16": torch.int16, "float16": torch.float16, "float32": torch.float32}


def to_bytes(rows: Tensor) -> bytes:
    """The memory of a contiguous tensor of one of the served dtypes; CUDA tensors are copied to the host."""
    name = dtype_name(rows.dtype)
    return rows.contiguous().cpu().view(_BITS[name]).numpy().tobytes()


def from_bytes(data: bytes, dtype: str, num_rows: int, device: torch.device) -> Tensor:
    """[num_rows, …] of `dtype` on `device`; on the CPU a view of `data`, not to be written to."""
    rows = torch.frombuffer(data, dtype=getattr(torch, dtype)).view(num_rows, -1)
    return rows.to(device)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def encode(batch: ExpertBatch) -> WireBatch:
    rows = batch.hidden_states
    return (
        time.time(),
        batch.layer_id,
        batch.epoch,
        dtype_name(rows.dtype),
        rows.shape[0],
        to_bytes(rows),
        batch.topk_ids.to(torch.int32).cpu().numpy().tobytes(),
        batch.topk_weights.cpu().numpy().tobytes(),
    )


def trace_of(wire: tuple[Any, ...]) -> bytes:
    """The spans to which a `WireBatch` belongs, none where it is not traced."""
    return wire[_WIRE_FIELDS] if len(wire) > _WIRE_FIELDS else b""


def decode(wire: tuple[Any, ...], device: torch.device) -> ExpertBatch:
    """wire: a `WireBatch`."""
    _, layer_id, epoch, dtype, num_rows, rows, ids, weights = wire[:_WIRE_FIELDS]
    topk_ids = torch.from_numpy(np.frombuffer(ids, dtype=np.int32).astype(np.int64)).view(num_rows, -1)
    return ExpertBatch(
        layer_id=layer_id,
        epoch=epoch,
        hidden_states=from_bytes(rows, dtype, num_rows, device),
        topk_ids=topk_ids,  # stays on the CPU: the shard looks at it
        topk_weights=from_bytes(weights, "float32", num_rows, device),
    )


class ShardHandles(Protocol):
    """Where the actor of a shard is looked up."""

    def handle(self, shard_id: int) -> Any:
        """The shard's current actor. Raises ShardUnavailable while there is none."""

    def takes_traces(self, shard_id: int) -> bool:
        """Whether it is of a version that takes the spans of a batch with it."""


PROBE_S = 0.5  # between two questions how far a shard is


@dataclass(slots=True)
class RayFlight:
    """probe: a question how far the shard is, under way since probed_at."""

    shard_id: int
    actor: Any
    ref: Any
    like: Tensor
    probe: Any = None
    probed_at: float = 0.0
    progress: int | None = None

    def result(self, timeout_s: float) -> Tensor:
        try:
            data = ray.get(self.ref, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise TimeoutError from error
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ClusterError):
                raise error.cause from None
            raise ClusterError(f"shard {self.shard_id} failed: {error.cause!r}") from error
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            raise ShardUnavailable(f"shard {self.shard_id} died", self.shard_id) from error
        return from_bytes(data, dtype_name(self.like.dtype), self.like.shape[0], self.like.device)

    def works(self) -> bool:
        """By a call that a shard answers while it computes. One of an older version does not know it: silence."""
        now, grew = time.monotonic(), False
        if self.probe is not None and ray.wait([self.probe], timeout=0)[0]:
            try:
                sign: Sign = ray.get(self.probe)
            except ray.exceptions.RayError:
                return False  # `result` says what happened
            grew = sign.busy if self.progress is None else sign.progress != self.progress
            self.probe, self.progress = None, sign.progress
        if self.probe is None and now - self.probed_at >= PROBE_S and hasattr(self.actor, "sign"):
            self.probe, self.probed_at = self.actor.sign.remote(), now
        return grew

    def abandon(self) -> None:
        pass  # a cancelled call would hold up the later ones to this actor (Ray 2.60)


class RayTransport:
    """Works wherever Ray does. Used by one thread."""

    def __init__(self, shards: ShardHandles) -> None:
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # answers are only read
        self.shards = shards
        self._traces: Mapping[int, bytes] = {}

    def submit(self, shard_id: int, batch: ExpertBatch) -> RayFlight:
        actor = self.shards.handle(shard_id)
        wire: tuple[Any, ...] = encode(batch)
        if self._traces and shard_id in self._traces and self.shards.takes_traces(shard_id):
            wire = (*wire, self._traces[shard_id])
        return RayFlight(shard_id, actor, actor.forward.remote(*wire), batch.hidden_states)

    def trace(self, places: Mapping[int, bytes]) -> None:
        """As of `ExpertTransport`."""
        self._traces = places

    def close(self) -> None:
        pass


OFFER_TIMEOUT_S = 2.0  # a shard that does not even answer this is reached over Ray, which knows when it is dead


class RayOffers:
    """Streams are negotiated by Ray calls: only processes that may call the actor learn its address and secret."""

    def __init__(self, shards: ShardHandles) -> None:
        self.shards = shards

    def incarnation(self, shard_id: int) -> Hashable:
        return actor_id(self.shards.handle(shard_id))

    def offer(self, shard_id: int) -> StreamOffer:
        """Raises ShardUnavailable, OSError when there is no stream (yet)."""
        try:
            offer: StreamOffer | None = ray.get(
                self.shards.handle(shard_id).stream_offer.remote(), timeout=OFFER_TIMEOUT_S
            )
        except ray.exceptions.GetTimeoutError as error:
            raise OSError("it does not answer") from error
        except ray.exceptions.RayActorError as error:
            raise ShardUnavailable(f"shard {shard_id} died", shard_id) from error
        if offer is None:
            raise OSError("it is loading")
        return offer


def make_transport(config: ClusterConfig, shards: ShardHandles, metrics: DispatchMetrics) -> ExpertTransport:
    """The carrier that the configuration asks for."""
    by_ray = RayTransport(shards)
    if config.transport == "ray":
        return by_ray
    return StreamTransport(
        RayOffers(shards),
        node=process_info().node_id,
        fallback=by_ray if config.transport == "auto" else None,
        timeout_s=config.shard_timeout_s,
        on_fallback=metrics.fell_back,
    )


def lanes_of(transport: ExpertTransport) -> LaneSource | None:
    """The transport once more, if it has lanes."""
    return transport if isinstance(transport, StreamTransport) else None
