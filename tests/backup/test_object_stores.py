"""An object is there as a whole or not at all, in a directory as in a bucket."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from agentmem_node.backup.errors import BackupDestination, BackupMissing, BackupUnreachable
from agentmem_node.backup.objects import DirectoryStore, ObjectStore, open_store
from agentmem_node.backup.pipeline import AT_ONCE, in_order


def names(store: ObjectStore, prefix: str = "", after: str = "") -> list[str]:
    return [item.name for item in store.list(prefix, after)]


def test_what_was_put_is_read_back_listed_and_deleted(store: ObjectStore) -> None:
    assert names(store) == []
    store.put("a/one", b"1")
    store.put("a/one", b"one")
    store.put("b", b"")
    assert (store.get("a/one"), store.get("b")) == (b"one", b"")
    assert [(i.name, i.size_bytes) for i in store.list("")] == [("a/one", 3), ("b", 0)]
    assert store.exists("a/one") and not store.exists("a/two") and not store.exists("a")
    store.delete("a/one")
    store.delete("a/one")
    assert names(store) == ["b"]
    with pytest.raises(BackupMissing, match="a/one"):
        store.get("a/one")


def test_an_object_that_is_there_is_not_written_again(store: ObjectStore) -> None:
    assert store.put_if_absent("chunks/x", b"first")
    assert not store.put_if_absent("chunks/x", b"second")
    assert store.get("chunks/x") == b"first"


def test_names_are_listed_in_order_after_a_name_and_below_a_prefix(store: ObjectStore) -> None:
    given = ["a-b/1", "a/1", "a/2", "a/b/3", "a0", "b/1", "b/2"]
    for name in given:
        store.put(name, b".")
    assert names(store) == sorted(given)
    assert names(store, "a/") == ["a/1", "a/2", "a/b/3"]
    assert names(store, "a") == ["a-b/1", "a/1", "a/2", "a/b/3", "a0"]
    for after in [*given, "a/", "a/b/", "zz"]:
        assert names(store, "", after) == sorted(name for name in given if name > after)


def test_of_many_writers_of_one_object_exactly_one_is_first(store: ObjectStore) -> None:
    won = []

    def write(number: int) -> None:
        if store.put_if_absent("one", b"%d" % number * 10_000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(won) == 1
    assert store.get("one") == b"%d" % won[0] * 10_000


def test_what_a_killed_writer_leaves_in_a_directory_is_no_object_and_is_swept(
    tmp_path: Path,
) -> None:
    store = DirectoryStore(tmp_path)
    store.put("chunks/ab/x", b"whole")
    left = tmp_path / "chunks" / "ab" / ".unfinished-0123"
    left.write_bytes(b"ha")
    os.utime(left, (1_000, 1_000))
    assert names(store) == ["chunks/ab/x"]
    store.sweep(before_ms=2_000_000)
    assert not left.exists()
    assert names(store) == ["chunks/ab/x"]


def test_a_directory_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BackupUnreachable, match="could not be written"):
        DirectoryStore(tmp_path / "file" / "store").put("a", b"1")


def test_a_name_never_leads_out_of_the_store(tmp_path: Path) -> None:
    for name in ("../a", "a/../b", "/etc/passwd", "a//b", ".hidden", ""):
        with pytest.raises(ValueError, match="not the name"):
            DirectoryStore(tmp_path).put(name, b"1")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("backups", "not absolute"),
        ("ftp://host/x", "not supported"),
        ("file://host/x", "machine"),
        ("s3://", "BUCKET"),
        ("s3://key:secret@bucket/x", "without credentials"),
        ("s3://bucket/x?secret=1", "is none of endpoint, region"),
    ],
)
def test_a_url_that_names_no_place_is_refused(url: str, why: str) -> None:
    with pytest.raises(BackupDestination, match=why):
        open_store(url)


def test_a_bucket_that_does_not_exist_says_what_it_needs(s3_url: str) -> None:
    lost = open_store(s3_url.replace("s3://backups", "s3://no-such"))
    with pytest.raises(BackupUnreachable, match="NoSuchBucket") as told:
        lost.put("a", b"1")
    assert "AWS_ACCESS_KEY_ID" in told.value.hint


def test_transfers_at_once_keep_their_order_and_stop_at_the_first_that_fails() -> None:
    begun = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 20:
            raise OSError("the wire is cut")
        return number

    assert list(in_order(work, 20, "test")) == list(range(20))
    begun.clear()
    done = []
    with pytest.raises(OSError, match="cut"):
        for number in in_order(work, 1_000, "test"):
            done.append(number)
    assert done == list(range(20))
    assert len(begun) <= 20 + 2 * AT_ONCE
