"""What the HTTP layer asks of a node; `agentmem_node.service.node.Node` provides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentmem_cluster.errors import AgentMemError
from agentmem_node.model import backups as bk
from agentmem_node.model import operations as ops
from agentmem_node.model import requests as rq
from agentmem_node.model.limits import Limits
from agentmem_node.model.search import Consistency, SearchAnswer
from agentmem_node.security.keys import KeyOwner
from agentmem_node.service.join_messages import (
    JoinAnswer,
    JoinRequest,
    JoinTokenKept,
    JoinTokenMade,
    JoinTokenRequest,
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, and until when. Made by the authentication layer, one a request."""

    tenant: str
    key_id: str
    deadline: float  # on the node's monotonic clock
    request_id: bytes | None = None  # 16 bytes, from Idempotency-Key; None: one is drawn
    fingerprint: bytes = b""  # 8 bytes of the body: the same key with another body is refused
    hops: int = 0  # 1 when another node forwarded it: never forwarded twice


class BackupService(Protocol):
    """Backups, for those who may administer the cluster."""

    async def create(self, caller: Caller, request: bk.CreateBackup) -> bk.BackupWork: ...

    async def restore(self, caller: Caller, request: bk.RestoreBackup) -> bk.BackupWork: ...

    async def list(self, caller: Caller, url: str | None) -> bk.BackupList: ...

    async def get(self, caller: Caller, work_id: str) -> bk.BackupWork: ...


class NodeService(Protocol):
    """Every method raises errors of `agentmem_cluster.errors` only."""

    node_id: str
    limits: Limits

    @property
    def backups(self) -> BackupService: ...

    async def add(
        self, caller: Caller, items: Sequence[rq.AddRequest | AgentMemError]
    ) -> rq.AddAnswer:
        """Per-item results for bad items when there are several; a single bad item raises."""
        ...

    async def get(
        self, caller: Caller, memory_id: str, consistency: Consistency, token: str | None
    ) -> rq.MemoryAnswer: ...

    async def update(
        self, caller: Caller, memory_id: str, change: rq.UpdateRequest
    ) -> rq.MemoryAnswer: ...

    async def delete(
        self, caller: Caller, memory_id: str, expected_version: int | None
    ) -> rq.DeleteAnswer: ...

    async def delete_many(self, caller: Caller, ids: list[str]) -> rq.DeleteAnswer: ...

    async def list(self, caller: Caller, query: rq.ListQuery) -> rq.ListAnswer: ...

    async def history(self, caller: Caller, memory_id: str) -> rq.HistoryAnswer: ...

    async def search(self, caller: Caller, request: rq.SearchRequest) -> SearchAnswer: ...

    def encode_cursor(self, request: rq.SearchRequest, answer: SearchAnswer) -> str | None: ...

    async def make_join_token(self, caller: Caller, wish: JoinTokenRequest) -> JoinTokenMade:
        """A token with which other nodes may join. Raises Conflict on a node that runs alone."""
        ...

    async def join_tokens(self, caller: Caller) -> Sequence[JoinTokenKept]:
        """Those of the last day."""
        ...

    async def revoke_join_token(self, caller: Caller, token_id: str) -> JoinTokenKept:
        """Nobody joins with it any more. Raises NotFound."""
        ...

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """Let a node in, on the word of its token alone."""
        ...

    def cluster_view(self) -> dict[str, Any]:
        """GET /cluster: nodes, and shards with epoch, members, slots and leader."""
        ...

    async def plan(self, caller: Caller, wish: ops.OperationWish) -> ops.OperationPlan:
        """What would be done now; changes nothing. Raises NotFound for names that are none."""
        ...

    async def begin_operation(self, caller: Caller, wish: ops.OperationWish) -> ops.Operation:
        """Plan again, store it durably, begin. Once for each `caller.request_id` that is given."""
        ...

    async def operations(self, caller: Caller) -> Sequence[ops.Operation]:
        """Newest first, with their progress. Any node answers."""
        ...

    async def operation(self, caller: Caller, operation_id: str) -> ops.Operation:
        """Raises NotFound, and Unavailable while nobody can say that there is none."""
        ...

    async def control_operation(
        self, caller: Caller, operation_id: str, action: ops.Action
    ) -> ops.Operation:
        """Raises NotFound, or Conflict for one that has ended."""
        ...

    async def check_cluster(self, caller: Caller) -> Sequence[ops.Finding]:
        """One finding for each thing that must hold."""
        ...

    def owner_of_key(self, key_hash: bytes) -> KeyOwner | None:
        """Whose API key has this SHA-256, or None."""
        ...

    def keys_required(self) -> bool: ...

    def has_keys(self) -> bool:
        """Whether there is any API key: without one, anybody who may ask is an operator."""
        ...

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """(ready, reasons): every local group has a known leader and has caught up."""
        ...
