"""One line for each HTTP request, for people and for log collectors."""

from __future__ import annotations

import logging
from typing import Any, Protocol


class _Request(Protocol):
    @property
    def method(self) -> str: ...

    @property
    def rel_url(self) -> Any: ...

    @property
    def remote(self) -> str | None: ...


class _Principal(Protocol):
    @property
    def tenant(self) -> str: ...

    @property
    def key_id(self) -> str: ...


class AccessLog:
    """Writes to the logger `agentmem.access`. Paths only: parameters and bodies are people's."""

    def __init__(self) -> None:
        self._log = logging.getLogger("agentmem.access")

    def write(
        self,
        request: _Request,
        route: str,
        status: int,
        body_bytes: int,
        seconds: float,
        principal: _Principal,
        request_id: str,
    ) -> None:
        self._log.info(
            "%s %s %d",
            request.method,
            request.rel_url.raw_path[:500],
            status,
            extra={
                "fields": {
                    "method": request.method,
                    "route": route,
                    "status": status,
                    "ms": round(seconds * 1000, 3),
                    "bytes": body_bytes,
                    "tenant": principal.tenant,
                    "key": principal.key_id,
                    "remote": request.remote,
                    "request_id": request_id,
                }
            },
        )
