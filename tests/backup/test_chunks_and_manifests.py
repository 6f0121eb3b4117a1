"""What is read from a store is what was written, or it is refused."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem_node.backup import chunks
from agentmem_node.backup import manifest as mf
from agentmem_node.backup.chunks import Chunks, chunk_name, hash_of
from agentmem_node.backup.content import Content, ContentDigest, Row, total
from agentmem_node.backup.errors import BackupDamaged, BackupMissing
from agentmem_node.backup.objects import ObjectStore, open_store
from agentmem_node.storage.layout import DocRow
from agentmem_node.storage.store import HistoryRow
from tests.backup.making import START_MS, SmallCluster, add

plain = st.one_of(
    st.binary(max_size=3_000), st.binary(min_size=1, max_size=20).map(lambda part: part * 500)
)


@given(plain)
def test_a_chunk_comes_back_as_it_was(data: bytes) -> None:
    packed = chunks.pack(data)
    assert chunks.unpack("x", packed, hash_of(data)) == data
    assert len(packed) <= len(data) + 13


@given(plain, st.data())
def test_a_chunk_with_a_flipped_bit_or_a_missing_end_is_refused(
    data: bytes, draw: st.DataObject
) -> None:
    packed = bytearray(chunks.pack(data))
    if draw.draw(st.booleans(), "flip"):
        at = draw.draw(st.integers(0, 8 * len(packed) - 1), "bit")
        packed[at // 8] ^= 1 << at % 8
    else:
        del packed[draw.draw(st.integers(0, len(packed) - 1), "length") :]
    with pytest.raises(BackupDamaged):
        chunks.unpack("x", bytes(packed), hash_of(data))


def test_a_chunk_that_unpacks_to_far_more_is_refused_without_unpacking_it() -> None:
    packed = zlib.compress(bytes(1 << 28), 9)
    bomb = b"AMC1\x01" + hashlib.blake2b(packed, digest_size=8).digest() + packed
    with pytest.raises(BackupDamaged, match="cut short, or too long"):
        chunks.unpack("x", bomb, bytes(32))


def test_the_same_bytes_are_uploaded_once(store: ObjectStore) -> None:
    kept = Chunks(store)
    digest, sent = kept.put(b"tea" * 1_000)
    assert sent > 0
    assert kept.put(b"tea" * 1_000) == (digest, 0)
    assert kept.put(b"tea" * 1_000, replace=True) == (digest, sent)
    assert kept.get(digest) == b"tea" * 1_000
    with pytest.raises(BackupMissing):
        kept.get(bytes(32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    path = tmp_path_factory.mktemp("manifests")
    cluster = SmallCluster(path / "shards")
    cluster.write(add(1), at_ms=START_MS)
    store = open_store(str(path / "store"))
    manifest = cluster.backup(store, START_MS + 5)
    cluster.close()
    name = mf.manifest_name(manifest.id)
    return name, store.get(name)


def test_a_manifest_comes_back_as_it_was(made: tuple[str, bytes]) -> None:
    name, data = made
    manifest = mf.decode(name, data)
    assert mf.encode(manifest) == data
    assert manifest.shard_map.shards.keys() == {shard.id for shard in manifest.shards}
    assert manifest.content.memories == 1


@settings(max_examples=300)
@given(st.data())
def test_a_manifest_with_any_flipped_bit_or_missing_end_is_refused(
    made: tuple[str, bytes], draw: st.DataObject
) -> None:
    name, data = made
    wrong = bytearray(data)
    if draw.draw(st.booleans(), "flip"):
        at = draw.draw(st.integers(0, 8 * len(data) - 1), "bit")
        wrong[at // 8] ^= 1 << at % 8
    else:
        del wrong[draw.draw(st.integers(0, len(data) - 1), "length") :]
    with pytest.raises(BackupDamaged):
        mf.decode(name, bytes(wrong))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shards": []}, "shard map"),
        ({"map": {"format": 1, "version": 1, "shards": []}}, "no shard has"),
        ({"id": "20260101T000000Z-ffffff"}, "is the manifest of"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(
    made: tuple[str, bytes], change: dict[str, object], why: str
) -> None:
    name, data = made
    wrong = mf.encode(msgspec.structs.replace(mf.decode(name, data), **change))
    with pytest.raises(BackupDamaged, match=why):
        mf.decode(name, wrong)


def test_a_manifest_of_another_format_is_told_apart_from_a_damaged_one() -> None:
    with pytest.raises(BackupDamaged, match="format 2; this version reads 1"):
        mf.decode("backups/x.json", b'{"agentmem_backup":2,"blake2b":"","size_bytes":0}\n')


rows = st.lists(
    st.builds(
        Row,
        tenant=st.sampled_from(["acme", "acme/one", "b"]),
        id=st.binary(min_size=16, max_size=16),
        deleted_version=st.integers(0, 5),
        live=st.none()
        | st.builds(
            DocRow,
            id=st.binary(min_size=16, max_size=16),
            tenant=st.integers(1, 9),
            scope=st.integers(1, 9),
            version=st.integers(1, 9),
            created_ms=st.integers(0, 99),
            updated_ms=st.integers(0, 99),
            expires_ms=st.none() | st.integers(0, 99),
            record=st.binary(max_size=9),
        ),
        vector=st.none() | st.binary(max_size=8),
        past=st.lists(
            st.builds(
                HistoryRow, st.integers(1, 9), st.integers(0, 9), st.integers(0, 2), st.binary()
            ),
            max_size=2,
        ),
    ),
    max_size=8,
)


def digest_of(some: list[Row]) -> Content:
    digest = ContentDigest()
    for row in some:
        digest.add(row)
    return digest.result()


@given(rows, st.randoms(use_true_random=False), st.integers(0, 8))
def test_the_content_digest_knows_neither_order_nor_shards(
    some: list[Row], chance: object, cut: int
) -> None:
    mixed = list(some)
    chance.shuffle(mixed)  # type: ignore[attr-defined]
    assert digest_of(mixed) == digest_of(some)
    assert total([digest_of(mixed[:cut]), digest_of(mixed[cut:])]) == digest_of(some)


@given(rows.filter(bool), st.data())
def test_the_content_digest_sees_every_row_and_field(some: list[Row], draw: st.DataObject) -> None:
    at = draw.draw(st.integers(0, len(some) - 1))
    row = some[at]
    other = row._replace(tenant=row.tenant + "x")
    if row.live is not None:
        name = draw.draw(st.sampled_from(["version", "created_ms", "updated_ms", "record"]))
        value = getattr(row.live, name)
        changed = value + b"." if isinstance(value, bytes) else value + 1
        other = row._replace(live=row.live._replace(**{name: changed}))
    assert digest_of([*some[:at], other, *some[at + 1 :]]) != digest_of(some)
    assert digest_of([*some[:at], *some[at + 1 :]]) != digest_of(some)


def test_a_chunks_name_leads_to_it() -> None:
    digest = hash_of(b"tea")
    assert chunk_name(digest) == f"chunks/{digest.hex()[:2]}/{digest.hex()}"


def test_names_of_backups_sort_by_time(tmp_path: Path) -> None:
    from agentmem_node.backup.catalog import new_id

    ids = [new_id(START_MS + second * 1000, b"\xff\0\1") for second in range(3)]
    assert ids == sorted(ids)
    assert [mf.id_of(mf.manifest_name(one)) for one in ids] == ids
