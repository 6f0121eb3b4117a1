"""Operators' requests to one node: work that a node has begun is known to that node only."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any, Final
from urllib.parse import urlencode

import click

from agentmem_client.aio import seed_urls
from agentmem_node.cli.exits import CommandFailed, Exit

_TIMEOUT_S: Final = 30.0
_EXITS: Final = {
    400: Exit.USAGE,
    401: Exit.NOT_ALLOWED,
    403: Exit.NOT_ALLOWED,
    404: Exit.NOT_FOUND,
    405: Exit.USAGE,
    409: Exit.CONFLICT,
    429: Exit.UNAVAILABLE,
    503: Exit.UNAVAILABLE,
    504: Exit.UNAVAILABLE,
}


class NodeUnreachable(CommandFailed):
    """Nobody answered: the request may be sent again."""


class OneNode:
    """The first node of `urls` that answers; every later request goes to the same."""

    def __init__(self, urls: str, api_key: str | None, timeout_s: float | None) -> None:
        try:
            self._urls = seed_urls(urls)
        except ValueError as error:
            raise click.UsageError(f"--url: {error}") from error
        self._api_key = api_key
        self._timeout_s = timeout_s or _TIMEOUT_S

    def ask(self, method: str, path: str, body: Any = None, **query: str | None) -> Any:
        """The JSON of an answer. Raises CommandFailed, NodeUnreachable."""
        given = {name: value for name, value in query.items() if value is not None}
        tail = f"/api/v1{path}" + (f"?{urlencode(given)}" if given else "")
        why = ""
        for url in list(self._urls):
            try:
                answer = self._ask(method, url + tail, body)
            except NodeUnreachable as error:
                why = error.message
                continue
            self._urls = [url]
            return answer
        raise NodeUnreachable(why, Exit.UNAVAILABLE)

    def _ask(self, method: str, url: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise NodeUnreachable(
                f"{url.partition('/api/')[0]} does not answer: {reason}. Is a node running? Name "
                "one with --url or AGENTMEM_URL.",
                Exit.UNAVAILABLE,
            ) from error


def _refusal(error: urllib.error.HTTPError) -> CommandFailed:
    try:
        detail = str(json.loads(error.read())["detail"])
    except (ValueError, KeyError, TypeError, OSError):
        detail = f"The node answered {error.code}."
    return CommandFailed(detail, _EXITS.get(error.code, Exit.FAILED))
