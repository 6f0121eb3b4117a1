"""The operators' calls of the API: plan, begin, look, stop, resume, check; join tokens."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

import agentmem_client as client
from agentmem_client.calls import API, Call, encode
from agentmem_node.cli.connect import open_client
from agentmem_node.cli.exits import CommandFailed, exit_of
from agentmem_node.model import operations as ops
from agentmem_node.service import join_messages as jm

T = TypeVar("T")

# Nodes hear of what was begun within a second, those that stand still for a moment later.
_HEARD_S_MAX = 10.0
_TOKENS = "join-tokens"


class _Listed(msgspec.Struct):
    operations: list[ops.Operation]


class _Checked(msgspec.Struct):
    findings: list[ops.Finding]


class _Tokens(msgspec.Struct):
    tokens: list[jm.JoinTokenKept]


class Admin:
    """What the commands ask. Every method raises the client's errors."""

    def __init__(self, connection: client.Client) -> None:
        self._connection = connection
        # What was begun here: id -> when (time.monotonic), and as what.
        self._begun: dict[str, tuple[float, ops.Operation]] = {}

    def plan(self, wish: ops.OperationWish) -> ops.OperationPlan:
        return self._ask("plan", "POST", "plan", ops.OperationPlan, wish)

    def begin(self, wish: ops.OperationWish) -> ops.Operation:
        """Begin it, once, however often the request has to be sent. Raises CommandFailed too."""
        try:
            begun = self._ask(
                "begin", "POST", "operations", ops.Operation, wish, key=secrets.token_hex(16)
            )
            self._begun[begun.id] = (time.monotonic(), begun)
            return begun
        except client.AgentMemError as error:
            if not error.outcome_unknown:
                raise
            raise CommandFailed(
                f"{error.message} It is not known whether the operation began: see `agentmem "
                "cluster operations`.",
                exit_of(error),
            ) from error

    def operations(self) -> list[ops.Operation]:
        """Newest first."""
        return self._ask("operations", "GET", "operations", _Listed).operations

    def operation(self, operation_id: str) -> ops.Operation:
        """As it is now. One that was just begun here is known, whichever node is asked."""
        try:
            return self._ask("operation", "GET", _path(operation_id), ops.Operation)
        except client.NotFound:
            at, begun = self._begun.get(operation_id, (-math.inf, None))
            if begun is None or time.monotonic() - at > _HEARD_S_MAX:
                raise
            return begun  # by a node that has not heard of it yet

    def stop(self, operation_id: str) -> ops.Operation:
        return self._ask("stop", "POST", _path(operation_id) + "/stop", ops.Operation)

    def resume(self, operation_id: str) -> ops.Operation:
        return self._ask("resume", "POST", _path(operation_id) + "/resume", ops.Operation)

    def join_token(
        self, *, node: str | None = None, ttl_s: int = 600, uses: int = 1
    ) -> jm.JoinTokenMade:
        """A token that lets so many nodes in. `node`: only that one."""
        wish = jm.JoinTokenRequest(ttl_s=ttl_s, uses=uses, node=node)
        return self._ask("join_token", "POST", _TOKENS, jm.JoinTokenMade, wish)

    def join_tokens(self) -> list[jm.JoinTokenKept]:
        """The one that ends last comes first."""
        return self._ask("join_tokens", "GET", _TOKENS, _Tokens).tokens

    def revoke_join_token(self, token_id: str) -> jm.JoinTokenKept:
        path = f"{_TOKENS}/{quote(token_id, safe='')}"
        return self._ask("revoke_join_token", "DELETE", path, jm.JoinTokenKept)

    def check(self) -> list[ops.Finding]:
        return self._ask("check", "GET", "check", _Checked).findings

    def _ask(
        self,
        name: str,
        method: str,
        path: str,
        answer: type[T],
        wish: msgspec.Struct | None = None,
        key: str | None = None,
    ) -> T:
        return self._connection.run(
            Call(
                name=name,
                method=method,
                path=f"{API}/cluster/{path}",
                read=_reader(answer),
                body=None if wish is None else encode(_given(wish)),
                idempotency_key=key,
            )
        )


@contextmanager
def open_admin(url: str, api_key: str | None, timeout_s: float | None = None) -> Iterator[Admin]:
    """For one command. Raises click.UsageError on a URL that is none."""
    with open_client(url, api_key, timeout_s) as connection:
        yield Admin(connection)


def _path(operation_id: str) -> str:
    return f"operations/{quote(operation_id, safe='')}"


def _given(wish: msgspec.Struct) -> dict[str, Any]:
    return {name: value for name, value in msgspec.to_builtins(wish).items() if value is not None}


def _reader(answer: type[T]) -> Callable[[Any], T]:
    def read(body: Any) -> T:
        try:
            return msgspec.convert(body, answer)
        except msgspec.ValidationError as wrong:
            raise client.ProtocolError(
                f"The node's answer cannot be read ({wrong}). Is it of another version?"
            ) from wrong

    return read
