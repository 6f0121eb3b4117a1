"""Every error this client raises, in one tree.

    AgentMemError
    |-- RequestRefused              the request must change before it can succeed (4xx)
    |   |-- BadRequest              400
    |   |   |-- InvalidField        400  one field, named
    |   |   |-- InvalidFilter       400
    |   |   |-- InvalidCursor       400
    |   |   `-- TooLarge            413  over a limit of the server, which the message names
    |   |-- Unauthorized            401  no API key, or one the cluster does not know
    |   |-- Forbidden               403
    |   |-- NotFound                404
    |   |-- MethodNotAllowed        405
    |   `-- Conflict                409  `expected_version` lost the race: read again, then retry
    |-- TemporarilyUnavailable      was retried until the deadline or the retry budget ended
    |   |-- Overloaded              429
    |   |-- Unavailable             503
    |   |   |-- NotLeader           503
    |   |   |-- WrongShard          503
    |   |   |-- MapMoved            503
    |   |   |-- NoQuorum            503
    |   |   |-- DiskFull            503
    |   |   |-- StateDamaged        503
    |   |   |-- ModelUnavailable    503
    |   |   `-- ShuttingDown        503
    |   |-- DeadlineExceeded        a write may have happened: send it again under the same key
    |   `-- ConnectionFailed        no node could be reached
    |-- ServerError                 500: a bug of the server
    |-- ProtocolError               an answer that is not AgentMem's
    `-- ClientClosed                the client was used after `close()`

The class is chosen by the answer's `code`, never by its text. A code this version does not
know falls back to the class of its HTTP status.
"""

from __future__ import annotations

from typing import Any, ClassVar


class AgentMemError(Exception):
    """What went wrong. `status` is 0 when no answer came.

    `outcome_unknown`: a write that may have happened; sent again under the same
    `idempotency_key` it takes effect once. `stored`: of an `add_many` that failed midway, what
    was stored before.
    """

    code: ClassVar[str] = "client_error"

    def __init__(
        self,
        message: str,
        *,
        status: int = 0,
        details: dict[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.details = details or {}
        self.idempotency_key = idempotency_key
        self.outcome_unknown = False
        self.stored: Any = None


class RequestRefused(AgentMemError):
    code = "refused"


class BadRequest(RequestRefused):
    code = "bad_request"


class InvalidField(BadRequest):
    code = "invalid_field"


class InvalidFilter(BadRequest):
    code = "invalid_filter"


class InvalidCursor(BadRequest):
    code = "invalid_cursor"


class TooLarge(BadRequest):
    code = "too_large"


class Unauthorized(RequestRefused):
    code = "unauthorized"


class Forbidden(RequestRefused):
    code = "forbidden"


class NotFound(RequestRefused):
    code = "not_found"


class MethodNotAllowed(RequestRefused):
    code = "method_not_allowed"


class Conflict(RequestRefused):
    code = "conflict"


class TemporarilyUnavailable(AgentMemError):
    code = "temporarily_unavailable"


class Overloaded(TemporarilyUnavailable):
    code = "overloaded"


class Unavailable(TemporarilyUnavailable):
    code = "unavailable"


class NotLeader(Unavailable):
    code = "not_leader"


class WrongShard(Unavailable):
    code = "wrong_shard"


class MapMoved(Unavailable):
    code = "map_moved"


class NoQuorum(Unavailable):
    code = "no_quorum"


class DiskFull(Unavailable):
    code = "disk_full"


class StateDamaged(Unavailable):
    code = "state_damaged"


class ModelUnavailable(Unavailable):
    code = "model_unavailable"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class DeadlineExceeded(TemporarilyUnavailable):
    code = "deadline_exceeded"


class ConnectionFailed(TemporarilyUnavailable):
    code = "connection_failed"


class ServerError(AgentMemError):
    code = "internal"


class ProtocolError(AgentMemError):
    code = "protocol"


class ClientClosed(AgentMemError):
    code = "closed"


def _tree(root: type[AgentMemError]) -> list[type[AgentMemError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


_BY_CODE: dict[str, type[AgentMemError]] = {kind.code: kind for kind in _tree(AgentMemError)}

_BY_STATUS: dict[int, type[AgentMemError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    413: TooLarge,
    429: Overloaded,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}


def error_class(code: str | None, status: int = 0) -> type[AgentMemError]:
    """The class for a server's `code`, or, when it is unknown, for the HTTP `status`."""
    if code is not None and code in _BY_CODE:
        return _BY_CODE[code]
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    if 400 <= status < 500:
        return BadRequest
    if status >= 500:
        return ServerError
    return ProtocolError
