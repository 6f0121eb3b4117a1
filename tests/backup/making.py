"""Small clusters without nodes: shards that take commands, and backups of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from agentmem_cluster.raft.api import Entry
from agentmem_cluster.ring import slot_of
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.backup.archive import Archive, Reached
from agentmem_node.backup.catalog import new_id
from agentmem_node.backup.content import Content, content_of, total
from agentmem_node.backup.manifest import Manifest, Model, encode, manifest_name
from agentmem_node.backup.objects import ObjectStore
from agentmem_node.backup.upload import Progress, RateLimit, upload_shard
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import Add, Delete, Op, Update, Write, encode_write
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import format_ms

DIM = 8
START_MS = 1_790_000_000_000
MAP_BYTES = 256 << 20
CLUSTER = "c0ffee00"


def an_id(number: int, tenant: str = "acme", owner: str = "user:ana") -> bytes:
    """A memory id on its owner's slot."""
    slot = slot_of(tenant, owner)
    value = ((START_MS + number) << 80) | (0x8 << 76) | ((slot >> 2) << 64) | (0b10 << 62)
    return (value | ((slot & 0b11) << 60) | number).to_bytes(16, "big")


def a_record(key: bytes, content: str, version: int = 1, user: str = "ana") -> bytes:
    memory = Memory(
        id=format_id(key),
        content=content,
        user_id=user,
        created_at=format_ms(START_MS),
        updated_at=format_ms(START_MS + version),
        version=version,
    )
    return msgspec.json.encode(memory)


def add(
    number: int, content: str = "Ana likes tea", user: str = "ana", tenant: str = "acme"
) -> Add:
    key = an_id(number, tenant, f"user:{user}")
    vector = hashlib.blake2b(content.encode(), digest_size=4 * DIM).digest()
    return Add(key, a_record(key, content, 1, user), vector, START_MS + number, None)


def update(op: Add, version: int, content: str, user: str = "ana") -> Update:
    return Update(op.id, version - 1, a_record(op.id, content, version, user), None, None)


def delete(op: Add) -> Delete:
    return Delete(op.id, None)


def entry(index: int, *ops: Op, at_ms: int | None = None, tenant: str = "acme") -> Entry:
    """By default at as many milliseconds after the start as its index."""
    when = START_MS + index if at_ms is None else at_ms
    request_id = hashlib.blake2b(b"%d" % index, digest_size=16).digest()
    return Entry(index, 1, encode_write(Write(request_id, b"body", tenant, when, ops)))


@dataclass
class SmallCluster:
    """Shards in folders below `path`; every entry that was applied is kept in `log`."""

    path: Path
    shards: int = 2
    cluster_id: str = CLUSTER
    open: dict[str, Shard] = field(default_factory=dict)
    log: dict[str, list[Entry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.map = ShardMap.initial(["n1"], self.shards, 1)
        for name in self.map.shards:
            self.open[name] = Shard.open(self.path / name, name, dim=DIM, map_size=MAP_BYTES)
            self.log[name] = []

    def write(self, *ops: Op, at_ms: int, user: str = "ana", tenant: str = "acme") -> str:
        """Returns the shard that took it."""
        name = self.map.shard_of(tenant, f"user:{user}").id
        made = entry(self.open[name].applied_index + 1, *ops, at_ms=at_ms, tenant=tenant)
        self.open[name].apply([made])
        self.log[name].append(made)
        return name

    def content(self) -> Content:
        parts = []
        for shard in self.open.values():
            env: Any = shard._store.env
            parts.append(content_of(env.txn, env.db))
        return total(parts)

    def backup(
        self, store: ObjectStore, at_ms: int, *, known: frozenset[bytes] = frozenset(), **more: Any
    ) -> Manifest:
        """A backup, its manifest written."""
        made = []
        for name, shard in self.open.items():
            snapshot = shard.open_snapshot()
            try:
                made.append(
                    upload_shard(
                        store,
                        snapshot,
                        shard._store.env.db,
                        shard=name,
                        epoch=1,
                        term=1,
                        known=known,
                        replace=more.get("replace", False),
                        progress=Progress(),
                        rate=RateLimit(0),
                    )
                )
            finally:
                snapshot.close()
        manifest = Manifest(
            id=new_id(at_ms, (at_ms % (1 << 24)).to_bytes(3, "big")),
            cluster_id=self.cluster_id,
            cluster_name="test",
            version="0",
            at_ms=at_ms,
            took_ms=0,
            model=Model(name="none", dim=DIM, model_hash=""),
            map=self.map.to_wire(),
            shards=made,
        )
        store.put(manifest_name(manifest.id), encode(manifest))
        return manifest

    def archive(self, store: ObjectStore, cuts: Sequence[int], reached_ms: int) -> None:
        """Archive everything, in segments that end at each of `cuts` and at the end."""
        archive = Archive(store, self.cluster_id)
        for name, entries in self.log.items():
            begin = 0
            for end in sorted({*(cut for cut in cuts if cut < len(entries)), len(entries)}):
                if end > begin:
                    archive.append(name, 1, entries[begin:end], self.slots(name))
                    begin = end
            archive.mark(name, Reached(1, len(entries), reached_ms))

    def slots(self, name: str) -> tuple[int, int]:
        info = self.map.shards[name]
        return info.slot_start, info.slot_end

    def close(self) -> None:
        for shard in self.open.values():
            shard.close()
