"""The seam between the service and what runs its requests: replicas behind a balancer, or an engine of this process."""

from collections.abc import AsyncIterator, Awaitable
from typing import Protocol

from cluster.types import EngineRequest, SequenceUpdate


class UpdateStream(Protocol):
    """One sequence's updates; an async generator is one. `aclose` cancels the sequence if it still runs."""

    def __aiter__(self) -> AsyncIterator[SequenceUpdate]: ...

    def __anext__(self) -> Awaitable[SequenceUpdate]: ...

    def aclose(self) -> Awaitable[None]: ...


class GenerationBackend(Protocol):
    """Runs requests. The last update has a finish_reason; if that is "error", the update's `error` is set."""

    def generate(self, request: EngineRequest) -> UpdateStream: ...
