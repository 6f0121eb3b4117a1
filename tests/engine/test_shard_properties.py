"""A shard against a model of it in plain dictionaries, through crashes and against a second one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem_cluster.raft.api import Entry
from agentmem_node.engine import shard as shard_module
from agentmem_node.engine.shard import Shard
from agentmem_node.index.source import Change, IndexDoc, Removed, Source
from agentmem_node.model.commands import (
    Add,
    Delete,
    Mismatch,
    Op,
    Outcome,
    Rejected,
    Result,
    Revive,
    Update,
    Write,
    WriteResult,
    encode_write,
)
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import TIME_MS_MIN, format_ms
from agentmem_node.storage.ledger import LedgerBounds
from tests.engine.commands import check_sums

DIM = 2
BOUNDS = LedgerBounds(entries_max=6, entries_min=3, age_ms_max=40)
TENANTS = ("acme", "beta" * 200)  # the second: longer than any LMDB key
OWNERS = ("user:ana", "agent:planner", "")
IDS = [bytes([1]) * 6 + bytes([0x80, 0, 0x80]) + bytes([n]) * 7 for n in range(6)]
START_MS = 1_790_000_000_000


def record_of(key: bytes, content: str, owner: str, version: int) -> bytes:
    kind, _, name = owner.partition(":")
    memory = Memory(
        id=format_id(key),
        content=content,
        user_id=name if kind == "user" else None,
        agent_id=name if kind == "agent" else None,
        created_at=format_ms(0),
        updated_at=format_ms(0),
        version=version,
    )
    return msgspec.json.encode(memory)


def vector_of(n: int) -> bytes:
    return np.array([n, -n], dtype="<f4").tobytes()


# -- commands that meet each other ----------------------------------------------------------

keys = st.integers(0, len(IDS) - 1)
vectors = st.one_of(st.none(), st.integers(1, 9).map(vector_of))
expiries = st.sampled_from([None, START_MS - 1, START_MS, START_MS + 1])
# 0 stands for the version that is there: see `concrete`.
reads = st.sampled_from([0, 0, 0, 0, 1, 2])
contents = st.sampled_from(["tea", "coffee", "water"])


def owner_of(number: int) -> str:
    return OWNERS[number % len(OWNERS)]


adds = st.builds(
    lambda n, content, vector, created, expires: Add(
        IDS[n], record_of(IDS[n], content, owner_of(n), 1), vector, created, expires
    ),
    keys,
    contents,
    vectors,
    # Back-dated, also to before 1970, and equal for many.
    st.sampled_from([TIME_MS_MIN, -5, 0, START_MS, START_MS + 1]),
    expiries,
)
updates = st.builds(
    lambda n, content, read, vector, expires, moved: Update(
        IDS[n], read, record_of(IDS[n], content, owner_of(n + moved), read + 1), vector, expires
    ),
    keys,
    contents,
    reads,
    vectors,
    expiries,
    st.sampled_from([0] * 9 + [1]),
)
revivals = st.builds(
    lambda n, content, read, vector, created, expires: Revive(
        IDS[n],
        read,
        record_of(IDS[n], content, owner_of(n), read + 1),
        vector,
        created,
        expires,
    ),
    keys,
    contents,
    reads,
    vectors,
    st.sampled_from([TIME_MS_MIN, 0, START_MS]),
    expiries,
)
deletes = st.builds(lambda n, read: Delete(IDS[n], read), keys, st.one_of(st.none(), reads))
writes = st.builds(
    lambda request, fingerprint, tenant, at, ops, atomic: Write(
        bytes([request]) * 16, fingerprint, tenant, START_MS + at, tuple(ops), atomic
    ),
    st.integers(0, 12),
    st.sampled_from([b"", b"", b"body"]),
    st.sampled_from(TENANTS),
    st.integers(0, 100),
    st.lists(st.one_of(adds, adds, updates, updates, deletes, revivals), max_size=4),
    st.booleans(),
)


def concrete(write: Write, model: Model) -> Write:
    """The write with each read version 0 replaced by the version that is there."""
    ops: list[Op] = []
    for op in write.ops:
        kept = model.kept.get((write.tenant, op.id))
        version = 1 if kept is None else kept.version
        if isinstance(op, Update | Revive) and op.read_version == 0:
            memory = msgspec.json.decode(op.record, type=Memory)
            record = record_of(op.id, memory.content, memory.scope.owner, version + 1)
            op = op._replace(read_version=version, record=record)
        elif isinstance(op, Delete) and op.read_version == 0:
            op = op._replace(read_version=version)
        ops.append(op)
    return write._replace(ops=tuple(ops))


# -- the model ------------------------------------------------------------------------------


@dataclass
class Kept:
    doc: int
    version: int
    is_live: bool
    owner: str
    created_ms: int
    updated_ms: int
    expires_ms: int | None
    record: bytes
    vector: bytes | None
    history: list[tuple[str, int, int, str | None, str | None]]  # event, version, at, old, new


@dataclass
class Model:
    kept: dict[tuple[str, bytes], Kept] = field(default_factory=dict)
    ledger: dict[tuple[str, bytes], tuple[int, bytes, tuple[Outcome, ...], int]] = field(
        default_factory=dict
    )
    feed: dict[str, list[tuple[int, int, int, str, bytes, int]]] = field(default_factory=dict)
    docs: int = 0
    clock: int = -(1 << 63)

    def apply(self, index: int, write: Write) -> Result:
        known = self.ledger.get((write.tenant, write.request_id))
        if known is not None:
            first, fingerprint, outcomes, _ = known
            if fingerprint != write.fingerprint:
                return Mismatch(first)
            return WriteResult(outcomes, True, first)
        before = {key: _copy(kept) for key, kept in self.kept.items()}
        docs = self.docs
        planned = []
        for position, op in enumerate(write.ops):
            outcome = self._op(write, op)
            if outcome is None:
                self.kept, self.docs = before, docs
                return Rejected(f"operation {position}: its record has another owner")
            planned.append(outcome)
        if write.atomic and any(o.status != "ok" for o in planned):
            self.kept, self.docs = before, docs
            for position, o in enumerate(planned):
                if o.status == "ok":
                    was = before.get((write.tenant, o.id))
                    planned[position] = Outcome("skipped", o.id, was.version if was else 0)
        for position, (op, o) in enumerate(zip(write.ops, planned, strict=True)):
            if o.status == "ok":
                event = "ADD" if isinstance(op, Revive) else type(op).__name__.upper()
                self.feed.setdefault(write.tenant, []).append(
                    (index, position, write.at_ms, event, o.id, o.version)
                )
        self._remember(index, write, tuple(planned))
        return WriteResult(tuple(planned), False, index)

    def _op(self, write: Write, op: Op) -> Outcome | None:
        kept = self.kept.get((write.tenant, op.id))
        if isinstance(op, Add):
            if kept is not None:
                return Outcome("exists", op.id, kept.version)
            self.docs += 1
            memory = msgspec.json.decode(op.record, type=Memory)
            self.kept[write.tenant, op.id] = Kept(
                self.docs, 1, True, memory.scope.owner, op.created_ms, write.at_ms,
                op.expires_ms, op.record, op.vector,
                [("ADD", 1, write.at_ms, None, memory.content)],
            )  # fmt: skip
            return Outcome("ok", op.id, 1)
        if isinstance(op, Revive):
            if kept is None:
                return Outcome("not_found", op.id, 0)
            if kept.is_live:
                return Outcome("exists", op.id, kept.version)
            if op.read_version != kept.version:
                return Outcome("conflict", op.id, kept.version)
            self.docs += 1
            memory = msgspec.json.decode(op.record, type=Memory)
            at = max(kept.updated_ms, write.at_ms)
            version = kept.version + 1
            self.kept[write.tenant, op.id] = Kept(
                self.docs, version, True, memory.scope.owner, op.created_ms, at,
                op.expires_ms, op.record, op.vector,
                [*kept.history, ("ADD", version, at, None, memory.content)],
            )  # fmt: skip
            return Outcome("ok", op.id, version)
        if kept is None or not kept.is_live:
            return Outcome("not_found", op.id, 0)
        if op.read_version is not None and op.read_version != kept.version:
            return Outcome("conflict", op.id, kept.version)
        old = msgspec.json.decode(kept.record, type=Memory).content
        new = None
        at = max(kept.updated_ms, write.at_ms)
        if isinstance(op, Update):
            memory = msgspec.json.decode(op.record, type=Memory)
            if memory.scope.owner != kept.owner:
                return None
            new = memory.content
            kept.record, kept.expires_ms = op.record, op.expires_ms
            kept.vector = kept.vector if op.vector is None else op.vector
        else:
            kept.is_live = False
        kept.version += 1
        kept.updated_ms = at
        event = "UPDATE" if isinstance(op, Update) else "DELETE"
        kept.history.append((event, kept.version, at, old, new))
        return Outcome("ok", op.id, kept.version)

    def _remember(self, index: int, write: Write, outcomes: tuple[Outcome, ...]) -> None:
        self.clock = max(self.clock, write.at_ms)
        self.ledger[write.tenant, write.request_id] = (
            index, write.fingerprint, outcomes, self.clock,
        )  # fmt: skip
        while self.ledger:
            oldest = min(self.ledger, key=lambda key: self.ledger[key][0])
            is_old = self.ledger[oldest][3] + BOUNDS.age_ms_max < self.clock
            few = len(self.ledger) <= BOUNDS.entries_min
            if len(self.ledger) <= BOUNDS.entries_max and (few or not is_old):
                break
            del self.ledger[oldest]

    def live(self, tenant: str) -> list[tuple[bytes, Kept]]:
        rows = [(key, k) for (of, key), k in self.kept.items() if of == tenant and k.is_live]
        return sorted(rows, key=lambda row: (row[1].created_ms, row[0]), reverse=True)


def _copy(kept: Kept) -> Kept:
    fields = {name: getattr(kept, name) for name in Kept.__dataclass_fields__}
    return Kept(**(fields | {"history": list(kept.history)}))


class Follower:
    """An index that only remembers what it was told."""

    def __init__(self, source: Source) -> None:
        self.docs: dict[int, IndexDoc] = {}
        for tenant in TENANTS:
            self.docs |= {doc.doc: doc for doc in source.scan(tenant, None)}

    def close(self) -> None:
        pass

    def apply(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change, Removed):
                gone = self.docs.pop(change.doc)
                assert (gone.id, gone.tenant) == (change.id, change.tenant)
                assert gone.memory.scope.owner == change.owner
            else:
                self.docs[change.doc] = change


def open_shard(folder: Path) -> Shard:
    factory: Any = Follower
    return Shard.open(
        folder, "s00", dim=DIM, map_size=64 << 20, index_factory=factory, ledger=BOUNDS
    )


def crash(shard: Shard) -> None:
    shard._store.env.close()


def rows_of(shard: Shard) -> dict[str, dict[bytes, bytes]]:
    """Every byte of a shard."""
    store = shard._store
    return {name: dict(store.env.txn.cursor(db=db)) for name, db in store.env.db.items()} | {
        "state": {b"": store.state.pack()}
    }


def check(shard: Shard, model: Model) -> None:
    follower: Any = shard.index
    for tenant in TENANTS:
        live = model.live(tenant)
        assert shard.count(tenant) == len(live)
        for n, key in enumerate(IDS):
            kept = model.kept.get((tenant, key))
            stored = shard.get(tenant, key)
            history = shard.history(tenant, key)
            if kept is None:
                assert stored is None
                assert history == []
                continue
            assert [(h.event, h.version, h.at, h.old_content, h.new_content) for h in history] == [
                (e, v, format_ms(at), old, new) for e, v, at, old, new in kept.history
            ]
            assert shard.history(tenant, key, limit=1) == history[-1:]
            if not kept.is_live:
                assert stored is None
                continue
            assert stored is not None
            assert stored == (
                key, kept.record, kept.version, kept.created_ms, kept.updated_ms, kept.expires_ms,
            )  # fmt: skip
            assert owner_of(n) == kept.owner
        for owner in (None, *OWNERS[:2]):
            rows = [(key, k) for key, k in live if owner in (None, k.owner)]
            assert shard.count(tenant, owner) == len(rows)
            shown = [key for key, k in rows if k.expires_ms is None or k.expires_ms > START_MS]
            assert list(pages(shard, tenant, owner)) == shown
            scanned = list(shard.source.scan(tenant, owner))
            assert [doc.doc for doc in scanned] == sorted(k.doc for _, k in rows)
            for doc in scanned:
                assert doc == follower.docs[doc.doc]
                kept = model.kept[tenant, doc.id]
                assert doc.vector == kept.vector
                row = shard.source.vectors(np.array([doc.doc]))
                assert row.tobytes() == (kept.vector or bytes(4 * DIM))
                assert shard.source.records([doc.doc]) == [kept.record]
                assert shard.source.memory(doc.doc)["content"] == doc.memory.content
        feed = [tuple(item) for item in shard.feed(tenant, (0, -1), 1000)]
        assert feed == model.feed.get(tenant, [])
        for request in range(13):
            known = model.ledger.get((tenant, bytes([request]) * 16))
            found = shard.ledger_lookup(tenant, bytes([request]) * 16)
            expected = None if known is None else WriteResult(known[2], True, known[0])
            assert found == expected
    assert len(follower.docs) == shard.count()
    live_kept = [kept for kept in model.kept.values() if kept.is_live]
    stats = shard.stats()
    assert stats["memories"] == len(live_kept)
    assert stats["vectors"] == sum(kept.vector is not None for kept in live_kept)
    assert stats["tombstones"] == len(model.kept) - len(live_kept)
    assert stats["ledger_entries"] == len(model.ledger)
    check_sums(shard)


def pages(shard: Shard, tenant: str, owner: str | None) -> Iterator[bytes]:
    """A whole list, two at a time."""
    after = None
    while True:
        items = shard.list(tenant, owner, accept=None, after=after, limit=2, now_ms=START_MS)
        yield from (stored.id for stored in items)
        if len(items) < 2:
            return
        after = (items[-1].created_ms, items[-1].id)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    commands=st.lists(writes, min_size=1, max_size=25),
    steps=st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(["", "", "checkpoint", "begin", "crash"])),
        min_size=30,
        max_size=30,
    ),
)
def test_a_shard_does_what_its_model_does_and_replay_gives_the_same_bytes(
    commands: list[Write],
    steps: list[tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Every few operations are their own transaction.
    monkeypatch.setattr(shard_module, "_COMMIT_BYTES", 60_000)
    for name in ("steady", "shaken"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    model = Model()
    entries, expected = [], []
    for index, command in enumerate(commands, 1):
        write = concrete(command, model)
        entries.append(Entry(index, 1, encode_write(write)))
        expected.append(model.apply(index, write))

    steady = open_shard(tmp_path / "steady")
    assert steady.apply(entries) == expected
    check(steady, model)

    shaken = open_shard(tmp_path / "shaken")
    job: Any = None
    for size, then in steps:
        at = shaken.applied_index
        assert shaken.apply(entries[at : at + size]) == expected[at : at + size]
        if then == "begin":
            job = job or shaken.checkpoint()
        elif then == "checkpoint":
            job = job or shaken.checkpoint()
            if job is not None:
                job.run()
                shaken.checkpoint_done(job)
                job = None
        elif then == "crash":
            durable = shaken.durable_index
            crash(shaken)
            job = None
            shaken = open_shard(tmp_path / "shaken")
            assert shaken.applied_index == shaken.durable_index == durable
    shaken.apply(entries[shaken.applied_index :])
    check(shaken, model)
    assert shaken.digest() == steady.digest()
    assert rows_of(shaken) == rows_of(steady)
    shaken.close()
    reopened = open_shard(tmp_path / "shaken")
    if job is None:
        assert reopened.durable_index == len(entries)
        check(reopened, model)
    reopened.close()
    steady.close()
