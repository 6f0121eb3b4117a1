"""What a command does to a shard: a pure function of the shard's state and the command's bytes.

No clock, no chance, no network, no order of a set or a float sum. A command that cannot be
carried out is a result like any other, the same on every replica; only the local disk or memory
can make this raise.

A write goes through four steps: the ledger (was it done before?), the check of every operation's
record, the plan (the outcome of each operation, in order, as if those before it were done), and
the doing. Nothing is changed before the plan is complete.
"""

from __future__ import annotations

import hashlib

from agentmem_cluster.epochs.commands import EpochState, Sealed
from agentmem_node.engine.reads import memory_of
from agentmem_node.index.source import Change, IndexDoc, Removed
from agentmem_node.model.commands import (
    Add,
    Command,
    Delete,
    EpochChanged,
    Mismatch,
    Op,
    Outcome,
    Rejected,
    Result,
    Revive,
    Update,
    Write,
    WriteResult,
)
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.records import decode_memory
from agentmem_node.storage.layout import DIGEST_BYTES, U32, DocRow
from agentmem_node.storage.ledger import pack_outcomes
from agentmem_node.storage.restrict import Outside, Seen
from agentmem_node.storage.scopes import Scope
from agentmem_node.storage.store import NewMemory, Store

_ABSENT = Seen(0, False, "")


def apply_command(
    store: Store, index: int, command: bytes, write: Command, changes: list[Change]
) -> Result:
    """Apply one log entry; `write` is what its bytes decode to. What the derived indexes must
    learn is appended to `changes`, in order."""
    state = store.state
    result: Result
    if isinstance(write, Rejected):
        result, summary = write, write.reason.encode()
    elif isinstance(write, Write):
        if state.is_sealed:
            # Between two epochs: whoever sent it is told that it was not done, and sends again.
            result, summary = Sealed(state.epoch), b"sealed"
        else:
            result, summary = _apply_write(store, index, write, changes)
    else:
        before = EpochState(state.epoch, state.is_sealed)
        after = before.after(write)
        state.epoch, state.is_sealed = after
        result, summary = EpochChanged(after != before), b"%d %d" % after
    state.applied_index = index
    state.digest = _chain(state.digest, index, command, result, summary)
    return result


def _chain(digest: bytes, index: int, command: bytes, result: Result, summary: bytes) -> bytes:
    """The digest of everything applied: of the log, and of what came of it."""
    kind = type(result).__name__.encode()
    head = b"%s %d %d %s %d " % (digest, index, len(command), kind, len(summary))
    chain = hashlib.blake2b(head, digest_size=DIGEST_BYTES)
    chain.update(command)
    chain.update(summary)
    return chain.digest()


def _apply_write(
    store: Store, index: int, write: Write, changes: list[Change]
) -> tuple[Result, bytes]:
    tenant = store.scopes.tenant(write.tenant)
    if tenant is not None:
        entry = store.ledger.find(tenant.number, write.request_id)
        if entry is not None:
            if entry.fingerprint != write.fingerprint:
                return Mismatch(entry.log_index), b"%d" % entry.log_index
            outcomes = store.ledger.outcomes(tenant.number, entry.log_index)
            replayed = WriteResult(outcomes, replayed=True, index=entry.log_index)
            return replayed, b"replayed %d" % entry.log_index
    memories: list[Memory | None] = []
    for position, op in enumerate(write.ops):
        memory = None
        if not isinstance(op, Delete):
            memory = decode_memory(op.record)
            fault = _fault(op, memory, store.state.dim)
            if fault is not None:
                rejected = Rejected(f"operation {position}: {fault}")
                return rejected, rejected.reason.encode()
        memories.append(memory)
    planned = _plan(store, tenant, write, memories)
    if isinstance(planned, Rejected):
        return planned, planned.reason.encode()
    tenant = store.scopes.make_tenant(write.tenant)
    _do(store, tenant, write, memories, planned, changes)
    summary = pack_outcomes(write.ops, planned)
    kept = summary if store.outside is None else _of_the_part(store.outside, write, planned)
    store.ledger.put(tenant.number, index, write.at_ms, write.request_id, write.fingerprint, kept)
    return WriteResult(tuple(planned), replayed=False, index=index), summary


def _of_the_part(outside: Outside, write: Write, planned: list[Outcome]) -> bytes:
    """What the feed keeps of a command, where only a part of it will be kept."""
    pairs = [
        pair for pair in zip(write.ops, planned, strict=True) if not outside.covers(pair[0].id)
    ]
    return pack_outcomes([op for op, _ in pairs], [outcome for _, outcome in pairs])


def _fault(op: Add | Update | Revive, memory: Memory | None, dim: int) -> str | None:
    """What is wrong with an operation, whatever the shard holds."""
    if memory is None:
        return "its record is not a memory"
    if memory.version != (1 if isinstance(op, Add) else op.read_version + 1):
        return "its record carries another version than it makes"
    if memory.id != format_id(op.id):
        return "its record carries another id"
    if op.vector is not None and (dim == 0 or len(op.vector) != 4 * dim):
        return f"its vector is not one of {dim} values"
    return None


def _plan(
    store: Store, tenant: Scope | None, write: Write, memories: list[Memory | None]
) -> list[Outcome] | Rejected:
    """The outcome of each operation."""
    outcomes: list[Outcome] = []
    seen: dict[bytes, Seen] = {}  # what earlier operations of this command made of an id
    number = None if tenant is None else tenant.number
    for position, (op, memory) in enumerate(zip(write.ops, memories, strict=True)):
        at = seen.get(op.id) or _look(store, number, op.id)
        if isinstance(op, Add):
            if at is not _ABSENT:
                outcomes.append(Outcome("exists", op.id, at.version))
                continue
            assert memory is not None
            seen[op.id] = Seen(1, True, memory.scope.owner)
            outcomes.append(Outcome("ok", op.id, 1))
        elif isinstance(op, Revive):
            if at is _ABSENT:
                outcomes.append(Outcome("not_found", op.id, 0))
            elif at.is_live:
                outcomes.append(Outcome("exists", op.id, at.version))
            elif op.read_version != at.version:
                outcomes.append(Outcome("conflict", op.id, at.version))
            else:
                assert memory is not None
                seen[op.id] = Seen(at.version + 1, True, memory.scope.owner)
                outcomes.append(Outcome("ok", op.id, at.version + 1))
        elif not at.is_live:
            outcomes.append(Outcome("not_found", op.id, 0))
        elif op.read_version is not None and op.read_version != at.version:
            outcomes.append(Outcome("conflict", op.id, at.version))
        else:
            if isinstance(op, Update):
                assert memory is not None
                # The owner decides the shard: a memory never moves to another.
                if memory.scope.owner != at.owner:
                    return Rejected(f"operation {position}: its record has another owner")
            seen[op.id] = Seen(at.version + 1, isinstance(op, Update), at.owner)
            outcomes.append(Outcome("ok", op.id, at.version + 1))
    if write.atomic and any(outcome.status != "ok" for outcome in outcomes):
        for position, outcome in enumerate(outcomes):
            if outcome.status == "ok":
                before = _look(store, number, outcome.id)
                outcomes[position] = Outcome("skipped", outcome.id, before.version)
    return outcomes


def _look(store: Store, tenant: int | None, key: bytes) -> Seen:
    outside = store.outside
    if outside is not None and outside.covers(key):
        return _ABSENT if tenant is None else outside.known.get(U32.pack(tenant) + key, _ABSENT)
    located = None if tenant is None else store.locate(tenant, key)
    if located is None:
        return _ABSENT
    if located.deleted_version:
        return Seen(located.deleted_version, False, "")
    row = store.live(located.doc, key)
    return Seen(row.version, True, memory_of(row).scope.owner)


def _do(
    store: Store,
    tenant: Scope,
    write: Write,
    memories: list[Memory | None],
    outcomes: list[Outcome],
    changes: list[Change],
) -> None:
    adds: list[tuple[Add, Memory]] = []
    for op, memory, outcome in zip(write.ops, memories, outcomes, strict=True):
        if outcome.status != "ok":
            continue
        if store.outside is not None and store.outside.covers(op.id):
            _add(store, tenant, write, adds, changes)
            adds = []
            _note(store, store.outside, tenant, op, memory, outcome)
            continue
        if isinstance(op, Add):
            assert memory is not None
            adds.append((op, memory))
            continue
        # A change may concern a memory that this very command adds.
        _add(store, tenant, write, adds, changes)
        adds = []
        if isinstance(op, Update):
            assert memory is not None
            _update(store, tenant, write, op, memory, changes)
        elif isinstance(op, Revive):
            assert memory is not None
            _revive(store, tenant, write, op, memory, changes)
        else:
            _delete(store, tenant, write, op, changes)
    _add(store, tenant, write, adds, changes)


def _note(
    store: Store,
    outside: Outside,
    tenant: Scope,
    op: Op,
    memory: Memory | None,
    outcome: Outcome,
) -> None:
    """What a command makes of a memory that this part will not have.

    Numbers of memories and of scopes are given out as if it had it: replicas of a part stay alike,
    whenever each of them was trimmed.
    """
    owner = "" if memory is None else memory.scope.owner
    if isinstance(op, (Add, Revive)):
        if owner:
            store.scopes.make(tenant.number, owner)
        store.state.next_doc += 1
    is_live = not isinstance(op, Delete)
    outside.known[U32.pack(tenant.number) + op.id] = Seen(outcome.version, is_live, owner)


def _add(
    store: Store,
    tenant: Scope,
    write: Write,
    adds: list[tuple[Add, Memory]],
    changes: list[Change],
) -> None:
    if not adds:
        return
    name, at_ms = write.tenant, write.at_ms
    new = []
    for op, memory in adds:
        owner_name = memory.scope.owner
        owner = store.scopes.make(tenant.number, owner_name) if owner_name else tenant
        new.append(
            NewMemory(op.id, owner, op.created_ms, at_ms, op.expires_ms, op.record, op.vector)
        )
    first = store.add(tenant, new)
    for doc, (op, memory) in enumerate(adds, first):
        changes.append(
            IndexDoc(doc, op.id, name, memory, op.created_ms, at_ms, op.expires_ms, op.vector)
        )


def _update(
    store: Store,
    tenant: Scope,
    write: Write,
    op: Update,
    memory: Memory,
    changes: list[Change],
) -> None:
    doc, old = _live(store, tenant, op)
    row = store.update(
        doc,
        old,
        at_ms=write.at_ms,
        expires_ms=op.expires_ms,
        record=op.record,
        vector=op.vector,
    )
    vector = store.vector(doc) if op.vector is None else op.vector
    changes.append(
        IndexDoc(
            doc,
            op.id,
            write.tenant,
            memory,
            row.created_ms,
            row.updated_ms,
            row.expires_ms,
            vector,
        )
    )


def _revive(
    store: Store,
    tenant: Scope,
    write: Write,
    op: Revive,
    memory: Memory,
    changes: list[Change],
) -> None:
    located = store.locate(tenant.number, op.id)
    assert located is not None
    name = memory.scope.owner
    owner = store.scopes.make(tenant.number, name) if name else tenant
    new = NewMemory(op.id, owner, op.created_ms, write.at_ms, op.expires_ms, op.record, op.vector)
    doc = store.revive(tenant, located.doc, op.read_version + 1, new)
    row = store.row(doc)
    assert row is not None
    changes.append(
        IndexDoc(
            doc,
            op.id,
            write.tenant,
            memory,
            row.created_ms,
            row.updated_ms,
            row.expires_ms,
            op.vector,
        )
    )


def _delete(store: Store, tenant: Scope, write: Write, op: Delete, changes: list[Change]) -> None:
    doc, old = _live(store, tenant, op)
    name = memory_of(old).scope.owner
    owner = store.scopes.make(tenant.number, name) if name else tenant
    store.delete(doc, old, tenant, owner, write.at_ms)
    changes.append(Removed(doc, op.id, write.tenant, name))


def _live(store: Store, tenant: Scope, op: Op) -> tuple[int, DocRow]:
    located = store.locate(tenant.number, op.id)
    if located is None:
        raise AssertionError(f"the plan saw {format_id(op.id)}, but it is not there")
    return located.doc, store.live(located.doc, op.id)
