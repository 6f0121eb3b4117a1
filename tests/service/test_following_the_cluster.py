"""What a node does with a view of its cluster that is damaged, foreign or of other voters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import pytest

from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import NodeInfo
from agentmem_cluster.raft.host import Host
from agentmem_cluster.realtime import RealClock, RealDisk, RealRng
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.config import Config, ConfigError
from agentmem_node.providers.base import ModelIdentity
from agentmem_node.service.membership import Membership, WrongCluster, WrongModel
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.routing import Routing
from agentmem_node.service.view import View

MODEL = ModelIdentity("none", 0, "")
OTHER_MODEL = ModelIdentity("none", 4, "")
NODES = ["n1", "n2", "n3", "n4"]
VIEW = View("c1", MODEL, {}, ShardMap.initial(NODES, shards=4, replication=3))


class Peers:
    """The link of node n4, which does not vote: its voters answer what `answer` gives."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def register(self, method: str, handler: Any) -> None:
        pass

    def is_up(self, peer: str) -> bool:
        return True

    def set_peers(self, peers: Any) -> None:
        assert set(peers) == set(NODES)

    async def call(self, peer: str, method: str, body: Any, *, timeout: float) -> Any:
        return self.answer() if method == "meta.view" else None


def follower(folder: Path, answer: Callable[[], Any], fatal: list[BaseException]) -> Membership:
    nodes = {name: SimpleNamespace(peer=f"127.0.0.1:{at}") for at, name in enumerate(NODES, 1)}
    config = SimpleNamespace(
        node=SimpleNamespace(id="n4"), cluster=SimpleNamespace(nodes=nodes, join=False)
    )
    # It opens no replicas: what it does with them is tested with real ones.
    replicas = SimpleNamespace(learn=lambda shard_map, changes, revision: None)
    clock = RealClock()
    link = cast("Link", Peers(answer))
    return Membership(
        cast("Config", config),
        disk=RealDisk(folder),
        record=LocalRecord("disk of n4", is_admitted=True),
        host=cast("Host", None),
        link=link,
        clock=clock,
        rng=RealRng(),
        routing=Routing("n4", link, clock),
        replicas=cast("Replicas", replicas),
        own=NodeInfo("", "", ""),
        may_found=asyncio.Event(),
        on_fatal=fatal.append,
    )


def follow(member: Membership, until: Callable[[], bool] = lambda: True) -> View:
    async def run() -> View:
        await member.start(MODEL)
        try:
            view = await member.wait_view(5.0)
            for _ in range(500):
                if until():
                    return view
                await asyncio.sleep(0.01)
            raise AssertionError("what was waited for did not happen")
        finally:
            await member.stop()

    return asyncio.run(run())


@pytest.mark.parametrize("bad", [7, [], {}, {"cluster_id": "c1", "nodes": []}, "text"], ids=str)
def test_a_view_that_cannot_be_read_is_asked_for_again(tmp_path: Path, bad: Any) -> None:
    answers = [bad, bad]
    view = follow(follower(tmp_path, lambda: answers.pop() if answers else VIEW.to_wire(), []))
    assert view == VIEW


@pytest.mark.parametrize(
    "kept", [b"", b"\x07", b"\x90", b"\xc1", msgpack.packb({"nodes": 1}), b"\x81"], ids=repr
)
def test_a_damaged_copy_of_the_view_is_no_loss(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "cluster-view.msgpack").write_bytes(kept)
    assert follow(follower(tmp_path, VIEW.to_wire, [])) == VIEW


def test_the_view_that_was_seen_last_is_there_before_any_peer_answers(tmp_path: Path) -> None:
    file = tmp_path / "cluster-view.msgpack"
    follow(follower(tmp_path, VIEW.to_wire, []), file.exists)
    assert follow(follower(tmp_path, lambda: None, [])) == VIEW


def test_a_node_whose_configuration_names_other_voters_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "cluster-view.msgpack"
    follow(follower(tmp_path, VIEW.to_wire, []), file.exists)
    kept = msgpack.unpackb(file.read_bytes())
    assert kept["voters"] == NODES[:3]
    file.write_bytes(msgpack.packb(kept | {"voters": ["n0", "n1", "n2"]}))
    with pytest.raises(ConfigError, match="two majorities"):
        follow(follower(tmp_path, VIEW.to_wire, []))


def test_a_voter_that_has_slept_does_not_take_the_map_back(tmp_path: Path) -> None:
    newer = replace(VIEW, map=replace(VIEW.map, version=2))
    asked: list[int] = []

    def answer() -> Any:
        asked.append(1)
        return newer.to_wire() if len(asked) == 1 else VIEW.to_wire()

    member = follower(tmp_path, answer, [])
    follow(member, lambda: len(asked) > 2)
    assert member.view == newer


def test_what_ends_the_following_of_the_cluster_later_stops_the_node(tmp_path: Path) -> None:
    other = View("c1", OTHER_MODEL, {}, VIEW.map)
    fatal: list[BaseException] = []
    answers = [VIEW.to_wire()]
    member = follower(tmp_path, lambda: answers.pop() if answers else other.to_wire(), fatal)
    follow(member, lambda: bool(fatal))
    assert isinstance(fatal[0], WrongModel)


def test_a_node_with_old_data_does_not_join_a_cluster_that_was_founded_anew(
    tmp_path: Path,
) -> None:
    file = tmp_path / "cluster-view.msgpack"
    follow(follower(tmp_path, VIEW.to_wire, []), file.exists)
    founded_anew = replace(VIEW, cluster_id="c2")
    fatal: list[BaseException] = []
    member = follower(tmp_path, founded_anew.to_wire, fatal)
    try:
        follow(member, lambda: bool(fatal))
    except WrongCluster as error:  # met before the node was ready
        fatal.append(error)
    assert isinstance(fatal[0], WrongCluster)
    assert member.view == VIEW


def test_what_an_older_voter_says_counts_only_while_no_other_answers(tmp_path: Path) -> None:
    """It leaves out what it does not understand."""
    whole = replace(VIEW, revision=7, states={"n2": "draining"})
    answers = [VIEW, VIEW, VIEW, VIEW, whole]
    member = follower(tmp_path, lambda: (answers.pop(0) if answers else VIEW).to_wire(), [])
    follow(member, lambda: member.view == whole)


def test_a_node_that_older_voters_know_as_they_can_does_not_register_for_ever(
    tmp_path: Path,
) -> None:
    """Each time would be one more entry of the meta group's log."""
    asked: list[int] = []

    def answer() -> Any:
        asked.append(1)
        return replace(VIEW, nodes={"n4": NodeInfo("", "", "")}).to_wire()

    member = follower(tmp_path, answer, [])
    member._own = NodeInfo("", "", "", incarnation="disk of n4", level=2)
    link = cast("Any", member._link)
    registered: list[str] = []
    call = link.call

    async def counted(peer: str, method: str, body: Any, *, timeout: float) -> Any:
        if method in ("meta.propose", "meta.put_node"):
            registered.append(method)
            return ["ok", ""]
        return await call(peer, method, body, timeout=timeout)

    link.call = counted
    follow(member, lambda: len(asked) > 6)
    assert registered == ["meta.propose"]
