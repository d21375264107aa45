"""Every error that leaves this package, with the code that a client sees.

    ClusterError                     INTERNAL            500
    ├── SetupError                   INTERNAL            500   the command line ends with exit code 2
    │   └── CheckpointError                                    a model directory that cannot be served
    ├── Closed                       INTERNAL            500   a call of an `LLM` after its `close`
    ├── InvalidRequest               INVALID_ARGUMENT    400   carries the field's name
    │   ├── TooLarge                     INVALID_ARGUMENT    413
    │   ├── WrongMediaType               INVALID_ARGUMENT    415   HTTP only
    │   └── NotFound                     NOT_FOUND           404   what it names is not here
    ├── Unserved                     UNIMPLEMENTED       501   gRPC only: a call of a protocol that is not answered here
    ├── Unauthenticated              UNAUTHENTICATED     401   no API key, or an unknown one
    ├── Overloaded                   RESOURCE_EXHAUSTED  429
    ├── DeadlineExceeded             DEADLINE_EXCEEDED   504
    │   └── SlowRequest                  DEADLINE_EXCEEDED   408   its client has not sent it in time
    ├── Forbidden                    PERMISSION_DENIED   403   the caller may not use this address
    ├── PoisonedRequest              INTERNAL            500   it ends the engines that compute it
    ├── ProtocolError                INTERNAL            500   a stream's other side does not speak its protocol
    ├── RequestFailed                INTERNAL            500   an exception at this request's rows: the others go on
    │   └── NonFiniteOutput                                    the model gave NaN or infinity for it
    ├── RequestCancelled             CANCELLED           499
    └── Unavailable                  UNAVAILABLE         503
        ├── BrokenStream                                       a client's connection ended before its answer
        ├── ReplicaUnavailable                                 an attention replica or its engine died
        │   └── ReplicaStopping                                it takes no more requests
        └── ShardUnavailable                                   carries the shard's id; callers send the rows again

A `public` error's message is written for clients and reaches them. The others may name paths and addresses: a
client gets their code and the request's id, the log gets the message.

Arguments go to `super().__init__` by position: exceptions travel between actors by pickle.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self


class ClusterError(Exception):
    """Base of all errors raised on purpose; `str(error)` is one line: what, where, what to do.

    outputs: the other prompts' answers, where `LLM.generate` raises it.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    public: ClassVar[bool] = False
    outputs: Sequence[Any] = ()

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class SetupError(ClusterError):
    """The configuration, the machine or the installation does not allow what was asked."""


class CheckpointError(SetupError):
    """A model directory is incomplete, damaged or of another architecture."""


class Closed(ClusterError):
    """A call of an object that is closed."""


class InvalidRequest(ClusterError):
    """A request that can never succeed. `field` is the name in the public API; the message has value and limit."""

    grpc_code = "INVALID_ARGUMENT"
    http_status = 400
    public = True

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message, field)
        self.field = field


class TooLarge(InvalidRequest):
    """A request with more bytes than the server reads."""

    http_status = 413


class WrongMediaType(InvalidRequest):
    """A body of a kind that the call does not take."""

    http_status = 415


class NotFound(InvalidRequest):
    """A request for something that is not here: a model, an answer."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class Unserved(ClusterError):
    """A call of a protocol that this server does not answer, whatever it asks."""

    grpc_code = "UNIMPLEMENTED"
    http_status = 501
    public = True


class Unauthenticated(ClusterError):
    """The server asks for an API key, and the caller has no known one."""

    grpc_code = "UNAUTHENTICATED"
    http_status = 401
    public = True


class Forbidden(ClusterError):
    """No caller of this kind may use this address."""

    grpc_code = "PERMISSION_DENIED"
    http_status = 403
    public = True


class PoisonedRequest(ClusterError):
    """A request that most likely ends the engines that compute it; sent again, it would end more."""

    public = True


class RequestFailed(ClusterError):
    """An exception that belongs to one request; it ends, and the engine and the other requests go on."""


class NonFiniteOutput(RequestFailed):
    """The model's numbers for a request are NaN or infinite: there is no next token."""

    public = True


class ProtocolError(ClusterError):
    """A stream delivered no frame of this version, or one of a stranger; the connection ends."""


class Overloaded(ClusterError):
    """A bounded queue is full; the same request may succeed later. retry_after_s: when to try again."""

    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429
    public = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    @classmethod
    def later(cls, reason: str, retry_after_s: float) -> Self:
        """Returns an error whose message ends with the time to try again."""
        return cls(f"{reason}: try again in {retry_after_s:.1f} s", retry_after_s)


class DeadlineExceeded(ClusterError):
    """The request's time budget ended before its answer did."""

    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504
    public = True


class SlowRequest(DeadlineExceeded):
    """A request of which not all came in time."""

    http_status = 408


class RequestCancelled(ClusterError):
    """The client went away or asked to stop."""

    grpc_code = "CANCELLED"
    http_status = 499
    public = True


class Unavailable(ClusterError):
    """A part that the request needs is not there now; the request may be sent again."""

    grpc_code = "UNAVAILABLE"
    http_status = 503
    public = True


class BrokenStream(Unavailable):
    """The connection of an answer under way has ended; another one may go on with it."""


class ReplicaUnavailable(Unavailable):
    """The attention replica of a request died, or the engine behind it.

    num_in_step: how many sequences the engine computed when it died, if the request's was one of them; 0 if it was not,
    None if nobody knows.
    """

    def __init__(self, message: str, num_in_step: int | None = None) -> None:
        super().__init__(message, num_in_step)
        self.num_in_step = num_in_step


class ReplicaStopping(ReplicaUnavailable):
    """The attention replica is about to end and has not begun the request: another one will take it."""


class ShardUnavailable(Unavailable):
    """An expert shard died, hung or refused a call. Calls are idempotent: the caller sends the rows again."""

    def __init__(self, message: str, shard_id: int = -1) -> None:
        super().__init__(message, shard_id)
        self.shard_id = shard_id
