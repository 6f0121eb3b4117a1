"""What the core tells its driver to do, and how a driver tells it that an attempt failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from agentmem_client.errors import AgentMemError

T = TypeVar("T")


class Failure(Enum):
    """Why an attempt has no answer."""

    REFUSED = "refused"  # no connection: the request was certainly not sent
    BROKEN = "broken"  # the connection broke: a write may have happened
    TIMED_OUT = "timed out"  # no answer in time: a write may have happened


@dataclass(frozen=True, slots=True)
class Send:
    """Send this request beside those on the wire, and give it up after `timeout_s`.

    Then wait for the first of them to end, at most `patience_s`, and report what happened.
    """

    attempt: int
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    timeout_s: float
    patience_s: float


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait so long for the first of the requests on the wire, if any; then report `woke`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    value: T


@dataclass(frozen=True, slots=True)
class Fail:
    error: AgentMemError


Instruction = Send | Wait | Done[T] | Fail
