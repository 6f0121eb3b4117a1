"""A partition: one node's links are cut while its process goes on, and healed again."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from agentmem_node.cli.devlayout import HOST, DevClusterError, NodeFiles
from agentmem_node.cli.status import ask
from agentmem_node.console.story import NOTES_USER, Demo
from agentmem_node.console.writer import WRITE_DEADLINE_S

# What a node without a majority must not answer.
REFUSED = ("a write", "a linearizable read")
_REQUEST_S_MAX = 3.0
_ASKED_AT_ONCE = 32
_ASK_EVERY_S = 0.25
_REFUSED_S_MAX = 10.0
_CONVERGED_S_MAX = 30.0
_POLL_S = 0.05

Answer = tuple[int, str, float, float]
"""(status, or 0 without an answer; the error's code; when it was asked, when told)."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How the node that was cut off answered one kind of request, asked itself."""

    what: str
    code: str
    waited_s: float  # from the request to the answer
    after_s: float  # from the cut to the answer


@dataclass(slots=True)
class Partition:
    """What was seen around a cut. None: it did not happen in time."""

    node: str
    refusals: list[Refusal] = field(default_factory=list)
    first_write_s: float | None = None
    longest_write_s: float = 0.0
    acknowledged: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def is_as_promised(self) -> bool:
        return len(self.refusals) == len(REFUSED) and self.first_write_s is not None


def cut(demo: Demo, node: str) -> float:
    """Cut a running node off; returns when (`time.monotonic`). Raises DevClusterError."""
    demo.cluster.pid(node)  # it runs
    if demo.wires.strangers():
        raise DevClusterError(
            "This system does not say whose the connections to the node that joined are, so no "
            "node can be cut off while it is there. Quit, and start again without `join`."
        )
    demo.wires.cut(node)
    return time.monotonic()


def cut_while_writing(demo: Demo, node: str) -> Partition:
    """Cut `node` off while memories are written; ask it, and wait for the others to go on."""
    seen = Partition(node)
    demo.cluster.pid(node)  # or nobody need write
    with demo.writing() as writer:
        cut_at = cut(demo, node)
        writer.mark()
        seen.refusals = refusals(demo, node, cut_at)
        seen.first_write_s = writer.wait_for_write_after_mark(WRITE_DEADLINE_S)
    seen.longest_write_s = writer.longest_s
    seen.acknowledged, seen.refused = writer.acknowledged, writer.refused
    return seen


def refusals(demo: Demo, node: str, cut_at: float) -> list[Refusal]:
    """Ask the node itself for writes and linearizable reads until it has refused one of each.

    One that was sent at the moment of the cut may wait for a majority as long as its client does,
    so new ones are sent all the time.
    """
    files = demo.cluster.node(node)
    known = next((i for i, (who, _) in demo.acknowledged.items() if who == NOTES_USER), "0" * 32)
    note = {"content": "This must not be acknowledged", "user_id": NOTES_USER}
    asks: dict[str, Callable[[], Answer]] = {
        REFUSED[0]: lambda: _ask_alone(files, "POST", "/api/v1/memories", note),
        REFUSED[1]: lambda: _ask_alone(files, "GET", f"/api/v1/memories/{known}"),
    }
    found: dict[str, Refusal] = {}
    under_way: dict[Future[Answer], str] = {}
    pool = ThreadPoolExecutor(_ASKED_AT_ONCE)
    try:
        while len(found) < len(asks) and time.monotonic() - cut_at < _REFUSED_S_MAX:
            next_at = time.monotonic() + _ASK_EVERY_S
            for what in asks.keys() - found.keys():
                under_way[pool.submit(asks[what])] = what
            for done in wait(under_way, _ASK_EVERY_S).done:
                what = under_way.pop(done)
                status, code, asked_at, told_at = done.result()
                if status == 503:
                    refusal = Refusal(what, code, told_at - asked_at, told_at - cut_at)
                    found.setdefault(what, refusal)
            time.sleep(max(0.0, next_at - time.monotonic()))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [found[what] for what in asks if what in found]


def _ask_alone(node: NodeFiles, method: str, path: str, body: Any = None) -> Answer:
    """This node's own answer."""
    asked_at = time.monotonic()
    connection = http.client.HTTPConnection(HOST, node.port, timeout=_REQUEST_S_MAX)
    try:
        connection.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json"},
        )
        answer = connection.getresponse()
        told = json.loads(answer.read())
        return answer.status, str(told.get("code", "")), asked_at, time.monotonic()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return 0, str(error), asked_at, time.monotonic()
    finally:
        connection.close()


def heal(demo: Demo, node: str) -> float | None:
    """Join the links of `node` again; seconds until every replica of every shard was the same.

    None: it was not so in time, or cannot be, as too few nodes run.
    """
    begun = time.monotonic()
    demo.wires.heal(node)
    running = [n.url for n in demo.cluster.nodes if demo.cluster.is_running(n.id)]
    while running and time.monotonic() - begun < _CONVERGED_S_MAX:
        if is_converged(running):
            return time.monotonic() - begun
        time.sleep(_POLL_S)
    return None


def is_converged(urls: list[str]) -> bool:
    """Whether all that run are ready, and all replicas of each shard there have one digest.

    Raises the client's errors when none of `urls` answers.
    """
    state = ask(urls)
    up = {node.id for node in state.nodes if node.is_up}
    return all(node.is_ready for node in state.nodes if node.is_up) and all(
        shard.leader is not None
        and up & set(shard.members) <= set(shard.digests)
        and len(set(shard.digests.values())) == 1  # at one entry, with one digest
        for shard in state.shards
    )
