"""The meta group moves like a shard: it grows, it outlives its voters, it is never a lone one's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from agentmem_cluster.errors import NotLeader, Unavailable
from tests.epochs.conftest import Cluster, run


def voters_of(cluster: Cluster) -> set[tuple[int, tuple[str, ...]]]:
    """What the nodes believe; one element when they agree."""
    found = set()
    for node in cluster.nodes.values():
        view = node._membership.view if node._membership else None
        if view is not None and view.meta is not None:
            found.add((view.meta.epoch, view.meta.members))
    return found


def test_the_meta_group_grows_to_five_and_outlives_two_founders(tmp_path: Path) -> None:
    async def scenario() -> None:
        names = ["n1", "n2", "n3", "n4", "n5"]
        cluster = Cluster(tmp_path, names, shards=2)
        await cluster.start("n1", "n2", "n3")
        try:
            for name in ("n4", "n5"):
                await cluster.admit(name)
                await cluster.start(name)
            await cluster.until(lambda: voters_of(cluster) == {(2, tuple(names))}, "five voters")
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            memory = await cluster.add("ana", "before")
            await cluster.stop("n1")
            await cluster.until(cluster.meta_leader, "a leader without n1")
            leader = cluster.meta_leader()
            assert leader is not None and leader._membership is not None
            view = leader._membership.view
            assert view is not None and set(view.nodes) == set(names)
            assert b"before" in bytes((await cluster.read(memory)).memory)
            await cluster.start("n1")
            await cluster.until(lambda: voters_of(cluster) == {(2, tuple(names))}, "n1 is back")
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_a_voter_that_lost_its_disk_votes_again_in_a_new_epoch(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        await cluster.start("n1", "n2", "n3")
        try:
            memory = await cluster.add("ana", "kept")
            await cluster.stop("n2")
            shutil.rmtree(tmp_path / "n2")
            await cluster.start("n2")
            members = ("n1", "n2", "n3")
            await cluster.until(lambda: voters_of(cluster) == {(2, members)}, "the next epoch")
            node = cluster.nodes["n2"]
            await cluster.until(lambda: "s00" in node._routing.local, "its shard is back")
            assert b"kept" in bytes((await cluster.read(memory, through=node)).memory)
            await cluster.stop()
            await cluster.start("n1", "n2", "n3")
            await cluster.until(cluster.meta_leader, "a leader after a restart")
            assert voters_of(cluster) == {(2, members)}
            assert b"kept" in bytes((await cluster.read(memory)).memory)
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_a_lost_disk_is_admitted_by_what_the_leader_knows_not_by_an_old_view(
    tmp_path: Path,
) -> None:
    """A voter that was cut off knows nothing of epochs in which the lost disk has voted."""

    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        await cluster.start("n1", "n2", "n3")
        try:
            n1 = cluster.nodes["n1"]._membership
            assert n1 is not None and n1.view is not None and n1._link is not None
            old = n1.view.to_wire()
            await cluster.stop("n2")
            shutil.rmtree(tmp_path / "n2")
            await cluster.start("n2")
            await cluster.until(
                lambda: "s00" in cluster.nodes["n2"]._routing.local and not n1.view.changes,  # type: ignore[union-attr]
                "n2 has its replica again",
            )
            await cluster.until(lambda: len(voters_of(cluster)) == 1, "the voters agree")
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            if n1.leads:
                assert n1._meta is not None
                await n1._meta.transfer("n3", deadline=cluster.nodes["n1"].clock.monotonic() + 5)
            epoch = cluster.nodes["n2"]._routing.local["s00"].info.epoch
            assert epoch > 1

            async def answer_as_if_cut_off(_peer: str, body: dict[str, Any]) -> Any:
                if body.get("fresh"):
                    raise NotLeader("This node does not lead the meta group.")
                return old

            await cluster.stop("n2")
            shutil.rmtree(tmp_path / "n2")
            n1._link.register("meta.view", answer_as_if_cut_off)
            await cluster.start("n2")
            replicas = cluster.nodes["n2"]._replicas
            assert replicas is not None and replicas._record.is_admitted
            assert replicas._record.closed["s00"] >= epoch, "its old self has voted there"
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_an_epoch_of_which_one_voter_alone_has_the_state_is_told_to_nobody_and_begins_in_the_end(
    tmp_path: Path,
) -> None:
    """As when everybody else who knows of the seal has gone down just then."""

    async def scenario() -> None:
        names = ["n1", "n2", "n3", "n4", "n5"]
        cluster = Cluster(tmp_path, names, shards=1)
        await cluster.start("n1", "n2", "n3")
        try:
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            leader = cluster.meta_leader()
            assert leader is not None and leader._membership is not None
            voters = leader._membership._voters
            link = voters._link
            assert link is not None
            refused: list[str] = []
            is_open = False
            call = link.call

            async def call_without_joins(peer: str, method: str, body: Any, **rest: Any) -> Any:
                if method == "meta.join" and not is_open:
                    refused.append(peer)
                    raise Unavailable("The link was cut.")
                return await call(peer, method, body, **rest)

            async def stand_still(_view: Any) -> None:
                return

            link.call = call_without_joins  # type: ignore[method-assign]
            for name in ("n1", "n2", "n3"):
                node = cluster.nodes[name]
                if node is not leader:
                    node._membership._voters.step = stand_still  # type: ignore[union-attr,method-assign]
            for name in ("n4", "n5"):
                await cluster.admit(name)
                await cluster.start(name)
            await cluster.until(lambda: len(refused) > 4, "it gives the state away again")
            assert voters.group is not None and voters.group.spec.epoch == 2
            assert {epoch for epoch, _ in voters_of(cluster)} == {1}
            is_open = True
            for node in cluster.nodes.values():
                vars(node._membership._voters).pop("step", None)  # type: ignore[union-attr]
            await cluster.until(lambda: voters_of(cluster) == {(2, tuple(names))}, "five voters")
            await cluster.until(cluster.meta_leader, "a leader of the five")
            await cluster.add("ana", "after")
        finally:
            await cluster.stop()

    run(scenario, 110)
