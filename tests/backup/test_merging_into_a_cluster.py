"""Whatever a cluster has of a memory, merging a backup makes it what the backup holds, step by
step, and steps that are interrupted are gone on with."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem_cluster.raft.api import Entry
from agentmem_node.backup.content import Row, content_of, rows
from agentmem_node.backup.merge import ABSENT, Seen, next_step, record_hash, vector_hash
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import (
    Add,
    Delete,
    Op,
    Revive,
    Update,
    Write,
    WriteResult,
    encode_write,
)
from agentmem_node.model.memory import Memory
from tests.backup.making import DIM, MAP_BYTES, START_MS, a_record, add

TENANT = "acme"
MEMORIES = 3


class Life:
    """A shard on which memories are changed as users change them."""

    def __init__(self, folder: Path) -> None:
        self.shard = Shard.open(folder, "s00", dim=DIM, map_size=MAP_BYTES)

    def apply(self, at_ms: int, *ops: Op) -> list[str]:
        index = self.shard.applied_index + 1
        request_id = hashlib.blake2b(b"%d" % index, digest_size=16).digest()
        command = encode_write(Write(request_id, b"", TENANT, at_ms, tuple(ops)))
        (result,) = self.shard.apply([Entry(index, 1, command)])
        assert isinstance(result, WriteResult), result
        return [outcome.status for outcome in result.outcomes]

    def seen(self, key: bytes) -> Seen:
        env: Any = self.shard._store.env
        for row in rows(env.txn, env.db):
            if row.id == key:
                if row.live is None:
                    return Seen(row.deleted_version, False)
                record = record_hash(row.live.record)
                return Seen(row.live.version, True, record, vector_hash(row.vector))
        return ABSENT

    def rows(self) -> dict[bytes, Row]:
        env: Any = self.shard._store.env
        return {row.id: row for row in rows(env.txn, env.db)}

    def live(self, doing: list[tuple[int, str]], first_ms: int) -> None:
        for number, (memory, what) in enumerate(doing):
            op = add(memory)
            seen = self.seen(op.id)
            content = f"{what} {memory} at {number}"
            record = a_record(op.id, content, seen.version + 1)
            vector = hashlib.blake2b(content.encode(), digest_size=4 * DIM).digest()
            made: Op
            if seen.version == 0:
                made = Add(op.id, record, vector, START_MS, None)
            elif not seen.is_live:
                made = Revive(op.id, seen.version, record, vector, START_MS, None)
            elif what == "delete":
                made = Delete(op.id, seen.version)
            else:
                new_vector = vector if what == "move" else None
                made = Update(op.id, seen.version, record, new_vector, None)
            assert self.apply(first_ms + number, made) == ["ok"]


def merge(target: Life, source: dict[bytes, Row], steps_max: int = 10_000, **how: bool) -> int:
    """Returns how many steps were done."""
    done = 0
    for row in source.values():
        while done < steps_max:
            seen = target.seen(row.id)
            step = next_step(row, seen, **how)
            if step is None:
                break
            at_ms = START_MS + 1_000_000 if step.at_ms is None else step.at_ms
            assert target.apply(at_ms, step.op) == ["ok"]
            assert target.seen(row.id) == step.after
            done += 1
            assert done < 200, "it never ends"
    return done


doings = st.lists(
    st.tuples(st.integers(1, MEMORIES), st.sampled_from(["change", "change", "move", "delete"])),
    max_size=10,
)
some = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def two(tmp_path_factory: Any) -> tuple[Life, Life]:
    path = tmp_path_factory.mktemp("lives")
    return Life(path / "source"), Life(path / "target")


@some
@given(doings, st.data())
def test_an_empty_cluster_gets_everything_with_versions_times_and_history(
    tmp_path_factory: Any, doing: list[tuple[int, str]], draw: st.DataObject
) -> None:
    source, target = two(tmp_path_factory)
    source.live(doing, START_MS)
    kept = source.rows()
    total = sum(max([past.version for past in row.past] + [1]) for row in kept.values())
    # Interrupted once, then run again.
    merge(target, kept, draw.draw(st.integers(0, max(0, total))), exact=False, keep_deleted=True)
    merge(target, kept, exact=False, keep_deleted=True)
    envs: list[Any] = [life.shard._store.env for life in (source, target)]
    before, after = (content_of(env.txn, env.db) for env in envs)
    assert before == after
    assert merge(target, kept, exact=True, keep_deleted=True) == 0
    source.shard.close()
    target.shard.close()


@some
@given(doings, doings, st.booleans())
def test_a_cluster_that_went_on_gets_the_backups_state_as_the_next_version(
    tmp_path_factory: Any, before: list[tuple[int, str]], after: list[tuple[int, str]], exact: bool
) -> None:
    _, target = two(tmp_path_factory)
    target.live(before, START_MS)
    kept = target.rows()
    target.live(after, START_MS + 1_000)
    versions = {key: target.seen(key).version for key in target.rows()}
    merge(target, kept, exact=exact, keep_deleted=False)
    for key, row in kept.items():
        seen = target.seen(key)
        assert seen.version >= versions[key]
        if row.live is not None:
            assert seen.is_live
            assert seen.record == record_hash(row.live.record)
            assert seen.vector == vector_hash(row.vector)
            stored = target.shard.get(TENANT, key)
            assert stored is not None
            assert msgspec.json.decode(stored.record, type=Memory).version == stored.version
        elif exact:
            assert not seen.is_live
    assert merge(target, kept, exact=exact, keep_deleted=False) == 0
    target.shard.close()


@some
@given(doings, doings)
def test_a_cluster_that_was_older_is_brought_forward_with_its_history(
    tmp_path_factory: Any, before: list[tuple[int, str]], after: list[tuple[int, str]]
) -> None:
    source, target = two(tmp_path_factory)
    for life in (source, target):
        life.live(before, START_MS)
    source.live(after, START_MS + 1_000)
    merge(target, source.rows(), exact=True, keep_deleted=True)
    envs: list[Any] = [life.shard._store.env for life in (source, target)]
    first, second = (content_of(env.txn, env.db) for env in envs)
    assert first == second
    source.shard.close()
    target.shard.close()
