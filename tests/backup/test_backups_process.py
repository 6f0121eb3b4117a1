"""Backups of real nodes: one moment, equal digests, and nothing half done whoever is killed."""

from __future__ import annotations

import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import agentmem_client as client
from agentmem_node.backup import catalog
from agentmem_node.backup.content import rows
from agentmem_node.backup.fetch import fetch_shard, plan
from agentmem_node.backup.objects import ObjectStore, open_store
from agentmem_node.backup.rows import FetchedShard
from agentmem_node.backup.verify import verify
from agentmem_node.cli.app import run
from agentmem_node.cli.asking import NodeUnreachable, OneNode
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.exits import CommandFailed, Exit
from agentmem_node.model.times import format_ms
from tests.backup.conftest import CREDENTIALS

pytestmark = pytest.mark.process

DIM = 8
SETTINGS = {
    "embedding.provider": "none",
    "embedding.dim": DIM,
    "cluster.shards": 4,
    "backup.archive_ms": 200,
}
AGENTMEM = [sys.executable, "-m", "agentmem_node.cli.main"]


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def agentmem(*arguments: str, url: str = "", code: int = Exit.OK) -> Any:
    """A command in this process: the JSON that it prints, or what it says when it fails."""
    command = [*arguments, "--json", *(["--url", url] if url else [])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ended = run(command)
    assert ended == code, err.getvalue() + out.getvalue()
    return json.loads(out.getvalue()) if code == Exit.OK else err.getvalue()


def work(node: OneNode, path: str, body: dict[str, Any]) -> dict[str, Any]:
    begun = node.ask("POST", path, body)

    def ended() -> Any:
        found = node.ask("GET", f"/backups/{begun['id']}")
        return found if found["state"] != "running" else None

    done = wait_for(ended)
    assert done["state"] == "done", done
    return dict(done["result"])


def vector(number: int) -> list[float]:
    chance = random.Random(number)
    return [chance.uniform(-1, 1) for _ in range(DIM)]


def fill(memory: client.Client, users: int, each: int) -> list[str]:
    items = [
        {
            "content": f"note {number} of user {user}: " + "tea and rain " * 30,
            "user_id": f"u{user}",
            "vector": vector(1_000 * user + number),
        }
        for user in range(users)
        for number in range(each)
    ]
    return [stored.id for stored in memory.add_many(items).memories]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, place: Path) -> Iterator[DevCluster]:
    settings = {**SETTINGS, "backup.archive": str(place / "store")}
    with DevCluster(
        tmp_path_factory.mktemp("cluster"), settings=settings, environment=CREDENTIALS
    ) as made:
        yield made


def test_a_backup_restores_one_owner_and_everything_with_equal_digests(
    cluster: DevCluster, place: Path, tmp_path: Path
) -> None:
    store = str(place / "store")
    node = OneNode(cluster.urls[0], None, None)
    with client.Client(cluster.urls) as memory:
        ids = fill(memory, 6, 20)
        memory.update(ids[0], content="Changed once.", metadata={"a": 1})
        memory.update(ids[0], content="Changed twice.")
        memory.delete(ids[1])
        first = agentmem("backup", "create", store, url=cluster.urls[1])["result"]
        assert first["memories"] == 119
        again = agentmem("backup", "create", store, url=cluster.urls[2])["result"]
        assert again["content"] == first["content"]
        assert [b["id"] for b in agentmem("backup", "list", store)] == [
            first["backup"],
            again["backup"],
        ]
        assert agentmem("backup", "verify", store)["good"]

        # One owner: what was lost and changed comes back, what others did stays.
        before = memory.get(ids[5])
        memory.update(ids[5], content="vandalised", vector=vector(1))
        memory.delete(ids[6])
        memory.update(ids[25], content="by another user")
        stray = memory.add("a stray", user_id="u0", vector=vector(2)).memories[0].id
        wish = {"url": store, "user_id": "u0"}
        would = work(node, "/backups/restore", wish | {"dry_run": True})
        assert (would["updated"], would["revived"], would["added"]) == (1, 1, 0)
        assert memory.get(ids[5]).content == "vandalised"
        done = work(node, "/backups/restore", wish)
        assert {k: done[k] for k in ("updated", "revived", "unchanged", "contested")} == {
            "updated": 1,
            "revived": 1,
            "unchanged": 18,
            "contested": 0,
        }
        assert memory.get(ids[5]).content == before.content
        assert memory.get(ids[5]).version == 3
        assert memory.get(ids[6]).version == 3
        found = memory.search(vector=vector(5), user_id="u0", top_k=1).results[0]
        assert found.id == ids[5]
        assert memory.get(ids[25]).content == "by another user"
        assert memory.get(stray).content == "a stray"
        assert work(node, "/backups/restore", wish)["unchanged"] == 20
        exact = work(node, "/backups/restore", wish | {"exact": True})
        assert exact["deleted"] == 1
        with pytest.raises(client.NotFound):
            memory.get(stray)

    # Everything, into a cluster of another size.
    settings = {**SETTINGS, "cluster.shards": 3}
    with DevCluster(tmp_path / "new", nodes=1, settings=settings) as new:
        restored = agentmem(
            "backup", "restore", store, "--everything", "--backup", first["backup"],
            url=new.urls[0],
        )["result"]  # fmt: skip
        assert restored["added"] == 119
        copy = agentmem("backup", "create", str(tmp_path / "copy"), url=new.urls[0])["result"]
        assert copy["content"] == first["content"] == restored["content"]
        with client.Client(new.urls) as memory:
            kept = memory.get(ids[0])
            assert (kept.content, kept.version) == ("Changed twice.", 3)
            assert [entry.event for entry in memory.history(ids[1])] == ["ADD", "DELETE"]
            found = memory.search(vector=vector(1_003), user_id="u1", top_k=1).results[0]
            assert found.id == ids[23]


def test_an_owner_goes_back_to_any_moment_by_the_archived_log(
    cluster: DevCluster, place: Path
) -> None:
    store = str(place / "store")
    node = OneNode(cluster.urls[0], None, None)
    user = {"user_id": "traveller"}
    with client.Client(cluster.urls) as memory:
        agentmem("backup", "create", store, url=cluster.urls[0])
        moments = []
        one = memory.add("state 0", **user).memories[0].id
        for state in range(1, 4):
            time.sleep(0.05)  # moments that differ, on a clock of milliseconds
            moments.append((format_ms(int(time.time() * 1000)), f"state {state - 1}"))
            time.sleep(0.05)
            memory.update(one, content=f"state {state}")
        last_ms = int(time.time() * 1000)

        # Whoever leads: the next leader goes on where the archive ends.
        cluster.kill(2)
        memory.add("while a node is down", **user)
        cluster.restart(2)
        cluster.wait_ready()
        wait_for(lambda: plan(open_store(store), until_ms=last_ms).faults == [])
        for at, content in [*moments[::-1], (format_ms(last_ms), "state 3")]:
            work(node, "/backups/restore", {"url": store, "at": at, **user})
            assert memory.get(one).content == content
        listed = node.ask("GET", "/backups", url=store)
        assert listed["archive"]["fault"] is None and listed["archive"]["gaps"] == []


def chains_of(store: ObjectStore, manifest: Any, folder: Path) -> dict[str, set[int]]:
    """chain -> numbers of its memories in a backup."""
    found: dict[str, set[int]] = {}
    for shard in manifest.shards:
        fetch_shard(store, manifest, shard.id, folder / manifest.id / shard.id)
        opened = FetchedShard(folder / manifest.id / shard.id, DIM)
        env = opened._store.env
        for row in rows(env.txn, env.db):
            assert row.live is not None or row.past
            if row.live is not None:
                content = json.loads(row.live.record)["content"]
                if content.startswith("chain "):
                    _, chain, number = content.split()
                    found.setdefault(chain, set()).add(int(number))
        opened.close()
    return found


def test_a_backup_never_holds_a_write_without_those_it_followed(
    cluster: DevCluster, tmp_path: Path
) -> None:
    """Each chain writes to another owner, and so mostly another shard, after every answer."""
    store = open_store(str(tmp_path / "store"))
    stop = threading.Event()
    written: dict[str, int] = {}
    failed: list[BaseException] = []

    def chain(name: str) -> None:
        number = 0
        try:
            with client.Client(cluster.urls) as memory:
                while not stop.is_set():
                    memory.add(f"chain {name} {number}", user_id=f"link-{name}-{number % 7}")
                    written[name] = number
                    number += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=chain, args=(f"c{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    try:
        node = OneNode(cluster.urls[0], None, None)
        made = []
        for _ in range(6):
            least = {name: written.get(name, -1) for name in (f"c{n}" for n in range(4))}
            made.append((least, work(node, "/backups", {"url": store.url})["backup"]))
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failed == []
    for least, backup_id in made:
        chains = chains_of(store, catalog.load(store, backup_id), tmp_path / "back")
        for name, numbers in chains.items():
            assert numbers == set(range(len(numbers))), f"{backup_id}: {name} has a hole"
        for name, number in least.items():
            assert number < 0 or number in chains[name], "it was acknowledged before the backup"
    assert sum(written.values()) > 50


def test_backups_in_a_bucket(cluster: DevCluster, s3_url: str) -> None:
    with client.Client(cluster.urls) as memory:
        one = memory.add("kept in a bucket", user_id="bucket").memories[0].id
        made = agentmem("backup", "create", s3_url, url=cluster.urls[0])["result"]
        memory.delete(one)
        agentmem("backup", "restore", s3_url, "--user", "bucket", url=cluster.urls[1])
        assert memory.get(one).content == "kept in a bucket"
    assert [b["id"] for b in agentmem("backup", "list", s3_url)] == [made["backup"]]
    assert agentmem("backup", "verify", s3_url)["good"]
    agentmem("backup", "prune", s3_url, "--keep", "1", "--yes")


def test_bad_input_is_told_clearly(cluster: DevCluster, tmp_path: Path) -> None:
    url = cluster.urls[0]
    assert "not absolute" in agentmem("backup", "create", "here", url=url, code=Exit.USAGE)
    refused = agentmem("backup", "create", url=url, code=Exit.USAGE)
    assert "backup.url" in refused
    (tmp_path / "file").write_bytes(b"")
    lost = str(tmp_path / "file" / "store")
    assert "could not be written" in agentmem(
        "backup", "create", lost, url=url, code=Exit.UNAVAILABLE
    )
    empty = str(tmp_path / "empty")
    for arguments, code, told in (
        (["--user", "ana"], Exit.NOT_FOUND, "no backup"),
        (["--user", "ana", "--backup", "nope"], Exit.NOT_FOUND, "no backup"),
        (["--user", "ana", "--agent", "b"], Exit.USAGE, "one owner"),
        (["--everything", "--tenant", "t"], Exit.USAGE, "everything"),
        (["--user", "ana", "--at", "soon"], Exit.USAGE, "at"),
        (["--user", "ana", "--at", "2999-01-01T00:00:00Z"], Exit.USAGE, "future"),
    ):
        assert told in agentmem("backup", "restore", empty, *arguments, url=url, code=code)
    assert agentmem("backup", "list", empty) == []
    with pytest.raises(CommandFailed, match="knows of no work"):
        OneNode(url, None, None).ask("GET", "/backups/nothing")


def test_whoever_is_killed_a_backup_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """The node that makes it, or one that uploads, is killed in the middle; then once more."""
    store = open_store(str(tmp_path / "store"))
    settings = {**SETTINGS, "backup.rate_bytes_per_s": 400_000}
    with DevCluster(tmp_path / "cluster", settings=settings) as cluster:
        with client.Client(cluster.urls) as memory:
            fill(memory, 8, 100)
        for victim in (1, 2):
            node = OneNode(cluster.urls[0], None, None)
            begun = node.ask("POST", "/backups", {"url": store.url})
            wait_for(lambda: len(list(store.list("chunks/"))) >= 2 * victim)  # noqa: B023
            cluster.kill(victim)
            assert catalog.listed(store) == []
            if victim != 1:

                def ended() -> bool:
                    try:
                        found = node.ask("GET", f"/backups/{begun['id']}")  # noqa: B023
                    except NodeUnreachable:
                        return False
                    return bool(found["state"] != "running")

                wait_for(ended, 90)
            # Where another member could stand in for the victim, it is there: whole.
            assert verify(store).is_good
            assert {item.manifest.content.memories for item in catalog.listed(store)} <= {800}
            cluster.restart(victim)
            cluster.wait_ready()
        done = work(OneNode(cluster.urls[2], None, None), "/backups", {"url": store.url})
        assert done["memories"] == 800
    assert verify(store).is_good
    assert done["backup"] in [item.id for item in catalog.listed(store)]


def test_a_restore_that_is_killed_is_run_again(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    with DevCluster(tmp_path / "old", nodes=1, settings=SETTINGS) as old:
        with client.Client(old.urls) as memory:
            ids = fill(memory, 10, 150)
            for one in ids[::10]:
                memory.update(one, metadata={"changed": True})
        made = agentmem("backup", "create", store, url=old.urls[0])["result"]
    with DevCluster(tmp_path / "new", nodes=1, settings={**SETTINGS, "cluster.shards": 2}) as new:
        node = OneNode(new.urls[0], None, None)
        node.ask("POST", "/backups/restore", {"url": store, "everything": True})
        with client.Client(new.urls) as memory:
            wait_for(lambda: memory.list_page(user_id="u1", limit=1).results)
        new.kill(1)
        new.restart(1)
        new.wait_ready()
        assert not (tmp_path / "new" / "n1" / "data" / "restore").exists()
        again = work(
            OneNode(new.urls[0], None, None), "/backups/restore", {"url": store, "everything": True}
        )
        assert again["contested"] == 0
        copy = agentmem("backup", "create", str(tmp_path / "copy"), url=new.urls[0])["result"]
        assert copy["content"] == made["content"]
        assert copy["memories"] == 1_500


def test_the_command_that_is_interrupted_leaves_the_work_to_the_node(
    cluster: DevCluster, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path / "store"))
    child = subprocess.Popen([*AGENTMEM, "backup", "create", store.url, "--url", cluster.urls[0]])
    wait_for(lambda: list(store.list("running/")) or list(store.list("backups/")))
    child.send_signal(signal.SIGKILL)
    child.wait(10)
    wait_for(lambda: catalog.listed(store))
    assert verify(store).is_good
