"""Asking shards over several replicas: who is asked, when the next one is, and what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from agentmem_cluster.errors import AgentMemError, DeadlineExceeded, NoQuorum, Unavailable
from agentmem_cluster.realtime import RealClock
from agentmem_cluster.shardmap import ShardMap
from agentmem_node.service.fanout import FanOut, Gathered
from agentmem_node.service.routing import Routing

HEDGE_S = 0.05
Answers = dict[str, str | AgentMemError]
Ask = Callable[[str, Sequence[str]], Awaitable[Answers]]


class Peers(Routing):
    """Routing as a node without replicas sees it, with peers that are up or not."""

    def __init__(self, up: set[str]) -> None:
        super().__init__("outside", None, RealClock())
        self.map = ShardMap.initial(["a", "b", "c"], shards=2, replication=3)
        self.up = up

    def is_connected(self, peer: str) -> bool:
        return peer in self.up


def gather(ask: Ask, up: str = "abc", seconds: float = 2.0) -> Gathered[str]:
    async def run() -> Gathered[str]:
        routing = Peers(set(up))
        clock = RealClock()
        fan_out = FanOut(routing, clock, HEDGE_S)
        shards = list(routing.current_map().shards)
        return await fan_out.gather(shards, ask, clock.monotonic() + seconds)

    return asyncio.run(run())


def test_each_shard_is_asked_of_one_replica() -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    async def ask(node: str, shards: Sequence[str]) -> Answers:
        asked.append((node, tuple(shards)))
        return dict.fromkeys(shards, node)

    assert set(gather(ask).answers) == {"s00", "s01"}
    assert sorted(shard for _, shards in asked for shard in shards) == ["s00", "s01"]


def test_a_replica_that_fails_is_replaced_by_the_next() -> None:
    async def ask(node: str, shards: Sequence[str]) -> Answers:
        if node == "a":
            raise Unavailable("a is going away")
        return dict.fromkeys(shards, node)

    found = gather(ask)
    assert set(found.answers.values()) <= {"b", "c"}
    assert set(found.answers) == {"s00", "s01"}


def test_an_error_of_one_shard_is_asked_again_without_the_others() -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    async def ask(node: str, shards: Sequence[str]) -> Answers:
        asked.append((node, tuple(shards)))
        first = len(asked) == 1
        return {s: NoQuorum("cut off") if s == "s01" and first else node for s in shards}

    assert set(gather(ask).answers) == {"s00", "s01"}
    assert asked[1][1] == ("s01",)
    assert asked[1][0] != asked[0][0]


def test_a_slow_replica_is_hedged_and_the_first_answer_counts() -> None:
    cancelled: list[str] = []

    async def ask(node: str, shards: Sequence[str]) -> Answers:
        if node == "a":
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.append(node)
                raise
        return dict.fromkeys(shards, node)

    found = gather(ask)
    assert set(found.answers.values()) <= {"b", "c"}
    assert cancelled in ([], ["a"])


def test_shards_without_a_reachable_replica_are_missing_and_say_why() -> None:
    async def ask(node: str, shards: Sequence[str]) -> Answers:
        raise AssertionError("nobody is up")

    found = gather(ask, up="")
    assert found.missing(["s00", "s01"]) == ["s00", "s01"]
    assert isinstance(found.errors["s00"], NoQuorum)


def test_what_has_not_answered_by_the_deadline_is_missing() -> None:
    async def ask(node: str, shards: Sequence[str]) -> Answers:
        await asyncio.sleep(30)
        return {}

    found = gather(ask, seconds=0.2)
    assert found.missing(["s00", "s01"]) == ["s00", "s01"]
    assert isinstance(found.refusal(), DeadlineExceeded)


def test_a_request_without_time_left_is_refused_before_anybody_is_asked() -> None:
    async def ask(node: str, shards: Sequence[str]) -> Answers:
        raise AssertionError("asked")

    with pytest.raises(DeadlineExceeded):
        gather(ask, seconds=-1.0)


def test_a_bug_in_a_read_is_not_swallowed() -> None:
    async def ask(node: str, shards: Sequence[str]) -> Answers:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        gather(ask)
