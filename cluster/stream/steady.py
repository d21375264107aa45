"""The usual case of a shard's stream, in native code: one caller, whose requests have few rows in shared memory.

A request costs no line of Python then: behind 70 MB of weights nothing of an interpreter is in a cache. All that is
unusual comes back to the server's Python, which is the definition of what the loop does (`kernels/native/serve.cpp`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from cluster.experts.shard import ExpertShard, LayerSlice
from cluster.kernels.native import library
from cluster.kernels.native.serving import SERVED_DTYPES, ServedLayer, Serving, can_serve
from cluster.stream.peer import Peer
from cluster.stream.region import NUM_SLOTS
from cluster.tracing.products import OnTraced, Product

STEADY = 16  # requests of one caller, without another's between them, until the loop takes over
REST = 1000  # requests that Python answers after the loop came back from several at once
FRUITLESS = 8


class SteadyBackend(Protocol):
    def experts(self) -> ExpertShard | None:
        """The experts, if nothing but a product is to be done for a request now."""

    def computed(self, products: Sequence[Product], tokens: Tensor) -> None:
        """The loop has made these products.
        tokens: [layers, E] int64, the slots of each expert in them."""


class Steady:
    """Whether the loop may take a caller's requests, and what it has done. Only the thread with the server's turn calls
    it, but for `serve` and `stop`."""

    def __init__(
        self,
        backend: SteadyBackend | None,
        watch: Callable[[Callable[[], bool]], None],
        on_traced: OnTraced,
    ) -> None:
        """watch: as `Pulse.watch`; called by the thread that serves.  on_traced: as of `StreamServer`."""
        self._backend = backend if library.native() is not None and can_serve() else None
        self._watch, self._on_traced = watch, on_traced
        self._trace, self._traced_at = b"", 0  # of the caller that the loop serves, who changes it by no usual frame
        self._watched = False
        self._caller: Peer | None = None
        self._num_requests = 0
        self._fruitless = 0
        self._num_before = 0
        self._serving: Serving | None = None
        self._layers: dict[int, LayerSlice] = {}
        self._shard: ExpertShard | None = None

    @property
    def computes(self) -> bool:
        serving = self._serving  # another thread may ask
        return serving is not None and serving.computes

    def came(self, peer: Peer) -> None:
        """A request that Python answers."""
        if peer is not self._caller:
            self._caller, self._num_requests = peer, 0
        self._num_requests += 1

    def caller(self) -> Peer | None:
        """The caller whose next requests the loop can take. The loop is ready then: a `stop` from now on ends it."""
        peer = self._caller
        if self._backend is None or peer is None or self._num_requests < STEADY or not peer.is_idle:
            self._drop()  # it may be long until the next look
            return None
        if self._has_changed():
            self._renew()
        if self._serving is None:
            return None
        self._serving.start()
        return peer

    def serve(self, peer: Peer, wake: int, least_timeout_s: float) -> tuple[bytes, bytes]:
        """As `Serving.serve`."""
        assert self._serving is not None
        assert peer.region is not None
        if not self._watched:
            self._watched = True
            self._watch(lambda: self.computes)
        self._num_before = self._serving.num_served
        self._trace, self._traced_at = peer.trace, peer.traced_at
        return self._serving.serve(
            peer.sock.fileno(), wake, peer.region.memory, NUM_SLOTS, least_timeout_s=least_timeout_s
        )

    def stop(self) -> None:
        """The loop comes back after the request that it computes. Any thread may call it."""
        serving = self._serving
        if serving is not None:
            serving.stop()

    def account(self) -> None:
        """Reports what the loop has computed since."""
        if self._serving is None or self._backend is None:
            return
        products, tokens = self._serving.served()
        if products:
            self._backend.computed(products, tokens)
            if self._trace:
                self._on_traced(self._trace, self._traced_at, products)

    def came_back(self, unusual: bool) -> None:
        """unusual: the loop has met what it does not take."""
        assert self._serving is not None
        fruitless = unusual and self._serving.num_served == self._num_before
        self._fruitless = self._fruitless + 1 if fruitless else 0
        if self._fruitless == FRUITLESS:
            self._fruitless, self._num_requests = 0, STEADY - REST

    def let_go(self) -> None:
        """Of experts that have changed, or that are not to be used now. The loop must not run."""
        if self.is_outdated:
            self._renew()

    @property
    def is_outdated(self) -> bool:
        """Whether the loop has experts that it should let go of."""
        return self._serving is not None and self._has_changed()

    def _has_changed(self) -> bool:
        shard = self._backend.experts() if self._backend is not None else None
        if shard is None or shard is not self._shard:
            return True
        return len(shard.layers) != len(self._layers) or any(
            shard.layers.get(layer_id) is not layer for layer_id, layer in self._layers.items()
        )

    def _renew(self) -> None:
        self._drop()
        native = library.native()
        self._shard = self._backend.experts() if self._backend is not None else None
        if self._shard is None or native is None:
            return
        self._layers = dict(self._shard.layers)
        layers = {
            layer_id: ServedLayer(layer.places, step, layer.weights)
            for layer_id, layer in self._layers.items()
            if (step := layer.weights.native_step) is not None
        }
        if layers and self._shard.dtype in SERVED_DTYPES:
            self._serving = Serving(native, layers, self._shard.dtype, self._shard.expert_tokens.shape)

    def _drop(self) -> None:
        self.account()
        self._serving, self._layers, self._shard = None, {}, None
