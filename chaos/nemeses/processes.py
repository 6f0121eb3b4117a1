"""Nodes that die, hang, or are restarted as an upgrade does it."""

from __future__ import annotations

import asyncio
import time
from typing import ClassVar

from agentmem_chaos.hosts.base import Need
from agentmem_chaos.nemeses.base import Field, Nemesis
from agentmem_chaos.runs.ready import wait_ready

RESTART_S_MAX = 40.0


class _Kill(Nemesis):
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS})

    def chosen(self, field: Field) -> tuple[str, ...]:
        raise NotImplementedError

    async def strike(self, field: Field) -> str:
        self.victims = frozenset(self.chosen(field))
        await asyncio.gather(*(field.hosts.kill(node) for node in sorted(self.victims)))
        self.sides = (frozenset(field.nodes) - self.victims,)
        return f"SIGKILL to {', '.join(sorted(self.victims))}"

    async def undo(self, field: Field) -> None:
        for node in sorted(self.victims):
            if not field.hosts.is_running(node):
                await field.hosts.start(node)


class KillLeader(_Kill):
    name: ClassVar[str] = "kill-leader"
    description: ClassVar[str] = "SIGKILL to a node that leads a shard"
    # One at a time: to lose a second while the first still starts is what kill-majority is for.
    wants_whole_cluster: ClassVar[bool] = True

    def chosen(self, field: Field) -> tuple[str, ...]:
        return (field.a_leader(),)


class KillFollower(_Kill):
    name: ClassVar[str] = "kill-follower"
    description: ClassVar[str] = "SIGKILL to the node that leads the fewest shards"
    wants_whole_cluster: ClassVar[bool] = True

    def chosen(self, field: Field) -> tuple[str, ...]:
        return (field.a_follower(),)


class KillMajority(_Kill):
    name: ClassVar[str] = "kill-majority"
    description: ClassVar[str] = "SIGKILL to a majority of the nodes at once"
    # Those that are left are asked whether they refuse: they must be up for that.
    wants_whole_cluster: ClassVar[bool] = True
    hold_s: ClassVar[tuple[float, float]] = (5.0, 7.0)

    def chosen(self, field: Field) -> tuple[str, ...]:
        return field.a_majority()


class KillAll(_Kill):
    name: ClassVar[str] = "kill-all"
    description: ClassVar[str] = "SIGKILL to every node at once"
    hold_s: ClassVar[tuple[float, float]] = (1.0, 2.0)

    def chosen(self, field: Field) -> tuple[str, ...]:
        return field.nodes


class Pause(Nemesis):
    name: ClassVar[str] = "pause-leader"
    description: ClassVar[str] = "SIGSTOP to a leader: it hangs with its connections open"
    wants_whole_cluster: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS})

    async def strike(self, field: Field) -> str:
        node = field.a_leader()
        self.victims = frozenset({node})
        await field.hosts.pause(node)
        self.sides = (frozenset(field.nodes) - self.victims,)
        return f"SIGSTOP to {node}"

    async def undo(self, field: Field) -> None:
        for node in self.victims:
            if field.hosts.is_running(node):
                await field.hosts.resume(node)


class RollingRestart(Nemesis):
    """SIGTERM and start, node after node, each ready before the next: an upgrade."""

    name: ClassVar[str] = "rolling-restart"
    description: ClassVar[str] = "SIGTERM and start of every node, one after the other"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.SIGNALS})
    hold_s: ClassVar[tuple[float, float]] = (0.0, 0.0)

    async def strike(self, field: Field) -> str:
        self.victims = frozenset(field.nodes)
        began = time.monotonic()
        for node in field.nodes:
            await field.hosts.stop(node)
            await field.hosts.start(node)
            await wait_ready(field.hosts, (node,), RESTART_S_MAX)
        return f"every node restarted in {time.monotonic() - began:.1f} s"

    async def undo(self, field: Field) -> None:
        for node in field.nodes:
            if not field.hosts.is_running(node):
                await field.hosts.start(node)
