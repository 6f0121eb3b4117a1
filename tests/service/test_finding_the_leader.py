"""Finding a shard's leader from a node without a replica: over crashes, and never guessing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agentmem_cluster.errors import (
    AgentMemError,
    DeadlineExceeded,
    DiskFull,
    NoQuorum,
    NotLeader,
    Overloaded,
    Unavailable,
)
from agentmem_cluster.realtime import RealClock
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.service import routing as routing_module
from agentmem_node.service.routing import LocalShard, Routing

Answer = str | AgentMemError


class Outside(Routing):
    """A node without replicas, and which of the members it reaches."""

    def __init__(self, up: str) -> None:
        super().__init__("outside", None, RealClock())
        self.map = ShardMap.initial(["a", "b", "c"], shards=1, replication=3)
        self.up = set(up)
        self.asked: list[str] = []

    def is_connected(self, peer: str) -> bool:
        return peer in self.up

    async def write(self, answer: Callable[[str], Answer], seconds: float = 2.0) -> str:
        async def here(_local: LocalShard) -> str:
            raise AssertionError("there is no replica here")

        async def there(node: str, _info: ShardInfo) -> str:
            self.asked.append(node)
            if node not in self.up:
                raise Unavailable(f"Node {node} is not connected.")
            found = answer(node)
            if isinstance(found, AgentMemError):
                raise found
            return found

        return await self.at_leader("s00", RealClock().monotonic() + seconds, here, there)


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_module, "_LEADER_WAIT_S_MAX", 0.3)


def led_by(leader: str) -> Callable[[str], Answer]:
    return lambda node: node if node == leader else NotLeader("not me", leader=leader)


def test_a_member_names_the_leader_and_the_next_request_goes_there_at_once() -> None:
    outside = Outside("abc")
    assert asyncio.run(outside.write(led_by("c"))) == "c"
    outside.asked.clear()
    assert asyncio.run(outside.write(led_by("c"))) == "c"
    assert outside.asked == ["c"]


def test_a_leader_that_died_is_forgotten_by_nodes_without_a_replica() -> None:
    outside = Outside("abc")
    asyncio.run(outside.write(led_by("c")))
    outside.up.discard("c")
    assert asyncio.run(outside.write(led_by("b"))) == "b"


def test_members_are_asked_in_turn_because_one_may_be_cut_off_from_the_others() -> None:
    def answer(node: str) -> Answer:
        return node if node == "c" else NotLeader("I know no leader")

    assert asyncio.run(Outside("abc").write(answer)) == "c"


def test_a_request_that_a_leader_took_with_it_is_sent_again_to_its_successor() -> None:
    lost: list[str] = []

    def answer(node: str) -> Answer:
        if not lost:
            lost.append(node)
            return Unavailable("The connection was lost before it answered.")
        return node

    assert asyncio.run(Outside("abc").write(answer)) in "abc"


@pytest.mark.parametrize(
    "later", [NotLeader("no leader"), Overloaded("full"), NoQuorum("minority")], ids=str
)
def test_once_the_outcome_is_unknown_a_refusal_does_not_make_it_certain(
    later: AgentMemError,
) -> None:
    outside = Outside("abc")

    def answer(_node: str) -> Answer:
        return Unavailable("lost") if len(outside.asked) == 1 else later

    with pytest.raises(DeadlineExceeded, match="may or may not"):
        asyncio.run(outside.write(answer))
    assert len(outside.asked) > 1


def test_a_leader_that_lost_its_majority_is_not_the_last_word() -> None:
    outside = Outside("abc")
    answer: Callable[[str], Answer] = lambda node: (  # noqa: E731
        NoQuorum("minority") if len(outside.asked) == 1 else node
    )
    assert asyncio.run(outside.write(answer)) in "abc"
    with pytest.raises(NoQuorum):
        asyncio.run(outside.write(lambda _: NoQuorum("minority")))


@pytest.mark.parametrize("refusal", [Overloaded("full"), DiskFull("full")], ids=repr)
def test_a_refusal_of_the_first_try_is_passed_on_at_once(refusal: AgentMemError) -> None:
    outside = Outside("abc")
    with pytest.raises(type(refusal)):
        asyncio.run(outside.write(lambda _: refusal))
    assert len(outside.asked) == 1


def test_without_any_connected_member_the_request_is_refused_not_left_open() -> None:
    outside = Outside("")
    with pytest.raises(NoQuorum):
        asyncio.run(outside.write(led_by("a")))
    assert outside.asked == []


def test_the_deadline_of_the_request_bounds_the_search() -> None:
    async def run() -> Any:
        clock = RealClock()
        begun = clock.monotonic()
        with pytest.raises((DeadlineExceeded, NoQuorum)):
            await Outside("abc").write(lambda _: NotLeader("nobody leads"), seconds=0.1)
        return clock.monotonic() - begun

    assert asyncio.run(run()) < 0.28


class Stopped(Outside):
    """`c` leads and has stopped: its connection is up, and it answers nothing."""

    def __init__(self, successor_after_s: float, *, is_alive: bool = False) -> None:
        super().__init__("abc")
        self.known: str | None = "c"
        self.is_alive = is_alive
        self.successor_after_s = successor_after_s

    def leader_of(self, shard_id: str) -> str | None:
        return self.known

    async def run(self, seconds: float) -> tuple[str, float]:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        loop.call_later(self.successor_after_s / 2, setattr, self, "known", None)
        loop.call_later(self.successor_after_s, setattr, self, "known", "b")

        async def here(_local: LocalShard) -> str:
            raise AssertionError("there is no replica here")

        async def there(node: str, _info: ShardInfo) -> str:
            self.asked.append(node)
            if node == "c":
                await asyncio.sleep(self.successor_after_s + 0.05 if self.is_alive else 30)
            return node

        answer = await self.at_leader("s00", RealClock().monotonic() + seconds, here, there)
        return answer, loop.time() - begun


def test_a_stopped_leader_is_left_as_soon_as_it_has_a_successor() -> None:
    stopped = Stopped(successor_after_s=0.3)
    answer, took_s = asyncio.run(stopped.run(seconds=10))
    assert (answer, stopped.asked) == ("b", ["c", "b"])
    assert 0.3 <= took_s < 1.0


def test_a_leader_that_hands_over_may_still_answer_what_it_has_taken() -> None:
    stopped = Stopped(successor_after_s=0.15, is_alive=True)
    answer, _ = asyncio.run(stopped.run(seconds=10))
    assert (answer, stopped.asked) == ("c", ["c"])


def test_while_nobody_else_leads_a_silent_leader_is_waited_for() -> None:
    stopped = Stopped(successor_after_s=30, is_alive=False)

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stopped.run(seconds=10), 0.5)

    asyncio.run(run())
    assert stopped.asked == ["c"]
