"""The error tree of AgentMem's servers. Every error that can reach a user is one of these.

    AgentMemError
    |-- BadRequest                  400  the request is wrong: says what, why and what to do
    |   |-- InvalidField            400  one field of a body or a parameter, named
    |   |-- InvalidFilter           400
    |   |-- InvalidCursor           400
    |   |-- MethodNotAllowed        405
    |   `-- TooLarge                413  over a configured limit, which it names
    |-- Unauthorized                401
    |-- Forbidden                   403
    |-- NotFound                    404
    |-- Conflict                    409  expected_version or If-Match lost the race
    |-- Overloaded                  429  a queue is full; retry after a moment
    |-- Unavailable                 503  this node cannot answer now; another, or later, may
    |   |-- NotLeader               503  carries the leader, when known
    |   |-- WrongShard              503  carries the shard map version to fetch
    |   |-- MapMoved                503  the request was begun on an older shard map: begin again
    |   |-- NoQuorum                503  a minority refuses rather than guess
    |   |-- DiskFull                503  writes refused, reads go on
    |   |-- StateDamaged            503  this replica is not what was written; others have it
    |   |-- ModelUnavailable        503  no embedding model; says how to get one
    |   `-- ShuttingDown            503
    |-- DeadlineExceeded            504  the outcome of a write is unknown: retry with the same id
    `-- InternalError               500  a bug; carries no detail to the user but its id

`code` is stable and machine-readable; the message is for people. Retrying is safe exactly
when `retryable` says so *and*, for writes, the same request id is sent again.
"""

from __future__ import annotations

from typing import Any, ClassVar


class AgentMemError(Exception):
    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        """`message` says what is wrong and why; `hint` says what to do next."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def as_dict(self) -> dict[str, Any]:
        """The JSON body. `detail` and `error` are the same text: Mem0's SDKs read either."""
        # Messages from the depths of Raft are no sentences: an advice must not run into them.
        ends = "" if not self.message or self.message.endswith((".", "!", "?", ":")) else "."
        text = f"{self.message}{ends} {self.hint}".strip()
        body: dict[str, Any] = {"detail": text, "error": text, "code": self.code}
        if self.details:
            body["details"] = self.details
        return body


class BadRequest(AgentMemError):
    code, status = "bad_request", 400


class InvalidField(BadRequest):
    code = "invalid_field"


class InvalidFilter(BadRequest):
    code = "invalid_filter"


class InvalidCursor(BadRequest):
    code = "invalid_cursor"


class MethodNotAllowed(BadRequest):
    code, status = "method_not_allowed", 405


class TooLarge(BadRequest):
    code, status = "too_large", 413


class Unauthorized(AgentMemError):
    code, status = "unauthorized", 401


class Forbidden(AgentMemError):
    code, status = "forbidden", 403


class NotFound(AgentMemError):
    code, status = "not_found", 404


class Conflict(AgentMemError):
    code, status = "conflict", 409


class Overloaded(AgentMemError):
    code, status, retryable = "overloaded", 429, True
    retry_after_s = 1.0


class Unavailable(AgentMemError):
    code, status, retryable = "unavailable", 503, True
    retry_after_s = 1.0


class NotLeader(Unavailable):
    code = "not_leader"
    retry_after_s = 0.1

    def __init__(self, message: str, *, leader: str | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint, leader=leader)
        self.leader = leader


class WrongShard(Unavailable):
    code = "wrong_shard"
    retry_after_s = 0.1


class MapMoved(Unavailable):
    code = "map_moved"
    retry_after_s = 0.1


class NoQuorum(Unavailable):
    code = "no_quorum"


class DiskFull(Unavailable):
    code = "disk_full"
    retry_after_s = 10.0


class StateDamaged(Unavailable):
    code = "state_damaged"


class ModelUnavailable(Unavailable):
    code = "model_unavailable"
    retry_after_s = 30.0


class ShuttingDown(Unavailable):
    code = "shutting_down"


class DeadlineExceeded(AgentMemError):
    code, status, retryable = "deadline_exceeded", 504, True


class InternalError(AgentMemError):
    pass
