"""The asyncio driver: real time, real threads, a real disk; peers in the same loop."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from agentmem_cluster.errors import DeadlineExceeded, NotLeader, ShuttingDown, Unavailable
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft.api import GroupSpec
from agentmem_cluster.raft.host import AsyncGroup, Host
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.realtime import RealClock, RealDisk, RealRng

SETTINGS = RaftSettings(heartbeat_s=0.05, election_s_min=0.2, election_s_max=0.4)


class Switch:
    """Carries frames between links in the same loop, unless a node is unplugged."""

    def __init__(self) -> None:
        self.links: dict[str, PluggedLink] = {}
        self.unplugged: set[str] = set()

    def carries(self, sender: str, receiver: str) -> bool:
        return receiver in self.links and not {sender, receiver} & self.unplugged


class PluggedLink:
    on_raft: Callable[[str, list[Any]], None]
    on_up: Callable[[str, int], None]
    on_down: Callable[[str], None]

    def __init__(self, switch: Switch, name: str) -> None:
        self.switch, self.name = switch, name

    def send_raft(self, peer: str, frames: list[Any]) -> bool:
        if not self.switch.carries(self.name, peer):
            return False
        data = msgpack.packb(frames)
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: self.switch.links[peer].on_raft(self.name, msgpack.unpackb(data)))
        return True


class Nodes:
    """Hosts `a`, `b`, ... that replicate one group."""

    def __init__(self, folder: Path, make_machine: Callable[[], Any], names: str) -> None:
        self.switch = Switch()
        self.hosts: dict[str, Host] = {}
        self.groups: dict[str, AsyncGroup] = {}
        self.journals: dict[str, Journal] = {}
        self.fatal: list[BaseException] = []
        spec = GroupSpec("g", 1, tuple(names), preferred=names[0])
        for name in names:
            (folder / name).mkdir()
            self.journals[name] = Journal.open(RealDisk(str(folder / name)))
            link = self.switch.links[name] = PluggedLink(self.switch, name)
            self.hosts[name] = Host(
                name,
                self.journals[name],
                link,
                RealClock(),
                RealRng(),
                SETTINGS,
                on_fatal=self.fatal.append,
            )
            self.groups[name] = self.hosts[name].add_group(spec, make_machine())

    async def start(self) -> None:
        for host in self.hosts.values():
            await host.start()
        for name, link in self.switch.links.items():
            for other in self.hosts:
                if other != name:
                    link.on_up(other, 1)

    async def leader(self) -> AsyncGroup:
        return await until(lambda: next((g for g in self.groups.values() if g.is_leader), None))

    async def stop(self) -> None:
        for host in self.hosts.values():
            await host.stop(transfer=False)
        for journal in self.journals.values():
            journal.close()


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (found := condition()):
            await asyncio.sleep(0.005)
    return found


def soon(seconds: float = 10.0) -> float:
    return RealClock().monotonic() + seconds


@pytest.fixture
def play(tmp_path: Path, machine: Callable[[], Any]) -> Callable[..., None]:
    """Run a story over started nodes, and stop them whatever happens."""

    def run(story: Callable[[Nodes], Awaitable[None]], names: str = "abc") -> None:
        async def main() -> None:
            nodes = Nodes(tmp_path, machine, names)
            try:
                await nodes.start()
                await story(nodes)
            finally:
                await nodes.stop()

        asyncio.run(main())

    return run


def test_what_is_proposed_together_is_applied_in_order_on_every_node(play: Any) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        commands = [b"%d" % n for n in range(200)]
        applied = await asyncio.gather(*(leader.propose(c, deadline=soon()) for c in commands))
        assert [a.result for a in applied] == list(range(1, 201))
        for group in nodes.groups.values():
            await group.wait_applied(applied[-1].index, deadline=soon())
            assert group.machine.commands == commands
            assert await group.read_index(deadline=soon()) >= applied[-1].index

    play(story)


def test_a_group_of_one_reads_without_waiting_once_it_leads(play: Any) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        done = await leader.propose(b"only", deadline=soon())
        assert nodes.hosts["a"].core.read_now("g") == done.index

    play(story, names="a")


def test_a_write_and_a_read_without_a_quorum_end_at_their_deadlines(play: Any) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        nodes.switch.unplugged = set(nodes.hosts)
        begun_s = RealClock().monotonic()
        with pytest.raises(DeadlineExceeded):
            await leader.propose(b"lost", deadline=soon(0.1))
        with pytest.raises(DeadlineExceeded):
            await leader.wait_applied(1_000_000, deadline=soon(0.1))
        assert RealClock().monotonic() - begun_s < 5.0

    play(story)


def test_a_follower_refuses_writes_and_names_the_leader(play: Any) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        name = next(n for n, g in nodes.groups.items() if g is leader)
        follower = next(g for g in nodes.groups.values() if g is not leader)
        await until(lambda: follower.leader == name)
        with pytest.raises(NotLeader) as refused:
            await follower.propose(b"elsewhere", deadline=soon())
        assert refused.value.details["leader"] == name

    play(story)


def test_leadership_goes_where_it_is_sent_and_nowhere_from_a_group_of_one(
    play: Any, tmp_path: Path
) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        await leader.propose(b"first", deadline=soon())
        name = next(n for n, g in nodes.groups.items() if g is not leader)
        await leader.transfer(name, deadline=soon())
        await until(lambda: nodes.groups[name].is_leader)
        await nodes.hosts[name].hand_over()
        assert not nodes.groups[name].is_leader

    async def alone(nodes: Nodes) -> None:
        with pytest.raises(Unavailable):
            await (await nodes.leader()).transfer(None, deadline=soon())

    play(story)
    for folder in tmp_path.iterdir():
        folder.rename(folder.with_name(f"first-{folder.name}"))
    play(alone, names="a")


def test_who_waits_when_the_host_stops_is_told(play: Any) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        nodes.switch.unplugged = set(nodes.hosts)
        waiting = asyncio.create_task(leader.propose(b"late", deadline=soon()))
        await asyncio.sleep(0)
        for host in nodes.hosts.values():
            await host.stop(transfer=False)
        with pytest.raises(ShuttingDown):
            await waiting
        with pytest.raises(ShuttingDown):
            await leader.propose(b"later", deadline=soon())

    play(story)


def test_a_flush_that_fails_stops_the_node_and_acknowledges_nothing(play: Any) -> None:
    async def story(nodes: Nodes) -> None:
        leader = await nodes.leader()
        await leader.propose(b"first", deadline=soon())
        journal = nodes.journals["a"]
        begin = journal.begin_flush

        def failing() -> Any:
            job = begin()
            if job is not None:

                def run() -> None:
                    raise OSError(errno.EIO, "Input/output error")

                job.run = run  # type: ignore[method-assign]
            return job

        journal.begin_flush = failing  # type: ignore[method-assign]
        with pytest.raises((DeadlineExceeded, ShuttingDown)):
            await leader.propose(b"second", deadline=soon(0.5))
        assert [error.errno for error in nodes.fatal] == [errno.EIO]  # type: ignore[attr-defined]
        with pytest.raises(ShuttingDown):
            await leader.propose(b"third", deadline=soon())

    play(story, names="a")
