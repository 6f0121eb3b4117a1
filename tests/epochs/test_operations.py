"""What operators ask for, and what the cluster mends by itself, on real nodes."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from agentmem_cluster.errors import AgentMemError, BadRequest, Conflict, NotFound, Unavailable
from agentmem_node.model import operations as ops
from agentmem_node.model import requests as rq
from agentmem_node.service.stored_operations import StoredOperation, StoredStep
from tests.epochs.conftest import Cluster, run


async def finished(cluster: Cluster, operation: ops.Operation) -> ops.Operation:
    shown: list[ops.Operation] = []

    async def look() -> None:
        node = cluster.any_node()
        shown[:] = [o for o in await node.operations(cluster.caller(node)) if o.id == operation.id]

    for _ in range(600):
        await look()
        if shown and shown[0].state in ("done", "failed"):
            return shown[0]
        await asyncio.sleep(0.05)
    raise AssertionError(f"it did not end: {shown}")


async def begin(cluster: Cluster, **wish: object) -> ops.Operation:
    node = cluster.any_node()
    return await node.begin_operation(cluster.caller(node), ops.OperationWish(**wish))  # type: ignore[arg-type]


async def fill(cluster: Cluster, count: int = 60) -> dict[str, str]:
    return {
        await cluster.add(f"user{number}", f"memory {number}"): f"memory {number}"
        for number in range(count)
    }


async def all_there(cluster: Cluster, memories: dict[str, str]) -> None:
    for node in cluster.nodes.values():
        for memory_id, text in memories.items():
            assert text.encode() in bytes((await cluster.read(memory_id, through=node)).memory)


async def sound(cluster: Cluster) -> None:
    node = cluster.any_node()
    for _ in range(100):
        findings = await node.check_cluster(cluster.caller(node))
        wrong = [f for f in findings if not f.ok]
        if not wrong:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(wrong)


def test_a_node_joins_takes_its_share_and_is_emptied_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], shards=4)
        await cluster.start("n1", "n2", "n3")
        try:
            memories = await fill(cluster)
            await cluster.admit("n4")
            node = cluster.any_node()
            wish = ops.OperationWish(kind="rebalance")
            plan = await node.plan(cluster.caller(node), wish)
            # It was let in and cannot be given anything yet: an even cluster looks otherwise.
            assert not plan.steps and plan.warnings == ["Not connected: n4."]
            await cluster.start("n4")
            await cluster.until(lambda: node._membership.is_connected("n4"), "n4 is connected")
            plan = await node.plan(cluster.caller(node), wish)
            assert plan.steps and plan.bytes > 0 and not plan.warnings
            done = await finished(cluster, await begin(cluster, kind="rebalance"))
            assert done.state == "done", done
            assert len(cluster.nodes["n4"]._routing.local) == len(plan.steps) >= 2
            await all_there(cluster, memories)
            await sound(cluster)
            done = await finished(cluster, await begin(cluster, kind="remove", node="n4"))
            assert done.state == "done", done
            await cluster.until(lambda: not cluster.nodes["n4"]._routing.local, "n4 is empty")
            await cluster.stop("n4")
            await all_there(cluster, memories)
            await sound(cluster)
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_a_node_that_lost_its_disk_is_given_its_replicas_again_without_anybody_asking(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], founders=4, shards=2)
        await cluster.start("n1", "n2", "n3", "n4")
        try:
            memories = await fill(cluster)
            victim = next(
                n for n, node in cluster.nodes.items() if n == "n4" and node._routing.local
            )
            await cluster.stop(victim)
            shutil.rmtree(tmp_path / victim)
            memories |= await fill(cluster, 20)
            await cluster.start(victim)
            node = cluster.nodes[victim]
            held = [
                s.id
                for s in cluster.any_node()._routing.current_map().shards.values()
                if victim in s.members
            ]
            assert held
            await cluster.until(
                lambda: all(
                    shard in node._routing.local and node._routing.local[shard].info.epoch > 1
                    for shard in held
                ),
                "its replicas come back, in another epoch",
            )
            await all_there(cluster, memories)
            await sound(cluster)
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_replicas_of_a_node_that_stays_lost_are_founded_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], founders=4, shards=4)
        cluster.overrides["cluster.lost_after_ms"] = 1_000
        await cluster.start("n1", "n2", "n3", "n4")
        try:
            memories = await fill(cluster)
            await cluster.stop("n4")
            await cluster.until(
                lambda: (
                    not any(
                        "n4" in info.members
                        for info in cluster.any_node()._routing.current_map().shards.values()
                    )
                    and not cluster.any_node()._membership.view.changes
                ),  # type: ignore[union-attr]
                "no shard has n4 as a member",
            )
            await all_there(cluster, memories)
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_an_operation_that_is_asked_for_twice_under_one_request_id_begins_once(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3", "n4"], founders=4, shards=2)
        await cluster.start("n1", "n2", "n3", "n4")
        try:
            asked = []
            for node in (cluster.nodes["n1"], cluster.nodes["n3"]):
                caller = cluster.caller(node, b"the same request")
                wish = ops.OperationWish(kind="drain", node="n4")
                asked.append((await node.begin_operation(caller, wish)).id)
            assert asked[0] == asked[1]
            assert len(await node.operations(caller)) == 1
            other = cluster.caller(node, b"another request.")
            with pytest.raises(Conflict, match=asked[0]):
                await node.begin_operation(other, ops.OperationWish(kind="undrain", node="n4"))
        finally:
            await cluster.stop()

    run(scenario)


@pytest.mark.parametrize(
    ("wish", "error", "says"),
    [
        ({"kind": "move", "shard": "s99", "node": "n1"}, NotFound, "no shard 's99'"),
        ({"kind": "move", "shard": "s00", "node": "n9"}, NotFound, "no node 'n9'"),
        ({"kind": "move", "shard": "s00", "node": "n1"}, BadRequest, "is on node n1 already"),
        ({"kind": "drain", "node": "n1"}, BadRequest, "that many nodes must be up"),
        ({"kind": "remove", "node": "n1"}, BadRequest, "that many nodes must be up"),
        ({"kind": "move"}, BadRequest, "`shard` is missing"),
        ({"kind": "heal"}, BadRequest, "heals by itself"),
        ({"kind": "split", "shard": "s00", "at_slot": 9_000}, BadRequest, "cannot be split at"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_and_changes_nothing(
    tmp_path: Path, wish: dict[str, object], error: type[AgentMemError], says: str
) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"])
        await cluster.start("n1", "n2", "n3")
        try:
            with pytest.raises(error, match=says):
                await begin(cluster, **wish)
            view = cluster.any_node()._membership.view  # type: ignore[union-attr]
            assert view is not None and not view.operations and not view.states
            with pytest.raises((NotFound, Conflict)):
                node = cluster.any_node()
                await node.control_operation(cluster.caller(node), "nothing", "stop")
        finally:
            await cluster.stop()

    run(scenario)


def test_a_split_leaves_each_memory_in_one_half_and_writes_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        await cluster.start("n1", "n2", "n3")
        try:
            memories = await fill(cluster, 80)
            stop = asyncio.Event()
            chance = random.Random(8)

            async def write() -> None:
                number = 1_000
                while not stop.is_set():
                    text = f"memory {number}"
                    memories[await cluster.add(f"user{number}", text)] = text
                    number += 1
                    gone = chance.choice(list(memories))  # of either half, however old
                    await cluster.delete(gone)
                    del memories[gone]
                    await asyncio.sleep(0.01)

            writing = asyncio.create_task(write())
            done = await finished(cluster, await begin(cluster, kind="split", shard="s00"))
            assert done.state == "done", done
            stop.set()
            await writing
            node = cluster.any_node()
            assert set(node._routing.current_map().shards) == {"s00", "s01"}
            await all_there(cluster, memories)
            counts = [local.shard.count() for local in node._routing.local.values()]
            assert sum(counts) == len(memories) and all(counts)
            await sound(cluster)
            # The same request again, after the split: answered, not done twice.
            request = b"r" * 16
            items = [rq.AddRequest(content=f"x{n}", user_id=f"owner{n}") for n in range(20)]
            first = await node.add(cluster.caller(node, request), items)
            done = await finished(cluster, await begin(cluster, kind="split", shard="s01"))
            assert done.state == "done", done
            again = await node.add(cluster.caller(node, request), items)
            assert [item.id for item in again.results] == [item.id for item in first.results]
        finally:
            await cluster.stop()

    run(scenario, 110)


def test_a_step_that_was_begun_but_not_noted_is_not_taken_for_given_up(tmp_path: Path) -> None:
    """It keeps the members, so that its epoch alone says whether it was reached."""

    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        await cluster.start("n1", "n2", "n3")
        try:
            await cluster.until(cluster.meta_leader, "a leader of the meta group")
            leader = cluster.meta_leader()
            assert leader is not None
            operations = leader._operations
            assert operations is not None
            keep, lost = operations._keep, []

            async def keep_all_but_one(stored: StoredOperation) -> None:
                if stored.begun and not lost:
                    lost.append(stored.id)
                    raise Unavailable("The leader went away.")
                await keep(stored)

            operations._keep = keep_all_but_one  # type: ignore[method-assign]
            view = leader._membership.view  # type: ignore[union-attr]
            assert view is not None
            info = view.map.shards["s00"]
            repaired = next(m for m in info.members if m != info.preferred_leader)
            step = StoredStep(
                shard="s00",
                members=list(info.members),
                preferred=info.preferred_leader,
                reason="a test",
                fresh=[repaired],
            )
            heal = ops.OperationWish(kind="heal")
            begun = await operations.store_new(heal, [step], "somebody")
            done = await finished(cluster, begun)
            assert lost and done.state == "done", done
            assert cluster.nodes["n1"]._routing.local["s00"].info.epoch == 2, "once"
        finally:
            await cluster.stop()

    run(scenario)


def test_an_operation_is_not_said_to_be_none_before_the_leader_was_asked(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = Cluster(tmp_path, ["n1", "n2", "n3"], shards=1)
        await cluster.start("n1", "n2", "n3")
        try:
            leader = cluster.meta_leader()
            others = [node for node in cluster.nodes.values() if node is not leader]
            for node in others:
                with pytest.raises(NotFound):
                    await node.operation(cluster.caller(node), "move-1")
            begun = await begin(cluster, kind="rebalance")
            for node in cluster.nodes.values():
                assert (await node.operation(cluster.caller(node), begun.id)).id == begun.id
            await cluster.stop(*(name for name, n in cluster.nodes.items() if n is not others[0]))
            with pytest.raises(Unavailable):
                await others[0].operation(cluster.caller(others[0]), "move-1")
        finally:
            await cluster.stop()

    run(scenario)
