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
from agentmem_chaos.sim.clients import Seen, Written
from agentmem_chaos.sim.machine import Command
from agentmem_chaos.sim.node import SimNode
from agentmem_chaos.sim.places import TENANT, Places
from agentmem_chaos.sim.plan import WorldPlan
from agentmem_chaos.sim.schedule import Schedule
from agentmem_chaos.sim.serving import Serving
from agentmem_client.instructions import Failure, Send
from agentmem_cluster.errors import AgentMemError, NotFound, Unavailable

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
        places: Places,
    ) -> None:
        self._plan = plan
        self._places = places
        self._nodes = nodes
        self._servers = servers
        self._schedule = schedule
        self._names = {url_of(name): name for name in nodes}
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

    def owner_of(self, group: str, key: str) -> str:
        """An owner whose memories are where that key is."""
        return self._places.owner(group, key)

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
                index, shard = outcome.applied_index, outcome.shard
                refuse(NotFound("Nothing is stored there.", index=index, shard=shard))
            else:
                answer(200, {}, _answer(True, *outcome))

        def written(outcome: Written | AgentMemError, certain: bool) -> None:
            if isinstance(outcome, AgentMemError):
                refuse(outcome)
            else:
                effect, index, shard = outcome
                answer(200, {}, _answer(effect.ok, effect.value, index, shard))

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
            place.id: {
                "epoch": place.epoch,
                "members": list(place.members),
                "leader": None if node.core is None else node.core.leader(place.id),
                "slots": [[place.slots[0], place.slots[1] - 1]],
            }
            for place in believed
        }
        nodes = {name: {"http": url_of(name)} for name in self._plan.nodes}
        return {"version": version, "tenant": TENANT, "nodes": nodes, "shards": shards}


def _answer(ok: bool, value: Hashable, index: int, shard: str) -> dict[str, Any]:
    return {"ok": ok, "value": value, "index": index, "shard": shard}


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
