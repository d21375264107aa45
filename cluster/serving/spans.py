"""The seam between a front, the service and what traces their calls and requests. Loads no OpenTelemetry."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from cluster.types import EngineRequest


class RequestSpan(Protocol):
    """Of one request that is recorded."""

    @property
    def trace_id(self) -> str: ...

    @property
    def traceparent(self) -> str: ...

    def prepared(self, request: EngineRequest, *, chat: bool, stream: bool) -> None:
        """It is tokenized, and its parameters have their defaults."""

    def first_token(self, seconds: float) -> None:
        """seconds: since it began."""

    def end(self, outcome: str, num_generated_tokens: int, num_cached_tokens: int | None) -> None:
        """outcome: as `RequestMetrics.finished` gets it.  num_cached_tokens: None where it is not known."""


class CallSpan(Protocol):
    """Of one call."""

    def update_name(self, name: str, /) -> None: ...

    def set_attribute(self, key: str, value: Any, /) -> None: ...


class RequestSpans(Protocol):
    """For one event loop: each call is in a task of its own."""

    def call(
        self, name: str, headers: Mapping[str, str], *, chat: bool = False, **attributes: Any
    ) -> AbstractContextManager[CallSpan]:
        """A call while it is open, under the span that its `traceparent` names; its requests come under it.

        headers: by their names in lower case.  chat: a conversation was sent, even if a request has its token ids.
        attributes: of a convention, "__" for each "."."""

    def request(self, request_id: str) -> RequestSpan | None:
        """A request that begins; None for one that is not recorded."""
