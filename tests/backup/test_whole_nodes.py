"""Backups and the archived log on whole nodes in one loop, while leaders change and logs shrink."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from agentmem_cluster.errors import AgentMemError, Conflict
from agentmem_node.backup import catalog
from agentmem_node.backup.archive import Archive
from agentmem_node.backup.content import content_of
from agentmem_node.backup.errors import BackupUnreachable
from agentmem_node.backup.fetch import fetch_shard, plan
from agentmem_node.backup.objects import open_store
from agentmem_node.backup.verify import verify
from agentmem_node.model.backups import BackupWork, CreateBackup, RestoreBackup
from agentmem_node.model.operations import OperationWish
from agentmem_node.model.requests import ListQuery
from agentmem_node.model.times import format_ms
from agentmem_node.service.backup_parts import BackupParts
from agentmem_node.service.node import Node
from tests.epochs.conftest import Cluster, run
from tests.epochs.test_moving_a_shard import move
from tests.epochs.test_operations import finished, sound

SHARD = "s00"
USERS = [f"user{number}" for number in range(12)]


def parts(node: Node) -> BackupParts:
    assert node._backup_parts is not None
    return node._backup_parts


def leader(cluster: Cluster, shard: str = SHARD) -> Node | None:
    for node in cluster.nodes.values():
        local = node._routing.local.get(shard)
        if local is not None and local.group.is_leader and local.machine.accepts:
            return node
    return None


async def lead(cluster: Cluster, shard: str = SHARD) -> Node:
    await cluster.until(lambda: leader(cluster, shard), f"a leader of {shard}")
    found = leader(cluster, shard)
    assert found is not None
    return found


async def hand_over(cluster: Cluster, node: Node, shard: str = SHARD) -> Node:
    """To another node, which is returned."""
    other = next(n for n in cluster.nodes.values() if n is not node)
    local = node._routing.local[shard]
    await local.group.transfer(other.node_id, deadline=node.clock.monotonic() + 10)
    return await lead(cluster, shard)


async def back_up(cluster: Cluster, node: Node, url: str) -> BackupWork:
    work = await node.backups.create(cluster.caller(node), CreateBackup(url=url))
    await cluster.until(lambda: work.state != "running", "the backup")
    return work


def test_a_cut_whose_leader_was_replaced_is_not_taken_for_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"])
        await cluster.start("n1", "n2", "n3")
        old = await lead(cluster)
        cuts = parts(old)._cuts
        epoch = old._routing.local[SHARD].info.epoch
        body = {"backup": "b", "shards": [[SHARD, epoch]], "lease_ms": 5_000, "left_ms": 5_000}
        assert (await cuts.on_cut("", body))[SHARD][1] > 0
        new = await hand_over(cluster, old)
        assert new is not old
        with pytest.raises(AgentMemError):
            await cuts.on_release("", {"backup": "b", "shards": [SHARD], "left_ms": 2_000})
        await cuts.on_drop("", {"backup": "b"})
        # Nor is one whose lease has ended before all shards stood still.
        newer = parts(new)._cuts
        await newer.on_cut("", body | {"lease_ms": 20})
        hold = new._routing.local[SHARD].hold
        await cluster.until(lambda: not hold.is_held_by("b"), "the end of the lease")
        with pytest.raises(Conflict, match="held up too long"):
            await newer.on_release("", {"backup": "b", "shards": [SHARD], "left_ms": 2_000})
        await newer.on_drop("", {"backup": "b"})
        # The whole succeeds, and writes go on.
        work = await back_up(cluster, old, str(tmp_path / "store"))
        assert work.state == "done", work.error
        await cluster.add("ana", "tea")
        await cluster.stop()

    run(scenario)


def test_backups_succeed_while_leaders_change_and_users_write(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"])
        cluster.overrides = {"backup.hold_ms_max": 300}
        await cluster.start("n1", "n2", "n3")
        store = open_store(str(tmp_path / "store"))
        stop = asyncio.Event()
        order: list[str] = []

        async def write() -> None:
            while not stop.is_set():
                number = len(order)
                order.append(await cluster.add(f"user{number % 9}", f"note {number}"))

        async def change() -> None:
            while not stop.is_set():
                await hand_over(cluster, await lead(cluster))
                await asyncio.sleep(0.3)

        busy = [asyncio.ensure_future(write()), asyncio.ensure_future(change())]
        for number in range(5):
            before = len(order)
            work = await back_up(cluster, list(cluster.nodes.values())[number % 3], store.url)
            assert work.state == "done", work.error
            manifest = catalog.load(store, work.id)
            # One writer: what a backup holds is a beginning of what it wrote.
            assert before <= manifest.content.memories <= len(order) + 1
            for shard in manifest.shards:
                fetch_shard(store, manifest, shard.id, tmp_path / "back" / work.id / shard.id)
        stop.set()
        await asyncio.gather(*busy)
        assert verify(store).is_good
        await cluster.stop()

    run(scenario)


def test_the_archive_goes_on_under_the_next_leader_without_a_gap(tmp_path: Path) -> None:
    async def scenario() -> None:
        url = str(tmp_path / "store")
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        cluster.overrides = {"backup.archive": url, "backup.archive_ms": 100}
        await cluster.start("n1", "n2", "n3")
        store = open_store(url)
        work = await back_up(cluster, cluster.any_node(), url)
        assert work.state == "done", work.error
        manifest = catalog.load(store, work.id)
        archive = Archive(store, manifest.cluster_id)
        node = await lead(cluster)
        for turn in range(4):
            for number in range(5):
                await cluster.add("ana", f"{turn} {number}", through=node)
            node = await hand_over(cluster, node)
        local = node._routing.local[SHARD]

        def archived() -> bool:
            return bool(archive.segments(SHARD)) and (
                archive.segments(SHARD)[-1].last >= local.group.status().applied_index
            )

        await cluster.until(archived, "the archive to be complete")
        assert archive.gaps(SHARD) == []
        now_ms = node.clock.wall_ms()
        await cluster.until(lambda: not plan(store, until_ms=now_ms).faults, "the moment")
        fetched = fetch_shard(
            store, manifest, SHARD, tmp_path / "back", until_ms=now_ms, map_bytes=1 << 28
        )
        # Not the rolling digest: a leader may have begun a term since, which is an entry too.
        env = local.shard._store.env
        assert fetched.content == content_of(env.txn, env.db)
        assert fetched.content.memories == 20
        assert verify(store).is_good
        await cluster.stop()

    run(scenario)


def test_a_log_that_was_thrown_away_before_it_was_archived_is_a_gap_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        url = str(tmp_path / "store")
        cluster = Cluster(tmp_path, ["n1"], founders=1, shards=1)
        cluster.overrides = {"backup.archive": url, "backup.archive_ms": 100}
        await cluster.start("n1")
        node = await lead(cluster)
        archiver = parts(node)._archiver
        assert archiver is not None
        local = node._routing.local[SHARD]
        await cluster.add("ana", "one")
        archive = Archive(open_store(url), node._membership.require_view().cluster_id)  # type: ignore[union-attr]
        await cluster.until(
            lambda: (
                archive.segments(SHARD)
                and archive.segments(SHARD)[-1].last == local.group.status().applied_index
            ),
            "the first entries to be archived",
        )
        # The place goes away for longer than the journal waits.
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_bytes(b"")
        await cluster.add("ana", "two")
        await cluster.until(lambda: archiver.fault is not None, "the fault")
        first = local.group.status().applied_index
        local.group.checkpoint_soon()
        await cluster.until(lambda: local.group.status().durable_index >= first, "a checkpoint")
        node._host.core._groups[SHARD].log.compact_to(first)  # type: ignore[union-attr]
        (tmp_path / "store").unlink()
        (tmp_path / "away").rename(tmp_path / "store")
        await cluster.add("ana", "three")
        await cluster.until(lambda: archiver.gaps and archiver.fault is None, "the gap")
        status = archiver.status()
        assert status["gaps"] == [f"{SHARD}: entries {first} to {first}"]
        assert "cannot be restored" in caplog.text
        await cluster.until(lambda: archive.gaps(SHARD), "what follows the gap")
        work = await back_up(cluster, node, url)
        assert work.state == "done"
        # The backup ends it: what is needed from there on is whole.
        index = catalog.load(open_store(url), work.id).shards[0].applied_index
        await cluster.add("ana", "four")
        last = local.group.status().applied_index
        await cluster.until(lambda: archive.segments(SHARD)[-1].last >= last, "the last entry")
        assert archive.gaps(SHARD, index) == []
        await cluster.stop()

    run(scenario)


def test_a_directory_that_a_node_does_not_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"])
        await cluster.start("n1", "n2", "n3")
        await lead(cluster)
        node = cluster.nodes["n1"]
        others = [cluster.nodes["n2"], cluster.nodes["n3"]]

        async def blind(_peer: str, _body: object) -> bool:
            return False  # what a node says whose disk is its own

        for other in others:
            assert other._link is not None
            other._link.register("backup.probe", blind)
        url = str(tmp_path / "store")
        work = await back_up(cluster, node, url)
        assert work.state == "failed" and work.error is not None
        assert work.error.code == BackupUnreachable.code
        assert "does not see" in work.error.detail
        assert [item.name for item in open_store(url).list("")] == []
        await cluster.stop()

    run(scenario)


def test_backups_and_the_archive_follow_a_shard_that_moves(tmp_path: Path) -> None:
    """A backup whose shard leaves in the middle is there whole or not at all; the log goes on in
    the next epoch, and one backup and the log of three epochs make the present."""

    async def scenario() -> None:
        url = str(tmp_path / "store")
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], shards=1)
        cluster.overrides = {"backup.archive": url, "backup.archive_ms": 100}
        await cluster.start("n1", "n2", "n3")
        await cluster.admit("n4")
        await cluster.start("n4")
        store = open_store(url)
        first = await back_up(cluster, cluster.any_node(), url)
        assert first.state == "done", first.error
        stop = asyncio.Event()
        written: list[str] = []
        made: list[BackupWork] = []

        async def write() -> None:
            while not stop.is_set():
                number = len(written)
                written.append(await cluster.add(f"user{number % 5}", f"note {number}"))

        async def keep_backing_up() -> None:
            while not stop.is_set():
                before = len(written)
                work = await back_up(cluster, cluster.any_node(), url)
                made.append(work)
                if work.state == "done":
                    assert work.result is not None
                    assert before <= work.result["memories"] <= len(written) + 1

        busy = [asyncio.ensure_future(write()), asyncio.ensure_future(keep_backing_up())]
        for members in (["n4", "n2", "n3"], ["n1", "n4", "n2"]):
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            conductor = cluster.meta_leader()
            assert conductor is not None
            change = move(cluster, SHARD, members)
            assert await conductor.changes.begin(change) == ""
            await cluster.until(
                lambda c=change: all(
                    n._routing.map is not None
                    and n._routing.map.shards[SHARD].epoch == c.to_epoch
                    and n._membership is not None
                    and n._membership.view is not None
                    and not n._membership.view.changes
                    for n in cluster.nodes.values()
                ),
                f"epoch {change.to_epoch}",
            )
        stop.set()
        await asyncio.gather(*busy)
        kept = {item.id for item in catalog.listed(store)}
        assert kept == {first.id} | {work.id for work in made if work.state == "done"}
        last = await back_up(cluster, cluster.any_node(), url)
        assert last.state == "done", last.error
        node = await lead(cluster)
        now_ms = node.clock.wall_ms()
        archive = Archive(store, catalog.load(store, first.id).cluster_id)
        await cluster.until(
            lambda: not plan(store, until_ms=now_ms).faults and not archive.gaps(SHARD),
            "the moment",
        )
        found = plan(store, backup_id=first.id, until_ms=now_ms)
        fetched = fetch_shard(
            store, found.manifest, SHARD, tmp_path / "back", until_ms=now_ms, map_bytes=1 << 28
        )
        assert fetched.content == catalog.load(store, last.id).content
        assert fetched.content.memories == len(written)
        assert archive.segments(SHARD)[-1].epoch == 3
        assert verify(store).is_good
        await cluster.stop()

    run(scenario, 110)


def test_a_moment_after_a_split_is_restored_from_a_backup_of_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        url = str(tmp_path / "store")
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        cluster.overrides = {"backup.archive": url, "backup.archive_ms": 100}
        await cluster.start("n1", "n2", "n3")
        store = open_store(url)
        kept = {user: [await cluster.add(user, f"{user} before")] for user in USERS}
        first = await back_up(cluster, cluster.any_node(), url)
        assert first.state == "done", first.error

        node = cluster.any_node()
        wish = OperationWish(kind="split", shard=SHARD)
        operation = await node.begin_operation(cluster.caller(node), wish)
        await cluster.until(
            lambda: all(
                n._routing.map is not None
                and set(n._routing.map.shards) == {"s00", "s01"}
                and n._membership is not None
                and n._membership.view is not None
                and not n._membership.view.changes
                for n in cluster.nodes.values()
            ),
            f"the end of {operation.id}",
        )
        for user in USERS:
            kept[user].append(await cluster.add(user, f"{user} after"))
        moment_ms = node.clock.wall_ms()
        await asyncio.sleep(0.01)
        for ids in kept.values():
            for memory_id in ids:
                await cluster.delete(memory_id)
        await cluster.until(lambda: not plan(store, until_ms=moment_ms).faults, "the moment")
        found = plan(store, until_ms=moment_ms)
        assert [shard.id for shard in found.shards] == ["s00", "s01"]
        assert found.manifest.id == first.id

        for user in USERS[:2]:
            asked = RestoreBackup(url=url, at=format_ms(moment_ms), user_id=user)
            work = await node.backups.restore(cluster.caller(node), asked)
            await cluster.until(lambda w=work: w.state != "running", "the restore")
            assert work.state == "done", work.error
            assert work.result is not None and work.result["revived"] == len(kept[user])
            for memory_id in kept[user]:
                await cluster.read(memory_id)
        everything = RestoreBackup(url=url, at=format_ms(moment_ms))
        work = await node.backups.restore(cluster.caller(node), everything)
        await cluster.until(lambda: work.state != "running", "the restore")
        assert work.result is not None
        assert work.result["revived"] == sum(len(kept[user]) for user in USERS[2:])
        await cluster.stop()

    run(scenario, 110)


@pytest.mark.parametrize("to_a_moment", [False, True])
def test_moments_before_and_after_a_rewind_are_restored_from_a_backup_of_before(
    tmp_path: Path, to_a_moment: bool
) -> None:
    async def scenario() -> None:
        url = str(tmp_path / "store")
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=2)
        cluster.overrides = {"backup.archive": url, "backup.archive_ms": 100}
        await cluster.start("n1", "n2", "n3")
        store = open_store(url)
        node = cluster.any_node()
        before = [await cluster.add(user, f"{user} before") for user in USERS]
        first = await back_up(cluster, node, url)
        assert first.state == "done", first.error
        undone = [await cluster.add(user, f"{user} undone") for user in USERS]
        before_ms = node.clock.wall_ms()
        await asyncio.sleep(0.01)
        await cluster.until(lambda: not plan(store, until_ms=before_ms).faults, "that moment")
        # To a moment since when nothing was written: then nothing in the log says where it ends.
        at = format_ms(before_ms) if to_a_moment else None
        wish = OperationWish(kind="rewind", url=url, at=at)
        done = await finished(cluster, await node.begin_operation(cluster.caller(node), wish))
        assert done.state == "done", done
        after = [await cluster.add(user, f"{user} after") for user in USERS]
        after_ms = node.clock.wall_ms()
        await asyncio.sleep(0.01)
        for memory_id in (*before, *after):
            await cluster.delete(memory_id)
        await sound(cluster)  # the digests of all replicas, too
        await cluster.until(lambda: not plan(store, until_ms=after_ms).faults, "the moment")
        kept = before + undone if to_a_moment else before
        for until_ms, ids in ((before_ms, before + undone), (after_ms, kept + after)):
            found = plan(store, until_ms=until_ms)
            assert (found.faults, found.manifest.id) == ([], first.id)
            assert not any(shard.gaps for shard in found.shards)
            work = await node.backups.restore(
                cluster.caller(node), RestoreBackup(url=url, at=format_ms(until_ms), exact=True)
            )
            await cluster.until(lambda w=work: w.state != "running", "the restore")
            assert work.state == "done", work.error
            listed = await node.list(cluster.caller(node), ListQuery(limit=100))
            found_ids = {msgspec.json.decode(item)["id"] for item in listed.results}
            assert found_ids == set(ids)
        checked = verify(store)
        assert checked.is_good and not checked.gaps
        await cluster.stop()

    run(scenario, 110)
