"""Reads: one memory, its history, a page of a scope. (Searches: `service/search.py`.)

`linearizable` asks the group for an index that a quorum confirmed and waits until this replica
has applied it; `session` waits for the caller's token; `eventual` answers at once. All of them
can be served by any replica.
"""

from __future__ import annotations

import asyncio
import heapq
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import msgspec

from agentmem_cluster.errors import (
    AgentMemError,
    InvalidField,
    MapMoved,
    NotLeader,
    StateDamaged,
    Unavailable,
    WrongShard,
)
from agentmem_cluster.runtime import Clock
from agentmem_node.model import requests as rq
from agentmem_node.model.cursors import decode_list_cursor, encode_list_cursor
from agentmem_node.model.filter_tree import And, Compare, Filter, matches, scope_of
from agentmem_node.model.filters import parse_filter
from agentmem_node.model.ids import parse_id, slot_of_id
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import HistoryEntry, Memory, Scope
from agentmem_node.model.search import Consistency
from agentmem_node.service.contract import Caller
from agentmem_node.service.drafts import check_scope
from agentmem_node.service.fanout import FanOut, Gathered
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.tokens import decode_token, encode_token
from agentmem_node.service.write import not_found
from agentmem_node.storage.checkpoint import RecordDamaged

T = TypeVar("T")
# Memories that a filtered list looks at before it lets others run: about 10 ms.
_SCAN_MAX = 2_000
# A page of long memories ends early: an answer is held in memory whole.
_PAGE_BYTES_MAX = 4 << 20
# Rows that are read before their size is looked at.
_ROWS_AT_ONCE = 64

_history_decoder = msgspec.json.Decoder(HistoryEntry)
_history_encoder = msgspec.json.Encoder()


async def settle(
    local: LocalShard, consistency: Consistency, at_index: int, deadline: float
) -> None:
    """Return once this replica may answer a read of this consistency."""
    if consistency == "linearizable":
        await local.group.read_index(deadline=deadline)
    elif consistency == "session" and at_index > local.shard.applied_index:
        await local.group.wait_applied(at_index, deadline=deadline)


def session_tokens(consistency: Consistency, token: str | None) -> dict[str, int]:
    """The indexes to wait for. Raises InvalidField when `session` comes without its token."""
    if token is None:
        if consistency == "session":
            raise InvalidField(
                "`consistency: session` needs the `token` of an earlier answer.",
                hint="Send the token back, or ask for `linearizable` (the default).",
                field="token",
            )
        return {}
    return decode_token(token)


class Reads:
    def __init__(self, routing: Routing, fan_out: FanOut, *, clock: Clock, limits: Limits) -> None:
        self._routing = routing
        self._fan_out = fan_out
        self._clock = clock
        self._limits = limits

    # -- one memory -----------------------------------------------------------------------

    async def get(
        self, caller: Caller, memory_id: str, consistency: Consistency, token: str | None
    ) -> rq.MemoryAnswer:
        """Raises NotFound (expired memories included), NoQuorum, DeadlineExceeded."""
        key = parse_id(memory_id)
        shard_id = self._routing.shard_of_slot(slot_of_id(key))
        at = session_tokens(consistency, token).get(shard_id, 0)
        now_ms = self._clock.wall_ms()

        def read(local: LocalShard) -> list[Any]:
            return self._get_here(local, caller.tenant, key, now_ms)

        body = {"tenant": caller.tenant, "id": key, "now_ms": now_ms}
        found, version, index = await self._of_one(
            shard_id, "read.get", body, read, consistency, at, caller.deadline
        )
        if found is None:
            raise not_found(key)
        return rq.MemoryAnswer(
            memory=msgspec.Raw(found), version=version, token=encode_token({shard_id: index})
        )

    def _get_here(self, local: LocalShard, tenant: str, key: bytes, now_ms: int) -> list[Any]:
        stored = local.shard.get(tenant, key)
        index = local.shard.applied_index
        if stored is None or (stored.expires_ms is not None and stored.expires_ms <= now_ms):
            return [None, 0, index]
        return [stored.record, stored.version, index]

    async def on_get(self, _peer: str, body: dict[str, Any]) -> list[Any]:
        """`read.get`: a peer without a replica asks."""
        local = await self._settled_of(body)
        return self._get_here(local, body["tenant"], body["id"], body["now_ms"])

    # -- history --------------------------------------------------------------------------

    async def history(self, caller: Caller, memory_id: str) -> rq.HistoryAnswer:
        """The newest versions, oldest first, of a deleted memory too: up to a number, and to what
        one answer may weigh. Raises NotFound."""
        key = parse_id(memory_id)
        shard_id = self._routing.shard_of_slot(slot_of_id(key))

        def read(local: LocalShard) -> list[Any]:
            return self._history_here(local, caller.tenant, key)

        body = {"tenant": caller.tenant, "id": key}
        entries, index = await self._of_one(
            shard_id, "read.history", body, read, "linearizable", 0, caller.deadline
        )
        if not entries:
            raise not_found(key)
        return rq.HistoryAnswer(
            results=[_history_decoder.decode(entry) for entry in entries],
            token=encode_token({shard_id: index}),
        )

    def _history_here(self, local: LocalShard, tenant: str, key: bytes) -> list[Any]:
        entries = local.shard.history(tenant, key, self._limits.history_versions_max)
        encoded: list[bytes] = []
        size = 0
        for entry in reversed(entries):
            data = _history_encoder.encode(entry)
            size += len(data)
            if size > _PAGE_BYTES_MAX and encoded:
                break
            encoded.append(data)
        encoded.reverse()
        return [encoded, local.shard.applied_index]

    async def on_history(self, _peer: str, body: dict[str, Any]) -> list[Any]:
        """`read.history`."""
        local = await self._settled_of(body)
        return self._history_here(local, body["tenant"], body["id"])

    # -- a page of a scope ----------------------------------------------------------------

    async def list_page(self, caller: Caller, query: rq.ListQuery) -> rq.ListAnswer:
        """Memories of a scope, newest first; shards that did not answer stand in `partial`."""
        if query.limit > self._limits.page_items_max:
            raise InvalidField(
                f"`limit` is {query.limit}; the most is {self._limits.page_items_max} "
                "(limits.page_items_max).",
                hint="Page with `cursor`.",
                field="limit",
            )
        scope = Scope(
            user_id=query.user_id, agent_id=query.agent_id, app_id=query.app_id, run_id=query.run_id
        )
        check_scope(scope, self._limits)
        filter_ = None if query.filters is None else parse_filter(query.filters, self._limits)
        scope = promoted(scope, filter_)
        after = None if query.cursor is None else decode_list_cursor(query.cursor)
        tokens = session_tokens(query.consistency, query.token)
        shards = self.shards_of(caller.tenant, scope)
        body = {
            "tenant": caller.tenant,
            "scope": [scope.user_id, scope.agent_id, scope.app_id, scope.run_id],
            "filters": filters_to_wire(query.filters),
            "after": after,
            # One more than asked: whether there is a next page must be known, not guessed.
            "limit": query.limit + 1,
            "now_ms": self._clock.wall_ms(),
        }

        async def read(local: LocalShard) -> list[Any]:
            return await self._list_here(local, body, filter_)

        gathered: Gathered[list[Any]] = await self.ask_each(
            shards, "read.list", body, read, query.consistency, tokens, caller.deadline
        )
        missing = gathered.missing(shards)
        if len(missing) == len(shards):
            raise gathered.refusal()
        pages = [page for page, _ in gathered.answers.values()]
        rows = list(heapq.merge(*pages, key=lambda row: (-row[0], _inverted(row[1]))))
        shown = _page_rows(rows, query.limit)
        next_cursor = None
        if len(rows) > shown:
            del rows[shown:]
            next_cursor = encode_list_cursor((rows[-1][0], rows[-1][1]))
        return rq.ListAnswer(
            results=[msgspec.Raw(row[2]) for row in rows],
            next_cursor=next_cursor,
            partial=missing,
            token=encode_token({s: index for s, (_, index) in gathered.answers.items()}),
        )

    async def _list_here(
        self, local: LocalShard, body: dict[str, Any], filter_: Filter | None
    ) -> list[Any]:
        user_id, agent_id, app_id, run_id = body["scope"]
        scope = Scope(user_id=user_id, agent_id=agent_id, app_id=app_id, run_id=run_id)
        condition = _with_scope(scope, filter_)
        accept: Callable[[Memory], bool] | None = None
        if condition is not None:
            accept = partial(matches, condition)
        after: tuple[int, bytes] | None = None if body["after"] is None else tuple(body["after"])
        rows: list[list[Any]] = []
        size = 0
        while True:
            asked = min(body["limit"] - len(rows), _ROWS_AT_ONCE)
            page = local.shard.page(
                body["tenant"],
                scope.owner if scope.user_id is not None else None,
                accept=accept,
                after=after,
                limit=asked,
                now_ms=body["now_ms"],
                scan_max=_SCAN_MAX,
            )
            rows += [[stored.created_ms, stored.id, stored.record] for stored in page.items]
            size += sum(len(stored.record) for stored in page.items)
            after = page.after
            # Past that size no answer shows the last of these rows (`_page_rows`), so what lies
            # behind it belongs to a later page.
            is_long = size > _PAGE_BYTES_MAX and len(rows) > 1
            if after is None or is_long or len(rows) >= body["limit"]:
                return [rows, local.shard.applied_index]
            if len(page.items) < asked:
                # A filter that few memories pass looks at many: let others run in between.
                await asyncio.sleep(0)

    async def on_list(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`read.list`: shard -> its page, or its error."""
        filter_ = filter_from_wire(body["filters"], self._limits)
        return await self.answer_each(body, lambda local: self._list_here(local, body, filter_))

    async def settles_soon(
        self, local: LocalShard, consistency: Consistency, at_index: int, deadline: float
    ) -> bool:
        """Whether this replica may answer now. False: another one should be asked, because this
        one has no quorum, or does not catch up within the hedge delay."""
        try:
            if local.group.is_leader:
                await settle(local, consistency, at_index, deadline)
            else:
                async with asyncio.timeout(self._fan_out.hedge_s):
                    await settle(local, consistency, at_index, deadline)
            return True
        except (TimeoutError, Unavailable):
            self._fan_out.was_slow(local.info.id, self._routing.node_id)
            return False

    # -- asking replicas ------------------------------------------------------------------

    def shards_of(self, tenant: str, scope: Scope) -> list[str]:
        """One shard when the scope names the user, by whom memories are routed first; else all.

        A memory of an agent that has a user too lies on the user's shard, so an agent alone
        cannot say where to look.
        """
        shard_map = self._routing.current_map()
        if scope.user_id is not None:
            return [shard_map.shard_of(tenant, scope.owner).id]
        return list(shard_map.shards)

    async def ask_each(
        self,
        shards: Sequence[str],
        method: str,
        body: dict[str, Any],
        read: Callable[[LocalShard], T | Awaitable[T]],
        consistency: Consistency,
        tokens: dict[str, int],
        deadline: float,
        prepare: Callable[[LocalShard], Awaitable[None]] | None = None,
    ) -> Gathered[T]:
        """Ask one replica of each shard: by `read` on this node, by `method` on others.

        `prepare` is awaited before `read`, whose answer then holds for one moment of the shard.
        """
        epochs = {shard: info.epoch for shard, info in self._routing.current_map().shards.items()}

        async def ask(node: str, wanted: Sequence[str]) -> dict[str, T | AgentMemError]:
            self._check_unmoved(epochs, wanted)
            where = [(shard, epochs[shard], tokens.get(shard, 0)) for shard in wanted]
            if node == self._routing.node_id:
                return await self._read_here(where, read, consistency, deadline, prepare)
            asked = {**body, "shards": where, "consistency": consistency}
            wire: dict[str, Any] = await self._routing.call(node, method, asked, deadline)
            return {shard: answer for shard, answer in wire.items() if answer is not None}

        return await self._fan_out.gather(shards, ask, deadline)

    async def _read_here(
        self,
        where: Sequence[tuple[str, int, int]],
        read: Callable[[LocalShard], T | Awaitable[T]],
        consistency: Consistency,
        deadline: float,
        prepare: Callable[[LocalShard], Awaitable[None]] | None,
    ) -> dict[str, T | AgentMemError]:
        """Read several local shards; all of them are confirmed together, by one round a peer."""
        settled = await asyncio.gather(
            *(self._settled(*one, consistency, deadline) for one in where), return_exceptions=True
        )
        answers: dict[str, T | AgentMemError] = {}
        for (shard_id, _, _), local in zip(where, settled, strict=True):
            if isinstance(local, AgentMemError):
                answers[shard_id] = local
            elif isinstance(local, BaseException):
                raise local
            else:
                try:
                    if prepare is not None:
                        await prepare(local)
                    answer = read(local)
                    answers[shard_id] = await answer if inspect.isawaitable(answer) else answer
                except RecordDamaged as error:
                    answers[shard_id] = error  # another replica has it
        return answers

    async def answer_each(
        self,
        body: dict[str, Any],
        read: Callable[[LocalShard], Any],
        prepare: Callable[[LocalShard], Awaitable[None]] | None = None,
    ) -> dict[str, Any]:
        """The peer's side of `ask_each`: None for a shard that cannot be answered here now."""
        here = self._routing.local
        damaged = [s for s, *_ in body["shards"] if s in here and here[s].is_left_to_others]
        answers = await self._read_here(
            [one for one in body["shards"] if one[0] not in damaged],
            read,
            body["consistency"],
            self._deadline_of(body),
            prepare,
        )
        return dict.fromkeys(damaged) | {
            shard: None if isinstance(answer, AgentMemError) else answer
            for shard, answer in answers.items()
        }

    async def _settled(
        self, shard_id: str, epoch: int, at: int, consistency: Consistency, deadline: float
    ) -> LocalShard:
        local = self._routing.check_epoch(shard_id, epoch)
        await settle(local, consistency, at, deadline)
        return local

    def _deadline_of(self, body: dict[str, Any]) -> float:
        return self._clock.monotonic() + float(body["left_ms"]) / 1000

    async def _of_one(
        self,
        shard_id: str,
        method: str,
        body: dict[str, Any],
        read: Callable[[LocalShard], Any],
        consistency: Consistency,
        at: int,
        deadline: float,
    ) -> Any:
        """Ask one replica of one shard; its error is the caller's."""
        epochs = {shard_id: self._routing.current_map().shards[shard_id].epoch}
        local = self._routing.local.get(shard_id)
        if local is not None and local.group.is_leader and not local.is_damaged:
            # It has changed hands, or its replica has lost what is asked for: ask the others.
            with suppress(WrongShard, NotLeader, RecordDamaged):
                await settle(local, consistency, at, deadline)
                return read(local)  # the usual case: no task, no timer

        async def ask(node: str, _shards: Sequence[str]) -> dict[str, Any]:
            self._check_unmoved(epochs, (shard_id,))
            epoch = epochs[shard_id]
            if node == self._routing.node_id:
                here = await self._settled(shard_id, epoch, at, consistency, deadline)
                return {shard_id: read(here)}
            asked = {
                **body,
                "shard": shard_id,
                "epoch": epoch,
                "consistency": consistency,
                "at": at,
            }
            return {shard_id: await self._routing.call(node, method, asked, deadline)}

        gathered: Gathered[Any] = await self._fan_out.gather([shard_id], ask, deadline)
        if shard_id in gathered.answers:
            return gathered.answers[shard_id]
        raise gathered.refusal()

    def _check_unmoved(self, epochs: Mapping[str, int], shards: Sequence[str]) -> None:
        """Raises MapMoved when what was asked for may lie in other shards by now."""
        current = self._routing.current_map().shards
        for shard in shards:
            if current[shard].epoch != epochs[shard]:
                raise MapMoved(f"Shard {shard} has changed hands.", hint="Retry.")

    async def _settled_of(self, body: dict[str, Any]) -> LocalShard:
        local = await self._settled(
            body["shard"], body["epoch"], body["at"], body["consistency"], self._deadline_of(body)
        )
        if local.is_left_to_others:
            raise StateDamaged(f"The replica of {local.info.id} on this node is damaged.")
        return local


def filters_to_wire(filters: dict[str, Any] | None) -> bytes | None:
    """As JSON, like they came: msgpack ends at 64 bits, and a filter may name a larger number."""
    return None if filters is None else msgspec.json.encode(filters)


def filter_from_wire(filters: bytes | None, limits: Limits) -> Filter | None:
    return None if filters is None else parse_filter(msgspec.json.decode(filters), limits)


def promoted(scope: Scope, filter_: Filter | None) -> Scope:
    """`scope` with the ids that the filter demands of every match: they route and count as well.

    Where both name an id, the scope's stands: the filter says by itself what it excludes.
    """
    demanded = scope_of(filter_)
    return Scope(
        user_id=demanded.user_id if scope.user_id is None else scope.user_id,
        agent_id=demanded.agent_id if scope.agent_id is None else scope.agent_id,
        app_id=demanded.app_id if scope.app_id is None else scope.app_id,
        run_id=demanded.run_id if scope.run_id is None else scope.run_id,
    )


def _with_scope(scope: Scope, filter_: Filter | None) -> Filter | None:
    parts: list[Filter] = [
        Compare(field, "eq", value)
        for field, value in (
            ("user_id", scope.user_id),
            ("agent_id", scope.agent_id),
            ("app_id", scope.app_id),
            ("run_id", scope.run_id),
        )
        if value is not None
    ]
    if filter_ is not None:
        parts.append(filter_)
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else And(tuple(parts))


def _page_rows(rows: Sequence[list[Any]], limit: int) -> int:
    """How many rows a page shows: up to `limit`, up to a bound of bytes, and one at least."""
    size = 0
    for number, row in enumerate(rows[:limit]):
        size += len(row[2])
        if size > _PAGE_BYTES_MAX and number:
            return number
    return min(len(rows), limit)


def _inverted(key: bytes) -> bytes:
    """Sorts in the opposite order of `key`."""
    return bytes(255 - byte for byte in key)
