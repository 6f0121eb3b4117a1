"""A hold: nothing begins while it lasts, nothing is refused, and it never lasts long."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentmem_cluster.errors import Conflict, DeadlineExceeded
from agentmem_cluster.raft.api import Applied
from agentmem_node.service.hold import Hold


class Group:
    """Proposals that end when they are told to."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.gate = asyncio.Event()

    async def propose(self, command: bytes, *, deadline: float) -> Applied:
        self.begun.append(command)
        await self.gate.wait()
        return Applied(len(self.begun), 1, command)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_writes_under_way_end_first_and_later_ones_wait_and_go_on() -> None:
    async def main() -> None:
        hold, group = Hold(), Group()
        any_group: Any = group
        first = asyncio.ensure_future(hold.propose(any_group, b"first", 9.0))
        await settle()
        held = asyncio.ensure_future(hold.begin("backup", 5.0))
        late = asyncio.ensure_future(hold.propose(any_group, b"late", 9.0))
        await settle()
        assert group.begun == [b"first"] and not held.done()
        group.gate.set()
        await held
        assert first.done() and hold.is_held_by("backup")
        await settle()
        assert group.begun == [b"first"]
        assert hold.release("backup") and not hold.release("backup")
        assert (await late).result == b"late"

    asyncio.run(main())


def test_a_lease_ends_by_itself_and_the_holder_learns_of_it() -> None:
    async def main() -> None:
        hold, group = Hold(), Group()
        any_group: Any = group
        group.gate.set()
        await hold.begin("backup", 0.02)
        assert (await hold.propose(any_group, b"write", 9.0)).result == b"write"
        assert not hold.is_held_by("backup") and not hold.release("backup")
        await hold.begin("next", 5.0)
        hold.release("next")

    asyncio.run(main())


def test_writes_that_do_not_end_within_the_lease_end_the_hold() -> None:
    async def main() -> None:
        hold, group = Hold(), Group()
        any_group: Any = group
        stuck = asyncio.ensure_future(hold.propose(any_group, b"stuck", 9.0))
        await settle()
        with pytest.raises(DeadlineExceeded):
            await hold.begin("backup", 0.02)
        group.gate.set()
        await stuck
        await hold.begin("again", 5.0)
        with pytest.raises(Conflict):
            await hold.begin("another", 5.0)
        hold.release("again")

    asyncio.run(main())


def test_a_hold_that_is_given_up_lets_writes_go_on() -> None:
    async def main() -> None:
        hold, group = Hold(), Group()
        any_group: Any = group
        stuck = asyncio.ensure_future(hold.propose(any_group, b"stuck", 9.0))
        await settle()
        held = asyncio.ensure_future(hold.begin("backup", 60.0))
        await settle()
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        late = asyncio.ensure_future(hold.propose(any_group, b"late", 9.0))
        await settle()
        assert group.begun == [b"stuck", b"late"]
        group.gate.set()
        await asyncio.gather(stuck, late)

    asyncio.run(main())
