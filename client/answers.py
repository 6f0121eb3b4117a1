"""Reading what a server answered: its JSON, its errors, and whether asking again can help."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agentmem_client.errors import AgentMemError, ProtocolError, error_class

# The codes of agentmem_cluster.errors that name a passing state. A full disk or a missing model
# is not among them: it does not mend within a call, so the caller hears of it at once.
_RETRYABLE_CODES = frozenset(
    {
        "overloaded",
        "unavailable",
        "not_leader",
        "wrong_shard",
        "map_moved",
        "no_quorum",
        "state_damaged",
        "shutting_down",
        "deadline_exceeded",
    }
)
# Answers that come from something in front of a node, without a code of ours.
_RETRYABLE_STATUSES = frozenset({429, 502, 503, 504})
_RETRY_AFTER_S_MAX = 30.0


def parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises ProtocolError."""
    try:
        value = json.loads(body)
    except ValueError as wrong:
        raise ProtocolError("The answer is not JSON. Is the URL an AgentMem node's?") from wrong
    if not isinstance(value, dict):
        raise ProtocolError("The answer is not a JSON object. Is the URL an AgentMem node's?")
    return value


def parsed_or_none(body: bytes) -> dict[str, Any] | None:
    try:
        return parsed(body)
    except ProtocolError:
        return None


def error_of(status: int, answer: Mapping[str, Any] | None, url: str) -> AgentMemError:
    """The error that an answer stands for, by its `code`, else by its HTTP status."""
    code = answer.get("code") if answer else None
    text = (answer or {}).get("detail") or (answer or {}).get("error")
    details = (answer or {}).get("details")
    kind = error_class(str(code) if code else None, status)
    return kind(
        str(text) if text else f"{url} answered HTTP {status}. Is the URL an AgentMem node's?",
        status=status,
        details=details if isinstance(details, dict) else None,
    )


def is_retryable(code: str, status: int) -> bool:
    """Whether the same request may succeed later. A code that is not ours: by its HTTP status."""
    if code in _RETRYABLE_CODES:
        return True
    is_known = code != "" and error_class(code).code == code
    return not is_known and status in _RETRYABLE_STATUSES


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds; 0 when absent or a date. HTTP says whole seconds, our servers fractions too."""
    for name, value in headers.items():
        if name.lower() == "retry-after":
            try:
                return min(_RETRY_AFTER_S_MAX, max(0.0, float(value)))
            except ValueError:
                return 0.0
    return 0.0
