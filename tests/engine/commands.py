"""Commands for shards: deterministic, so that two processes can make the same ones."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np

from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import Add, Op, Write, encode_write
from agentmem_node.model.ids import format_id
from agentmem_node.model.memory import Memory
from agentmem_node.model.times import format_ms

DIM = 8
START_MS = 1_790_000_000_000


def an_id(number: int) -> bytes:
    """A memory id that sorts by its number."""
    return (START_MS + number).to_bytes(6, "big") + b"\x80\x01\x80" + number.to_bytes(7, "big")


def a_record(key: bytes, content: str, version: int = 1, owner: str = "ana") -> bytes:
    memory = Memory(
        id=format_id(key),
        content=content,
        user_id=owner,
        created_at=format_ms(START_MS),
        updated_at=format_ms(START_MS),
        version=version,
    )
    return msgspec.json.encode(memory)


def an_add(number: int, content: str = "Ana likes oolong tea") -> Add:
    key = an_id(number)
    vector = np.full(DIM, number, dtype="<f4").tobytes()
    return Add(key, a_record(key, content), vector, START_MS + number, None)


def an_entry(index: int, *ops: Op, request: int | None = None, atomic: bool = False) -> Entry:
    """A log entry; by default with a request id of its own."""
    seed = index if request is None else -request
    request_id = hashlib.blake2b(b"%d" % seed, digest_size=16).digest()
    write = Write(request_id, b"body", "acme", START_MS + index, ops, atomic)
    return Entry(index, 1, encode_write(write))


def check_sums(shard: Shard) -> None:
    """Every row has the checksum that it should have, and there is none beside."""
    store = shard._store
    assert store.entries("sums") == store.entries("docs") + store.entries("history")
    snapshot = shard.open_snapshot()
    try:
        assert sum(shard.scrub(snapshot)) >= store.entries("ids")
    finally:
        snapshot.close()


def batches(first: int, last: int) -> list[Entry]:
    """Entries that each add ten memories of half a kilobyte."""
    return [
        an_entry(index, *(an_add(index * 10 + n, "tea and rain " * 40) for n in range(10)))
        for index in range(first, last + 1)
    ]
