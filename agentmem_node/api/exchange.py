"""One request: what its headers say, as checked values."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from aiohttp.web_request import BaseRequest

from agentmem_cluster.errors import BadRequest, InvalidField
from agentmem_node.model.limits import Limits
from agentmem_node.service.contract import Caller

if TYPE_CHECKING:
    from agentmem_node.api.routes import Route

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_ETAG = re.compile(r'"([1-9][0-9]{0,17})"')
DEADLINE_HEADER = "X-AgentMem-Deadline-Ms"
TOKEN_HEADER = "X-AgentMem-Token"


class Exchange:
    """A request on its way through: the route, who asks, the body and the parameters."""

    __slots__ = ("body", "caller", "memory_id", "query", "request", "route")

    def __init__(
        self, request: BaseRequest, route: Route, memory_id: str, caller: Caller, body: bytes
    ) -> None:
        self.request = request
        self.route = route
        self.memory_id = memory_id
        self.caller = caller
        self.body = body
        self.query: Any = None

    @property
    def token(self) -> str | None:
        """The consistency token of the header."""
        return self.request.headers.get(TOKEN_HEADER)


def deadline_s(request: BaseRequest, limits: Limits) -> float:
    """Seconds this request may take. Raises InvalidField."""
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return limits.deadline_ms_default / 1000
    if not (text.isascii() and text.isdigit()) or len(text) > 12 or int(text) < 1:
        raise InvalidField(
            f"The header {DEADLINE_HEADER} is {text[:40]!r}.",
            hint="Give a whole number of milliseconds, at least 1.",
            field=DEADLINE_HEADER,
        )
    return min(int(text), limits.deadline_ms_max) / 1000


def write_identity(request: BaseRequest, tenant: str, body: bytes) -> tuple[bytes | None, bytes]:
    """(request id, fingerprint) of a write: 16 bytes or None, and 8 bytes. Raises InvalidField.

    The same Idempotency-Key of the same tenant is the same write, on whichever node it
    arrives. The fingerprint lets the ledger refuse that key for another request.
    """
    headers = request.headers
    request_id = None
    key = headers.get("Idempotency-Key")
    if key is not None:
        if not _IDEMPOTENCY_KEY.fullmatch(key):
            raise InvalidField(
                "The header Idempotency-Key is not 1 to 255 visible ASCII characters.",
                hint="A UUID for each write is a good key.",
                field="Idempotency-Key",
            )
        request_id = hashlib.blake2b(f"{tenant}\0{key}".encode(), digest_size=16).digest()
    digest = hashlib.blake2b(body, digest_size=8)
    digest.update(
        f"\0{request.method} {request.rel_url.raw_path_qs}\0{headers.get('If-Match', '')}".encode()
    )
    return request_id, digest.digest()


def expected_version(request: BaseRequest, given: int | None) -> int | None:
    """The version a write insists on, from If-Match and/or the field `expected_version`.

    Raises BadRequest for an ETag that this API never made: to treat it as a lost race would
    send the client into a loop, to ignore it would overwrite.
    """
    text = request.headers.get("If-Match")
    if text is None or text.strip() == "*":
        return given
    match = _ETAG.fullmatch(text.strip())
    if match is None:
        raise BadRequest(
            f"The header If-Match is {text[:40]!r}.",
            hint='Send back the ETag of an answer unchanged, such as "3" with its quotes.',
            field="If-Match",
        )
    version = int(match[1])
    if given is not None and given != version:
        raise BadRequest(
            f"If-Match asks for version {version}, expected_version for {given}.",
            hint="Send one of them.",
            field="expected_version",
        )
    return version


def is_unchanged(request: BaseRequest, version: int) -> bool:
    """Whether If-None-Match names this version: the client has it already."""
    text = request.headers.get("If-None-Match")
    if text is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in text.split(",")]
    return "*" in tags or f'"{version}"' in tags


def request_id_of(request: BaseRequest) -> str | None:
    """The client's X-Request-Id, if it is fit to be echoed and logged."""
    text = request.headers.get("X-Request-Id")
    return text if text is not None and _REQUEST_ID.fullmatch(text) else None
