"""What single commands do: each rule of applying, by example."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from agentmem_cluster.raft.api import Entry
from agentmem_node.engine.shard import Shard
from agentmem_node.model.commands import (
    Add,
    Delete,
    Mismatch,
    Outcome,
    Rejected,
    Revive,
    Update,
    Write,
    WriteResult,
    encode_write,
)
from tests.engine.commands import DIM, START_MS, a_record, an_add, an_entry, an_id, batches

A, B = an_id(1), an_id(2)


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    opened = Shard.open(tmp_path / "s00", "s00", dim=DIM)
    yield opened
    opened.close()


def an_update(key: bytes, read: int, content: str, owner: str = "ana") -> Update:
    return Update(key, read, a_record(key, content, read + 1, owner), None, None)


def outcomes(shard: Shard, entry: Entry) -> list[tuple[str, int]]:
    (result,) = shard.apply([entry])
    assert isinstance(result, WriteResult)
    return [(o.status, o.version) for o in result.outcomes]


def test_an_update_decided_on_an_old_version_conflicts_and_says_which_is_there(
    shard: Shard,
) -> None:
    assert outcomes(shard, an_entry(1, an_add(1))) == [("ok", 1)]
    assert outcomes(shard, an_entry(2, an_update(A, 1, "green tea"))) == [("ok", 2)]
    assert outcomes(shard, an_entry(3, an_update(A, 1, "black tea"))) == [("conflict", 2)]
    stored = shard.get("acme", A)
    assert stored is not None
    assert b"green tea" in stored.record
    assert stored.version == 2


def test_a_deleted_id_is_never_given_out_again(shard: Shard) -> None:
    shard.apply([an_entry(1, an_add(1)), an_entry(2, Delete(A, None))])
    assert outcomes(shard, an_entry(3, an_add(1))) == [("exists", 2)]
    assert outcomes(shard, an_entry(4, an_update(A, 2, "tea"))) == [("not_found", 0)]
    assert outcomes(shard, an_entry(5, Delete(A, None))) == [("not_found", 0)]


def test_a_deleted_memory_is_left_in_its_history_only(shard: Shard) -> None:
    shard.apply([an_entry(1, an_add(1, "the secret")), an_entry(2, Delete(A, 1))])
    assert shard.get("acme", A) is None
    assert shard.list("acme", None, accept=None, after=None, limit=9, now_ms=0) == []
    assert [(h.event, h.old_content, h.new_content) for h in shard.history("acme", A)] == [
        ("ADD", None, "the secret"),
        ("DELETE", "the secret", None),
    ]
    store = shard._store
    for name in store.env.db:
        if name != "history":
            rows = list(store.env.txn.cursor(db=store.env.db[name]))
            assert not any(b"secret" in value for _, value in rows), name


def a_revival(number: int, read: int, content: str) -> Revive:
    key = an_id(number)
    record = a_record(key, content, read + 1)
    return Revive(key, read, record, an_add(number).vector, START_MS + number, None)


def test_a_restore_brings_a_deleted_memory_back_with_its_history(shard: Shard) -> None:
    shard.apply([an_entry(1, an_add(1, "tea"), an_add(2)), an_entry(2, Delete(A, 1))])
    assert outcomes(shard, an_entry(3, a_revival(1, 2, "green tea"))) == [("ok", 3)]
    stored = shard.get("acme", A)
    assert stored is not None and (stored.version, stored.created_ms) == (3, START_MS + 1)
    assert [(h.event, h.version, h.new_content) for h in shard.history("acme", A)] == [
        ("ADD", 1, "tea"),
        ("DELETE", 2, None),
        ("ADD", 3, "green tea"),
    ]
    page = shard.list("acme", "user:ana", accept=None, after=None, limit=9, now_ms=0)
    assert [memory.id for memory in page] == [B, A]
    assert (shard.count("acme"), shard.count("acme", "user:ana")) == (2, 2)
    assert outcomes(shard, an_entry(4, an_update(A, 3, "black tea"))) == [("ok", 4)]
    assert outcomes(shard, an_entry(5, Delete(A, 4), Delete(B, None))) == [("ok", 5), ("ok", 2)]
    assert shard.count() == 0
    assert [h.event for h in shard.history("acme", A)] == [
        "ADD",
        "DELETE",
        "ADD",
        "UPDATE",
        "DELETE",
    ]


def test_only_what_is_deleted_at_the_version_that_was_read_is_brought_back(shard: Shard) -> None:
    shard.apply([an_entry(1, an_add(1), an_add(2)), an_entry(2, Delete(A, 1))])
    entry = an_entry(3, a_revival(1, 1, "tea"), a_revival(2, 1, "tea"), a_revival(3, 1, "tea"))
    assert outcomes(shard, entry) == [("conflict", 2), ("exists", 1), ("not_found", 0)]
    twice = an_entry(4, a_revival(1, 2, "tea"), a_revival(1, 2, "tea"), Delete(A, None))
    assert outcomes(shard, twice) == [("ok", 3), ("exists", 3), ("ok", 4)]
    wrong = a_revival(1, 4, "tea")._replace(record=a_record(A, "tea", 4))
    (result,) = shard.apply([an_entry(5, wrong)])
    assert isinstance(result, Rejected) and "another version" in result.reason


def test_an_atomic_write_takes_effect_as_a_whole_or_not_at_all(shard: Shard) -> None:
    entry = an_entry(1, an_add(1), Delete(B, None), an_add(3), atomic=True)
    assert outcomes(shard, entry) == [("skipped", 0), ("not_found", 0), ("skipped", 0)]
    assert shard.count() == 0
    assert outcomes(shard, an_entry(2, an_add(1), an_add(2), atomic=True)) == [
        ("ok", 1),
        ("ok", 1),
    ]


def test_operations_of_one_command_see_those_before_them(shard: Shard) -> None:
    entry = an_entry(1, an_add(1), an_add(1), an_update(A, 1, "tea"), Delete(A, 2), Delete(A, None))
    assert outcomes(shard, entry) == [
        ("ok", 1),
        ("exists", 1),
        ("ok", 2),
        ("ok", 3),
        ("not_found", 0),
    ]
    assert [h.event for h in shard.history("acme", A)] == ["ADD", "UPDATE", "DELETE"]


def test_a_command_that_arrives_twice_takes_effect_once(shard: Shard) -> None:
    first = an_entry(1, an_add(1), request=7)
    again = Entry(2, 1, first.command)
    done, replayed = shard.apply([first, again])
    assert done == WriteResult((Outcome("ok", A, 1),), replayed=False, index=1)
    assert replayed == WriteResult((Outcome("ok", A, 1),), replayed=True, index=1)
    assert shard.count() == 1
    request_id = hashlib.blake2b(b"-7", digest_size=16).digest()
    assert shard.ledger_lookup("acme", request_id) == replayed
    assert shard.ledger_lookup("other", request_id) is None


def test_a_refusal_is_remembered_too(shard: Shard) -> None:
    """A retried delete must not succeed because somebody added the memory meanwhile."""
    first = an_entry(1, Delete(A, None), request=7)
    shard.apply([first, an_entry(2, an_add(1))])
    assert outcomes(shard, Entry(3, 1, first.command)) == [("not_found", 0)]
    assert shard.count() == 1


def test_the_same_request_id_with_another_body_is_a_mismatch(shard: Shard) -> None:
    write = Write(b"r" * 16, b"one", "acme", 0, (an_add(1),))
    other = write._replace(fingerprint=b"two", ops=(an_add(2),))
    results = shard.apply([Entry(1, 1, encode_write(write)), Entry(2, 1, encode_write(other))])
    assert results[1] == Mismatch(index=1)
    assert shard.get("acme", B) is None
    # The same id from another tenant is another request.
    elsewhere = other._replace(tenant="other")
    assert isinstance(shard.apply([Entry(3, 1, encode_write(elsewhere))])[0], WriteResult)


def test_a_tenant_sees_nothing_of_another(shard: Shard) -> None:
    shard.apply([an_entry(1, an_add(1))])
    assert shard.get("other", A) is None
    assert shard.get_many("other", [A]) == [None]
    assert shard.history("other", A) == []
    assert shard.count("other") == 0
    assert list(shard.source.scan("other", None)) == []
    assert shard.feed("other", (0, -1), 9) == []
    delete = Write(b"d" * 16, b"", "other", 0, (Delete(A, None),))
    assert outcomes(shard, Entry(2, 1, encode_write(delete))) == [("not_found", 0)]
    assert shard.count("acme") == 1


def _bad_commands() -> dict[str, bytes]:
    def one(op: Add | Update, **changes: object) -> bytes:
        return an_entry(1, op._replace(**changes)).command

    good = an_add(1)
    head = msgpack.unpackb(an_entry(1, good).command)
    return {
        "nothing, as a leader's first entry": b"",
        "not msgpack": b"\xc1",
        "a number": msgpack.packb(7),
        "a later format": msgpack.packb([9, *head[1:]]),
        "a later kind": msgpack.packb([1, 9, *head[2:]]),
        "a field too many": msgpack.packb([*head, 0]),
        "a short request id": msgpack.packb([1, 1, b"r", *head[3:]]),
        "an operation of no kind": msgpack.packb([*head[:-1], [[7, A]]]),
        "a record that is no JSON": one(good, record=b"{"),
        "a record that is no memory": one(good, record=b"{}"),
        "a record nested without end": one(good, record=b"[" * 100_000),
        "a record of another memory": one(good, record=a_record(B, "tea")),
        "a record of another version": one(good, record=a_record(A, "tea", 2)),
        "a record in broken UTF-8": one(good, record=good.record.replace(b"tea", b"t\xff\xfe")),
        "a short vector": one(good, vector=bytes(4)),
        "an update with its old version": one(an_update(A, 1, "tea"), read_version=2),
    }


@pytest.mark.parametrize("name", _bad_commands())
def test_a_bad_command_is_a_result_and_changes_nothing(name: str, shard: Shard) -> None:
    before = shard.stats()
    (result,) = shard.apply([Entry(1, 1, _bad_commands()[name])])
    assert isinstance(result, Rejected)
    assert shard.applied_index == 1
    after = shard.stats()
    assert after | {"applied_index": 0, "bytes": 0, "file_bytes": 0} == before | {
        "bytes": 0,
        "file_bytes": 0,
    }


def test_an_update_to_another_owner_is_refused_with_all_of_its_command(shard: Shard) -> None:
    """The owner decides the shard; a memory cannot walk to where nobody looks for it."""
    shard.apply([an_entry(1, an_add(1))])
    (result,) = shard.apply([an_entry(2, an_add(2), an_update(A, 1, "tea", owner="ben"))])
    assert result == Rejected("operation 1: its record has another owner")
    assert shard.get("acme", B) is None


def test_an_update_without_a_vector_keeps_the_one_it_has(shard: Shard) -> None:
    shard.apply([an_entry(1, an_add(1)), an_entry(2, an_update(A, 1, "green tea"))])
    (doc,) = shard.source.scan("acme", "user:ana")
    assert doc.vector == an_add(1).vector
    assert doc.memory.content == "green tea"


def test_time_never_runs_backwards_in_a_memory(shard: Shard) -> None:
    early = Write(b"e" * 16, b"", "acme", -5_000, (an_update(A, 1, "tea"),))
    shard.apply([an_entry(1, an_add(1)), Entry(2, 1, encode_write(early))])
    first, second = shard.history("acme", A)
    assert second.at == first.at


def test_the_digest_tells_apart_logs_that_differ_in_one_byte(tmp_path: Path) -> None:
    digests = set()
    for number, content in enumerate(["tea", "tee", "tea"]):
        shard = Shard.open(tmp_path / str(number), "s00", dim=DIM)
        shard.apply([an_entry(1, an_add(1, content))])
        digests.add(shard.digest())
        shard.close()
    assert len(digests) == 2


def test_a_missing_or_repeated_entry_is_refused(shard: Shard) -> None:
    one, two, three = batches(1, 3)
    shard.apply([one])
    for wrong in ([one], [three], [two, two], [two, three, two]):
        with pytest.raises(ValueError, match="missing or repeated"):
            shard.apply(wrong)
    shard.apply([two, three])
    assert shard.applied_index == 3


def test_after_a_failure_within_a_batch_the_shard_refuses_to_go_on(tmp_path: Path) -> None:
    """Half a batch is in its state: only a new start, from the checkpoint, can mend that."""

    class Failing:
        def apply(self, changes: object) -> None:
            raise MemoryError("no memory")

        def close(self) -> None:
            pass

    shard = Shard.open(tmp_path / "s00", "s00", dim=DIM, index_factory=lambda _: Failing())  # type: ignore[arg-type,return-value]
    with pytest.raises(MemoryError):
        shard.apply(batches(1, 1))
    with pytest.raises(Exception, match="failed earlier: no memory"):
        shard.apply(batches(2, 2))
    with pytest.raises(Exception, match="failed earlier"):
        shard.checkpoint()
    shard.close()
    again = Shard.open(tmp_path / "s00", "s00", dim=DIM)
    assert again.applied_index == 0
    again.close()


def test_a_page_that_looks_at_few_memories_can_be_continued(shard: Shard) -> None:
    shard.apply(batches(1, 5))
    found = []
    after = None
    looks = 0
    while True:
        page = shard.page(
            "acme",
            "user:ana",
            accept=lambda memory: memory.id.endswith("7"),
            after=after,
            limit=100,
            now_ms=0,
            scan_max=7,
        )
        looks += 1
        found += page.items
        after = page.after
        if after is None:
            break
    whole = shard.list("acme", None, accept=None, after=None, limit=100, now_ms=0)
    assert found == [stored for stored in whole if stored.id[-1] % 16 == 7]
    assert looks == 8


def test_a_scan_goes_on_while_entries_are_applied(shard: Shard) -> None:
    shard.apply(batches(1, 3))
    scan = shard.source.scan("acme", None)
    seen = [next(scan).id for _ in range(5)]
    shard.apply([an_entry(4, Delete(an_id(20), None), an_add(900))])
    job = shard.checkpoint()
    assert job is not None
    seen += [doc.id for doc in scan]
    assert seen == [an_id(n) for n in range(10, 40) if n != 20]
