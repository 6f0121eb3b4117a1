"""What the demo does, without a word of how it is shown.

A `Demo` owns a cluster in a directory, remembers every memory that the cluster acknowledged, and
can say at any time which of them are missing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmem_client import (
    Client,
    Memory,
    NoQuorum,
    NotFound,
    SearchResult,
)
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.console.wires import Wires
from agentmem_node.console.writer import WRITE_DEADLINE_S, Writer
from agentmem_node.samples import Question, conversations, questions

BATCH = 60
# One of these is asked for by its exact words: it must be among so many results.
FOUND_WITHIN = 10
_VERIFY_TRIES = 3
_VERIFY_AT_ONCE = 8
_DURING_S_MIN = 2.0
_CATCH_UP_S_MAX = 30.0
_LEADER_S_MAX = 10.0
# Every one must be alike in kind and unlike in a word, as log entries are.
_NOTE = "Parcel PX{number:04d} was put on shelf {shelf} while a node was down"
NOTES_USER = "priya"

Acknowledged = dict[str, tuple[str, str]]
"""Memory id -> (user, text)."""


def spread(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same turns, the people taking turns: each batch then has work for every leader.

    >>> [t["user_id"] for t in spread([{"user_id": u} for u in "aabbb"])]
    ['a', 'b', 'a', 'b', 'b']
    """
    told: dict[str, int] = {}
    order: list[tuple[int, int]] = []
    for at, turn in enumerate(turns):
        number = told[turn["user_id"]] = told.get(turn["user_id"], 0) + 1
        order.append((number, at))
    return [turns[at] for _, at in sorted(order)]


@dataclass(slots=True)
class Outage:
    """What happened to writes around a kill. Seconds since the kill."""

    killed: str
    acknowledged: int = 0
    refused: list[str] = field(default_factory=list)
    first_write_s: float | None = None
    first_search_s: float | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """An acknowledged memory that was not found."""

    id: str
    text: str
    how: str  # "by id", "with its text" or "by search"


class Demo:
    """Not for use by several threads, except where it says so."""

    def __init__(self, data: Path, nodes: int = 3) -> None:
        self.wires = Wires(self._pids)
        # Each reaches the others through a relay of this process, so that it can be cut off.
        self.cluster = DevCluster(
            data, nodes=nodes, dialled=lambda a, b: self.wires.address(a, b.id, b.peer)
        )
        self.acknowledged: Acknowledged = {}
        self.started_at = 0.0
        self._client: Client | None = None
        self._notes = itertools.count(1)

    @property
    def client(self) -> Client:
        """A client that knows every node."""
        if self._client is None:
            self._client = Client(self.cluster.urls)
        return self._client

    # -- life -------------------------------------------------------------------------------

    def start(self, progress: Callable[[str], None] | None = None) -> float:
        """Start the nodes; returns the seconds until all were ready."""
        self.started_at = time.monotonic()
        self.cluster.start()
        self.cluster.wait_ready(progress=progress)
        return time.monotonic() - self.started_at

    def close(self) -> None:
        """Stop everything; the files stay."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self.cluster.stop()
        self.wires.close()

    def _pids(self) -> dict[str, int]:
        cluster = self.cluster
        return {n.id: cluster.pid(n.id) for n in cluster.nodes if cluster.is_running(n.id)}

    # -- scenes -----------------------------------------------------------------------------

    def load(self, progress: Callable[[int, int], None]) -> int:
        """Store the sample conversations; `progress` is told (done, all)."""
        items = spread(conversations())
        added = self.client.add_many(
            items, batch_size=BATCH, progress=lambda done, _part: progress(done, len(items))
        )
        for memory in added.memories:
            self.remember(memory)
        if added.errors:
            raise added.errors[0][1]
        return len(added.memories)

    def remember(self, memory: Memory) -> None:
        """Hold the cluster to it: this memory was acknowledged."""
        self.acknowledged[memory.id] = (memory.user_id or "", memory.content)

    def add(self, text: str, user: str) -> Memory:
        (memory,) = self.client.add(text, user_id=user).memories
        self.remember(memory)
        return memory

    def leader_of(self, user: str) -> str:
        """The node that leads the shard of a user's memories. Raises NoQuorum without one."""
        # Imported here: it brings tables that only a few need.
        from agentmem_node.cli.status import ask

        deadline = time.monotonic() + _LEADER_S_MAX
        while True:
            owner = self.client.cluster().shard_of_owner(f"user:{user}")
            # All nodes are asked: one that has no replica of the shard need not know its leader.
            # And asked again: leaderships move for a while after a start.
            for shard in ask(self.cluster.urls).shards:
                if owner is not None and shard.id == owner.id and shard.leader is not None:
                    return shard.leader
            if time.monotonic() >= deadline:
                raise NoQuorum(f"The shard of {user} has no leader now.")
            time.sleep(0.1)

    def kill_while_writing(self, node: str, search: str) -> Outage:
        """SIGKILL to `node` while memories are written one after the other; they go on after it."""
        outage = Outage(node)
        with self.writing() as writer:
            self.cluster.kill(node)
            killed_at = writer.mark()
            self.client.search(search, user_id=NOTES_USER)
            outage.first_search_s = time.monotonic() - killed_at
            outage.first_write_s = writer.wait_for_write_after_mark(WRITE_DEADLINE_S)
            time.sleep(max(0.0, killed_at + _DURING_S_MIN - time.monotonic()))
        outage.acknowledged, outage.refused = writer.acknowledged, writer.refused
        return outage

    def writing(self) -> Writer:
        """Writes notes of one person while its `with` block runs; all are remembered."""

        def write() -> list[Memory]:
            number = next(self._notes)
            note = _NOTE.format(number=number, shelf=number % 7 + 1)
            added = self.client.add(note, user_id=NOTES_USER, deadline_s=WRITE_DEADLINE_S)
            return list(added.memories)

        return Writer(write, self.remember)

    @property
    def has_majority(self) -> bool:
        """Whether most nodes run and reach each other."""
        cut = self.wires.cut_nodes
        well = [n for n in self.cluster.nodes if self.cluster.is_running(n.id) and n.id not in cut]
        return 2 * len(well) > len(self.cluster.nodes)

    def restart(self, node: str) -> float | None:
        """Start a killed node; returns the seconds until it was ready and had caught up.

        None: it was started, but cannot be ready, as most of the others do not run.
        """
        # Imported here: it brings tables that only a few need.
        from agentmem_node.cli.status import ask

        begun = time.monotonic()
        self.cluster.restart(node, wait_s=0)
        if not self.has_majority:
            return None
        self.cluster.wait_ready()
        while time.monotonic() - begun < _CATCH_UP_S_MAX:
            state = ask([self.cluster.node(node).url])
            own = [shard for shard in state.shards if node in shard.members]
            if all(node in shard.applied and shard.lag == 0 for shard in own):
                break
            time.sleep(0.1)
        return time.monotonic() - begun

    def missing(self, progress: Callable[[int, int], None] | None = None) -> list[Missing]:
        """Every acknowledged memory that is not found by its id and by its own words."""
        found: list[Missing] = []
        entries = list(self.acknowledged.items())
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            with ThreadPoolExecutor(_VERIFY_AT_ONCE) as pool:
                found += filter(None, pool.map(self._not_found_by_id, part))
            found += self._not_found_by_search(part)
            if progress is not None:
                progress(min(start + BATCH, len(entries)), len(entries))
        return found

    def _not_found_by_id(self, entry: tuple[str, tuple[str, str]]) -> Missing | None:
        memory_id, (_, text) = entry
        try:
            stored = self.client.get(memory_id)
        except NotFound:
            return Missing(memory_id, text, "by id")
        return None if stored.content == text else Missing(memory_id, text, "with its text")

    def _not_found_by_search(self, part: list[tuple[str, tuple[str, str]]]) -> list[Missing]:
        left = part
        for _ in range(_VERIFY_TRIES):
            searches = [
                {"query": text, "user_id": user, "top_k": FOUND_WITHIN} for _, (user, text) in left
            ]
            answers = self.client.search_many(searches)
            # An answer that names silent shards is no proof of absence: ask again.
            unsure: list[tuple[str, tuple[str, str]]] = []
            lost: list[tuple[str, tuple[str, str]]] = []
            for entry, answer in zip(left, answers, strict=True):
                if entry[0] in {hit.id for hit in answer}:
                    continue
                (unsure if answer.partial else lost).append(entry)
            if lost or not unsure:
                return [Missing(i, text, "by search") for i, (_, text) in [*lost, *unsure]]
            left = unsure
        return [Missing(i, text, "by search (shards silent)") for i, (_, text) in left]

    def ask_questions(self, count: int) -> Iterator[tuple[Question, SearchResult, bool]]:
        """Some of the sample questions: (question, answer, whether an expected memory is in it)."""
        texts = [item["content"] for item in conversations()]
        every = questions()
        for question in every[:: max(1, len(every) // count)][:count]:
            answer = self.client.search(question.query, user_id=question.user_id, top_k=3)
            expected = {texts[at] for at in question.expected}
            yield question, answer, any(hit.content in expected for hit in answer)
