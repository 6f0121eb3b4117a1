"""What travels on a link, and how an error crosses it.

    [HELLO, protocol, cluster id, node id, session, level]   first, both ways; none: level 1
    [RAFT, [frame, ...]]
    [CALL, id, method, body, timeout_ms]
    [REPLY, id, result] | [ERROR, id, {code, message, hint, details, retry_after_s}]
    [CANCEL, id]                                       the caller no longer waits
    [PING] | [PONG]

Each is one msgpack list behind four bytes of length (`agentmem_cluster.frames`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from agentmem_cluster.errors import AgentMemError, InternalError

PROTOCOL: Final = 1

HELLO: Final = 0
RAFT: Final = 1
CALL: Final = 2
REPLY: Final = 3
ERROR: Final = 4
CANCEL: Final = 5
PING: Final = 6
PONG: Final = 7

_DETAILS_MAX = 32
_TEXT_CHARS_MAX = 4_096


def error_to_wire(error: AgentMemError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "hint": error.hint,
        "details": _plain(error.details),
        "retry_after_s": error.retry_after_s,
    }


def error_from_wire(wire: Any) -> AgentMemError:
    """The error that the peer raised, of the same class; InternalError for what makes no sense."""
    if not isinstance(wire, dict):
        return InternalError("A peer answered with an error that cannot be read.")
    details = wire.get("details")
    details = _plain(details) if isinstance(details, dict) else {}
    kind = _classes().get(str(wire.get("code")), InternalError)
    message = str(wire.get("message"))[:_TEXT_CHARS_MAX]
    hint = str(wire.get("hint") or "")[:_TEXT_CHARS_MAX]
    try:
        error = kind(message, hint=hint, **details)
    except TypeError:  # a class with a constructor of its own
        error = kind.__new__(kind)
        AgentMemError.__init__(error, message, hint=hint, **details)
    retry_after_s = wire.get("retry_after_s")
    if isinstance(retry_after_s, int | float):
        error.retry_after_s = float(retry_after_s)
    return error


def _plain(details: dict[Any, Any]) -> dict[str, Any]:
    """What of an error's details may travel, and be passed on as keywords."""
    return {
        key: value
        for key, value in list(details.items())[:_DETAILS_MAX]
        if isinstance(key, str) and key not in ("self", "message", "hint") and _is_plain(value)
    }


def _is_plain(value: Any, depth: int = 4) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, dict):
        return depth > 0 and all(
            isinstance(key, str) and _is_plain(item, depth - 1) for key, item in value.items()
        )
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 64
    return value is None or isinstance(value, str | float | bytes)


def _classes() -> dict[str, type[AgentMemError]]:
    """The class of each code; the first to be defined, so that the tree's own come first."""
    return {kind.code: kind for kind in reversed(list(_below(AgentMemError)))}


def _below(kind: type[AgentMemError]) -> Iterator[type[AgentMemError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)
