"""HTTP between clients and simulated nodes: requests, answers, and what is between them when a
node dies, stalls or is asked for a shard that it does not have.

It carries what the client library's core sends, byte for byte. A killed process resets its
connections, a machine without power just stops answering.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from agentmem_chaos.checker import GONE, Kind
from agentmem_chaos.sim.clients import Seen
from agentmem_chaos.sim.machine import Command
from agentmem_chaos.sim.node import SimNode
from agentmem_chaos.sim.plan import WorldPlan
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.serving import Serving
from agentmem_client.instructions import Failure, Send
from agentmem_cluster.errors import AgentMemError, NotFound, Unavailable
from agentmem_cluster.raft.api import Applied
from agentmem_cluster.ring import SLOTS, slot_of

TENANT = "acme"
CLUSTER_PATH = "/api/v1/cluster"
READY_PATH = "/health/ready"
ASK_PATH = "/sim/"
DELAY_S = (0.0001, 0.002)
RESET_S = 0.001

Answered = Callable[[int, Mapping[str, str], bytes], None]
Failed = Callable[[Failure, str], None]


class Web:
    def __init__(
        self,
        plan: WorldPlan,
        nodes: Mapping[str, SimNode],
        servers: Mapping[str, Serving],
        schedule: Schedule,
    ) -> None:
        self._plan = plan
        self._nodes = nodes
        self._servers = servers
        self._schedule = schedule
        self._names = {url_of(name): name for name in nodes}
        self._owners: dict[str, str] = {}
        self._requests = 0

    # -- what a client asks --

    def send(
        self, request: Send, chance: random.Random, answered: Answered, failed: Failed
    ) -> None:
        """One of the two is called, once, or neither when the node never answers."""
        url = next(url for url in self._names if request.url.startswith(url + "/"))
        node, path = self._nodes[self._names[url]], request.url.removeprefix(url)
        self._requests += 1
        number = self._requests
        over = False

        def once(action: Callable[[], None], delay_s: float) -> None:
            nonlocal over
            if not over:
                over = True
                node.connections.pop(number, None)
                self._schedule.after(delay_s, action)

        def answer(status: int, headers: Mapping[str, str], body: Any) -> None:
            data = json.dumps(body).encode()
            once(lambda: answered(status, headers, data), chance.uniform(*DELAY_S))

        def arrive() -> None:
            if not node.alive:
                once(lambda: failed(Failure.REFUSED, "connection refused"), RESET_S)
                return
            node.connections[number] = lambda: once(
                lambda: failed(Failure.BROKEN, "connection reset"), RESET_S
            )
            node.in_process(node.boot_number, lambda: self._serve(node, path, request, answer))

        self._schedule.after(chance.uniform(*DELAY_S), arrive)

    def owner_of(self, group: str) -> str:
        """An owner whose memories are in this group."""
        if group not in self._owners:
            first, last = self._slots(group)
            self._owners[group] = next(
                owner
                for owner in (f"user:{number}" for number in range(SLOTS))
                if first <= slot_of(TENANT, owner) <= last
            )
        return self._owners[group]

    # -- what a node answers --

    def _serve(
        self,
        node: SimNode,
        path: str,
        request: Send,
        answer: Callable[[int, Mapping[str, str], Any], None],
    ) -> None:
        if path == CLUSTER_PATH:
            view = self._view(node)
            if view is None:
                unknown = Unavailable("This node has not learnt the shard map yet.")
                answer(unknown.status, {}, unknown.as_dict())
            else:
                answer(200, {}, view)
            return
        if path == READY_PATH:
            answer(200, {}, {})
            return
        asked = json.loads(request.body or b"")
        group, server = asked["group"], self._servers[node.name]

        def refuse(error: AgentMemError) -> None:
            wait_s = error.retry_after_s
            answer(
                error.status,
                {} if wait_s is None else {"Retry-After": f"{wait_s}"},
                error.as_dict(),
            )

        def was_read(outcome: Seen | AgentMemError) -> None:
            if isinstance(outcome, AgentMemError):
                refuse(outcome)
            elif outcome.value is None or outcome.value is GONE:
                gone = NotFound("Nothing is stored there.", index=outcome.applied_index)
                refuse(gone)
            else:
                answer(200, {}, {"value": outcome.value, "index": outcome.applied_index})

        def written(outcome: Applied | AgentMemError, certain: bool) -> None:
            if isinstance(outcome, AgentMemError):
                refuse(outcome)
            else:
                effect = outcome.result
                answer(200, {}, {"ok": effect.ok, "value": effect.value, "index": outcome.index})

        if asked["kind"] == Kind.READ.value:
            server.read(group, asked["key"], was_read)
        else:
            key = request.headers["Idempotency-Key"]
            server.propose(group, command_of(asked, key), written)

    def _view(self, node: SimNode) -> dict[str, Any] | None:
        """`GET /cluster`: what this node believes."""
        version, believed = node.map_of_shards()
        if not believed:
            return None
        shards = {
            spec.id: {
                "epoch": spec.epoch,
                "members": list(spec.members),
                "leader": None if node.core is None else node.core.leader(spec.id),
                "slots": [list(self._slots(spec.id))],
            }
            for spec in believed
        }
        nodes = {name: {"http": url_of(name)} for name in self._plan.nodes}
        return {"version": version, "tenant": TENANT, "nodes": nodes, "shards": shards}

    def _slots(self, group: str) -> tuple[int, int]:
        ids = [spec.id for spec in self._plan.asked]
        at, share = ids.index(group), SLOTS // len(ids)
        return at * share, SLOTS - 1 if at == len(ids) - 1 else (at + 1) * share - 1


def url_of(node: str) -> str:
    return f"http://{node}:7700"


def body_of(group: str, command: Command) -> bytes:
    return json.dumps(
        {
            "group": group,
            "kind": command.kind,
            "key": command.key,
            "value": command.value,
            "expected": command.expected,
            "padding": len(command.padding),
        }
    ).encode()


def command_of(asked: Mapping[str, Any], request: str) -> Command:
    return Command(
        request,
        asked["kind"],
        asked["key"],
        hashable(asked["value"]),
        hashable(asked["expected"]),
        bytes(asked["padding"]),
    )


def hashable(value: Any) -> Hashable:
    """JSON has lists where there were tuples."""
    return tuple(value) if isinstance(value, list) else value
