"""Writes: decide before the log, obey after it.

Everything about a write is settled here, on the node that took the request or on the shard's
leader: ids, times, vectors, the version it read. The command that carries all of it is then
proposed; applying it is a pure function (`agentmem_node.engine.apply`).

A write that is sent again under the same request id takes effect once: the ledger in the shard
answers the first outcome. A request that spans shards derives one id for each part, so that a
retry repeats exactly the parts that are missing.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgspec

from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    Conflict,
    DeadlineExceeded,
    DiskFull,
    InternalError,
    MapMoved,
    NotFound,
)
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.ring import slot_of
from agentmem_cluster.runtime import Clock, Rng
from agentmem_cluster.shardmap import ShardInfo
from agentmem_node.engine.shard import Shard
from agentmem_node.model import requests as rq
from agentmem_node.model.commands import (
    Add,
    Delete,
    Mismatch,
    Outcome,
    Update,
    Write,
    WriteResult,
    encode_write,
)
from agentmem_node.model.ids import format_id, new_id, parse_id, slot_of_id
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import parse_time_ms
from agentmem_node.providers.base import EmbeddingProvider
from agentmem_node.service.contract import Caller
from agentmem_node.service.deadlines import within
from agentmem_node.service.drafts import Draft, changed, drafts_of, normalised
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.tokens import encode_token

# A batch is cut into commands of at most this much, so that no command holds up a group for long.
_COMMAND_ITEMS_MAX = 128
_COMMAND_BYTES_MAX = 1 << 20
# An update that lost a race to another is decided again on the new version, this often.
_UPDATE_ATTEMPTS_MAX = 3

_json = msgspec.json.Encoder()
T = TypeVar("T")
_memory_decoder = msgspec.json.Decoder(Memory)


@dataclass(slots=True)
class _Prepared:
    """One memory of an add, ready for a command."""

    position: int
    add: Add


@dataclass(slots=True)
class Written:
    """What a leader answers for one command."""

    shard: str
    index: int
    replayed: bool
    outcomes: list[Outcome]
    records: list[bytes | None]  # of replayed adds: the memories as they are now

    def to_wire(self) -> list[Any]:
        outcomes = [(o.status, o.id, o.version) for o in self.outcomes]
        return [self.shard, self.index, self.replayed, outcomes, self.records]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Written:
        shard, index, replayed, outcomes, records = wire
        return cls(shard, index, replayed, [Outcome(*o) for o in outcomes], records)


class Writes:
    def __init__(
        self,
        routing: Routing,
        *,
        clock: Clock,
        rng: Rng,
        limits: Limits,
        dim: int,
        embedder: EmbeddingProvider | None,
        is_disk_full: Callable[[], bool],
    ) -> None:
        self._routing = routing
        self._clock = clock
        self._rng = rng
        self._limits = limits
        self._dim = dim
        self._embedder = embedder
        self._is_disk_full = is_disk_full

    # -- add ----------------------------------------------------------------------------

    async def add(
        self, caller: Caller, items: Sequence[rq.AddRequest | AgentMemError]
    ) -> rq.AddAnswer:
        """Store the items; a bad one among several is answered in its place, the rest are stored.

        An error among the items is one that could not even be read as a request.

        Raises what a single item raises (InvalidField, TooLarge), and for all of them
        DiskFull, NoQuorum, Overloaded, ModelUnavailable, DeadlineExceeded (outcome unknown).
        """
        self._check_disk()
        results: list[rq.AddedItem | None] = []
        drafts: list[tuple[int, Draft]] = []
        for item in items:
            try:
                if isinstance(item, AgentMemError):
                    raise item
                found = drafts_of(item, self._limits, self._dim)
            except AgentMemError as error:
                if len(items) == 1:
                    raise
                results.append(_refused(error))
                continue
            for draft in found:
                drafts.append((len(results), draft))
                results.append(None)
        await self._embed([draft for _, draft in drafts], caller.deadline)
        request_id = caller.request_id or self._rng.token(16)
        tokens: dict[str, int] = {}
        commands = self._commands_of(caller, request_id, drafts)
        failures: list[AgentMemError] = []
        outcomes = await asyncio.gather(
            *(self._propose(shard, write, caller.deadline) for shard, write, _ in commands),
            return_exceptions=True,
        )
        for (shard, _, prepared), outcome in zip(commands, outcomes, strict=True):
            if isinstance(outcome, MapMoved):
                raise outcome
            if isinstance(outcome, AgentMemError):
                failures.append(outcome)
                for p in prepared:
                    results[p.position] = _refused(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                tokens[shard] = max(tokens.get(shard, 0), outcome.index)
                for p, result in zip(prepared, _added(prepared, outcome), strict=True):
                    results[p.position] = result
        if failures and len(failures) == len(commands):
            # Nothing at all was stored, or nobody knows: one error says so better than many.
            raise _least_certain(failures)
        return rq.AddAnswer(results=cast("list[rq.AddedItem]", results), token=encode_token(tokens))

    async def _embed(self, drafts: list[Draft], deadline: float) -> None:
        missing = [draft for draft in drafts if draft.vector is None]
        if not missing or self._embedder is None:
            return
        vectors = await within(
            self._embedder.embed_documents([draft.content for draft in missing]),
            self._routing.remaining(deadline),
        )
        for draft, vector in zip(missing, vectors, strict=True):
            draft.vector = vector.tobytes()

    def _commands_of(
        self, caller: Caller, request_id: bytes, drafts: list[tuple[int, Draft]]
    ) -> list[tuple[str, Write, list[_Prepared]]]:
        """Group, in order, and cut into commands. The cut depends on the request alone, not on
        shards that were split since: a retry after a split makes the same parts."""
        now_ms = self._clock.wall_ms()
        by_root: dict[str, list[_Prepared]] = {}
        for position, draft in drafts:
            slot = slot_of(caller.tenant, draft.scope.owner)
            memory_id = new_id(now_ms, slot, self._rng)
            memory = draft.to_memory(format_id(memory_id), now_ms)
            add = Add(
                id=memory_id,
                record=_json.encode(memory),
                vector=draft.vector,
                created_ms=now_ms if draft.created_ms is None else draft.created_ms,
                expires_ms=draft.expires_ms,
            )
            root = self._routing.root_of_slot(slot)
            by_root.setdefault(root, []).append(_Prepared(position, add))
        commands = []
        for root, prepared in by_root.items():
            for number, whole in enumerate(_parts(prepared)):
                for shard, part in self._by_shard(whole, lambda p: p.add.id):
                    write = Write(
                        request_id=derive_id(request_id, root, number),
                        fingerprint=caller.fingerprint,
                        tenant=caller.tenant,
                        at_ms=now_ms,
                        ops=tuple(p.add for p in part),
                    )
                    commands.append((shard, write, part))
        return commands

    def _by_shard(
        self, items: Sequence[T], id_of: Callable[[T], bytes]
    ) -> list[tuple[str, list[T]]]:
        """Items by the shard that each is in now, in order."""
        found: dict[str, list[T]] = {}
        for item in items:
            shard = self._routing.shard_of_slot(slot_of_id(id_of(item)))
            found.setdefault(shard, []).append(item)
        return list(found.items())

    # -- update -------------------------------------------------------------------------

    async def update(
        self, caller: Caller, memory_id: str, change: rq.UpdateRequest
    ) -> rq.MemoryAnswer:
        """Change one memory. Raises NotFound, Conflict (with the current version), InvalidField."""
        self._check_disk()
        key = parse_id(memory_id)
        shard_id = self._routing.shard_of_slot(slot_of_id(key))
        request_id = caller.request_id or self._rng.token(16)

        async def here(local: LocalShard) -> list[Any]:
            return await self._update_here(
                local, caller.tenant, key, change, request_id, caller.fingerprint, caller.deadline
            )

        async def there(leader: str, info: ShardInfo) -> list[Any]:
            body = {
                "shard": shard_id,
                "epoch": info.epoch,
                "tenant": caller.tenant,
                "id": key,
                "change": _json.encode(change),
                "request_id": request_id,
                "fingerprint": caller.fingerprint,
            }
            wire: list[Any] = await self._routing.call(
                leader, "write.update", body, caller.deadline
            )
            return wire

        record, version, index = await self._routing.at_leader(
            shard_id, caller.deadline, here, there
        )
        return rq.MemoryAnswer(
            memory=msgspec.Raw(record), version=version, token=encode_token({shard_id: index})
        )

    async def _update_here(
        self,
        local: LocalShard,
        tenant: str,
        key: bytes,
        change: rq.UpdateRequest,
        request_id: bytes,
        fingerprint: bytes,
        deadline: float,
    ) -> list[Any]:
        """Decide and propose on the leader: [record, version, index]."""
        local.check_slots(slot_of_id(key), slot_of_id(key))
        for _ in range(_UPDATE_ATTEMPTS_MAX):
            # A leader that was just elected may not have applied all that is committed; a decision
            # on that state could answer "not found" for an acknowledged memory.
            await local.group.read_index(deadline=deadline)
            stored = local.shard.get(tenant, key)
            now_ms = self._clock.wall_ms()
            if local.shard.ledger_lookup(tenant, request_id) is None:
                if stored is None or stored.is_expired(now_ms):
                    raise not_found(key)
                if change.expected_version not in (None, stored.version):
                    raise version_conflict(stored.version)
            if stored is None:
                raise not_found(key)  # changed once under this id, deleted since
            memory = _memory_decoder.decode(stored.record)
            after = changed(memory, change, now_ms, self._limits)
            vector: bytes | None = None
            if change.vector is not msgspec.UNSET:
                vector = normalised(change.vector, self._dim)
            elif after.content != memory.content and self._embedder is not None:
                rows = await within(
                    self._embedder.embed_documents([after.content]),
                    self._routing.remaining(deadline),
                )
                vector = rows[0].tobytes()
            record = _json.encode(after)
            write = Write(
                request_id=request_id,
                fingerprint=fingerprint,
                tenant=tenant,
                at_ms=now_ms,
                ops=(
                    Update(
                        id=key,
                        read_version=stored.version,
                        record=record,
                        vector=vector,
                        expires_ms=None
                        if after.expires_at is None
                        else parse_time_ms(after.expires_at, "expires_at"),
                    ),
                ),
            )
            written = await self._propose_here(local, write, deadline)
            outcome = written.outcomes[0]
            if outcome.status == "ok" and not written.replayed:
                # What this update made: by now the memory may be changed again, or deleted.
                return [record, outcome.version, written.index]
            if outcome.status == "ok":
                current = local.shard.get(tenant, key)
                if current is None:
                    raise not_found(key)
                return [current.record, current.version, written.index]
            if outcome.status == "not_found":
                raise not_found(key)
            if change.expected_version is not None:
                raise version_conflict(outcome.version)
            # The refusal is on record under this id; the next attempt is another command.
            request_id = derive_id(request_id, "again", 0)
        raise Conflict(
            f"The memory changed {_UPDATE_ATTEMPTS_MAX} times while this update was decided.",
            hint="Retry, or send `expected_version` to update only what you have read.",
        )

    # -- delete -------------------------------------------------------------------------

    async def delete(
        self, caller: Caller, memory_id: str, expected_version: int | None
    ) -> rq.DeleteAnswer:
        """Delete one memory. Raises NotFound, Conflict."""
        key = parse_id(memory_id)
        shard = self._routing.shard_of_slot(slot_of_id(key))
        request_id = caller.request_id or self._rng.token(16)
        write = self._delete_write(caller, request_id, [Delete(key, expected_version)])
        written = await self._propose(shard, write, caller.deadline)
        outcome = written.outcomes[0]
        if outcome.status == "not_found":
            raise not_found(key)
        if outcome.status == "conflict":
            raise version_conflict(outcome.version)
        return rq.DeleteAnswer(
            results=[rq.DeletedItem(id=format_id(key), event="DELETE")],
            token=encode_token({shard: written.index}),
        )

    async def delete_many(self, caller: Caller, ids: list[str]) -> rq.DeleteAnswer:
        """Delete several; one that is unknown or badly written is answered in its place."""
        results: list[rq.DeletedItem | None] = [None] * len(ids)
        by_root: dict[str, list[tuple[int, Delete]]] = {}
        for position, text in enumerate(ids):
            try:
                key = parse_id(text)
            except AgentMemError as error:
                results[position] = _not_deleted(text, error)
                continue
            root = self._routing.root_of_slot(slot_of_id(key))
            by_root.setdefault(root, []).append((position, Delete(key, None)))
        request_id = caller.request_id or self._rng.token(16)
        parts = []
        for root, deletes in by_root.items():
            for number, start in enumerate(range(0, len(deletes), _COMMAND_ITEMS_MAX)):
                whole = deletes[start : start + _COMMAND_ITEMS_MAX]
                part_id = derive_id(request_id, root, number)
                for shard, part in self._by_shard(whole, lambda item: item[1].id):
                    write = self._delete_write(caller, part_id, [op for _, op in part])
                    parts.append((shard, write, part))
        outcomes = await asyncio.gather(
            *(self._propose(shard, write, caller.deadline) for shard, write, _ in parts),
            return_exceptions=True,
        )
        tokens: dict[str, int] = {}
        failures: list[AgentMemError] = []
        for (shard, _, part), written in zip(parts, outcomes, strict=True):
            if isinstance(written, MapMoved):
                raise written
            if isinstance(written, AgentMemError):
                failures.append(written)
                for position, op in part:
                    results[position] = _not_deleted(format_id(op.id), written)
                continue
            if isinstance(written, BaseException):
                raise written
            tokens[shard] = max(tokens.get(shard, 0), written.index)
            for (position, op), outcome in zip(part, written.outcomes, strict=True):
                results[position] = (
                    rq.DeletedItem(id=format_id(op.id), event="DELETE")
                    if outcome.status == "ok"
                    else _not_deleted(format_id(op.id), not_found(op.id))
                )
        if failures and len(failures) == len(parts):
            raise _least_certain(failures)
        return rq.DeleteAnswer(
            results=cast("list[rq.DeletedItem]", results), token=encode_token(tokens)
        )

    def _delete_write(self, caller: Caller, request_id: bytes, ops: list[Delete]) -> Write:
        return Write(
            request_id=request_id,
            fingerprint=caller.fingerprint,
            tenant=caller.tenant,
            at_ms=self._clock.wall_ms(),
            ops=tuple(ops),
        )

    # -- proposing ----------------------------------------------------------------------

    def _check_disk(self) -> None:
        if self._is_disk_full():
            raise DiskFull(
                "This node's disk is almost full; it refuses writes so that reads can go on.",
                hint="Free some space (limits.disk_free_bytes_min); writes resume by themselves.",
            )

    async def propose(self, shard_id: str, write: Write, deadline: float) -> Written:
        """A write that was decided elsewhere: by a restore. Raises what `add` raises."""
        return await self._propose(shard_id, write, deadline)

    async def _propose(self, shard_id: str, write: Write, deadline: float) -> Written:
        command = encode_write(write)
        slots = _slots_of(write)

        async def here(local: LocalShard) -> Written:
            return await self._propose_here(local, write, deadline, command)

        async def there(leader: str, info: ShardInfo) -> Written:
            body = {
                "shard": shard_id,
                "epoch": info.epoch,
                "tenant": write.tenant,
                "command": command,
                "slots": slots,
            }
            return Written.from_wire(
                await self._routing.call(leader, "write.propose", body, deadline)
            )

        return await self._routing.at_leader(shard_id, deadline, here, there)

    async def _propose_here(
        self, local: LocalShard, write: Write, deadline: float, command: bytes | None = None
    ) -> Written:
        self._check_disk()
        local.check_slots(*_slots_of(write))
        return await self._replicate(
            local, write.tenant, encode_write(write) if command is None else command, deadline
        )

    async def _replicate(
        self, local: LocalShard, tenant: str, command: bytes, deadline: float
    ) -> Written:
        failpoint("write.before_propose")
        applied = await local.propose(command, deadline)
        failpoint("write.after_apply")
        result = applied.result
        if isinstance(result, Mismatch):
            raise Conflict(
                "This Idempotency-Key was used before with another body.",
                hint="Draw a new key for a new request; repeat the body to retry an old one.",
            )
        if not isinstance(result, WriteResult):
            raise InternalError(f"A command was refused by the state machine: {result!r}")
        records: list[bytes | None] = []
        if result.replayed:
            records = [_record(local.shard, tenant, o.id) for o in result.outcomes]
        return Written(
            local.info.id, applied.index, result.replayed, list(result.outcomes), records
        )

    # -- what peers ask -----------------------------------------------------------------

    async def on_propose(self, peer: str, body: dict[str, Any]) -> list[Any]:
        """`write.propose`: replicate a command that a peer decided."""
        self._check_disk()
        local = self._routing.check_epoch(body["shard"], body["epoch"])
        command = body["command"]
        # The journal is no place to find out what a peer of another version has sent.
        if not isinstance(command, bytes) or not command:
            raise BadRequest("A peer proposed a command that is not bytes.", hint="Upgrade it.")
        if "slots" in body:  # of a version that knows splits
            local.check_slots(*body["slots"])
        written = await self._replicate(local, body["tenant"], command, self._deadline_of(body))
        return written.to_wire()

    async def on_update(self, peer: str, body: dict[str, Any]) -> list[Any]:
        """`write.update`: decide an update here, where the newest version is."""
        self._check_disk()
        local = self._routing.check_epoch(body["shard"], body["epoch"])
        return await self._update_here(
            local,
            body["tenant"],
            body["id"],
            msgspec.json.decode(body["change"], type=rq.UpdateRequest),
            body["request_id"],
            body["fingerprint"],
            self._deadline_of(body),
        )

    def _deadline_of(self, body: dict[str, Any]) -> float:
        return self._clock.monotonic() + float(body["left_ms"]) / 1000


def _slots_of(write: Write) -> tuple[int, int]:
    """The lowest and the highest slot of a command's memories."""
    slots = [slot_of_id(op.id) for op in write.ops]
    return min(slots), max(slots)


def derive_id(request_id: bytes, part: str, number: int) -> bytes:
    """The request id of one part of a request: the same request and part give the same id."""
    return hashlib.blake2b(
        part.encode() + number.to_bytes(4, "big"), key=request_id, digest_size=16
    ).digest()


def not_found(key: bytes) -> NotFound:
    return NotFound(f"There is no memory {format_id(key)}.", id=format_id(key))


def version_conflict(current: int) -> Conflict:
    return Conflict(
        f"The memory was changed by somebody else: it is at version {current} now.",
        hint="Read it again and decide on what it says now.",
        current_version=current,
    )


def _parts(prepared: list[_Prepared]) -> list[list[_Prepared]]:
    parts: list[list[_Prepared]] = [[]]
    size = 0
    for p in prepared:
        cost = len(p.add.record) + len(p.add.vector or b"")
        if parts[-1] and (len(parts[-1]) >= _COMMAND_ITEMS_MAX or size + cost > _COMMAND_BYTES_MAX):
            parts.append([])
            size = 0
        parts[-1].append(p)
        size += cost
    return parts


def _added(prepared: list[_Prepared], written: Written) -> list[rq.AddedItem]:
    items = []
    for number, (p, outcome) in enumerate(zip(prepared, written.outcomes, strict=True)):
        record = written.records[number] if written.replayed else p.add.record
        items.append(
            rq.AddedItem(
                event="ADD",
                id=format_id(outcome.id),
                memory=None if record is None else msgspec.Raw(record),
            )
        )
    return items


def _record(shard: Shard, tenant: str, key: bytes) -> bytes | None:
    stored = shard.get(tenant, key)
    return None if stored is None else stored.record


def _refused(error: AgentMemError) -> rq.AddedItem:
    return rq.AddedItem(event="ERROR", error=_item_error(error))


def _not_deleted(memory_id: str, error: AgentMemError) -> rq.DeletedItem:
    return rq.DeletedItem(id=memory_id, event="ERROR", error=_item_error(error))


def _least_certain(failures: Sequence[AgentMemError]) -> AgentMemError:
    """The error that speaks for all parts: one that leaves its part's outcome open, if any does,
    because a refusal would tell the caller that nothing was done."""
    for error in failures:
        if isinstance(error, DeadlineExceeded | InternalError):
            return error
    return failures[0]


def _item_error(error: AgentMemError) -> rq.ItemError:
    return rq.ItemError(code=error.code, detail=f"{error.message} {error.hint}".strip())
