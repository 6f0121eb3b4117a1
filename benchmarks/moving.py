"""Shards that move under load: an operation is watched, and what moves is written to all the time.

The pause of a move is the longest time that any of these writes took, counted from when it should
have been sent: they come every `_PROBE_EVERY_S`, so it is seen to within that.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from agentmem_client import AgentMemError, Client, TemporarilyUnavailable, Topology
from agentmem_node.cli.admin import Admin
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.devlayout import NodeFiles
from agentmem_node.model import operations as ops
from benchmarks.rolling import Load

_POLL_S = 0.05
_PROBE_EVERY_S = 0.03
_OPERATION_S_MAX = 300.0
_WELL_S_MAX = 30.0


@dataclass(slots=True)
class Move:
    """One shard that changed hands. Times of `time.perf_counter`."""

    shard: str
    copied_bytes: int = 0
    copying_at: float = 0.0
    copied_at: float = 0.0
    ended_at: float = 0.0
    probes: int = 0
    pause_s: float = 0.0  # the longest write to it meanwhile

    @property
    def took_s(self) -> float:
        return self.ended_at - self.copying_at

    @property
    def copy_s(self) -> float:
        return max(self.copied_at - self.copying_at, _POLL_S)


@dataclass(slots=True)
class ProbedLoad(Load):
    """A load that writes to one shard, besides, while `shard` says which."""

    shard: str | None = None
    owner_by_shard: dict[str, str] = field(default_factory=dict)
    probes: list[tuple[str, float, float]] = field(default_factory=list)  # shard, due, took (s)
    probe_errors: list[str] = field(default_factory=list)

    async def learn(self) -> None:
        """Find an owner in every shard."""
        topology = await self.client.cluster()
        self.owner_by_shard = {shard: owner_in(topology, shard) for shard in topology.shards}

    async def keep_probing(self) -> None:
        """Until it is cancelled; what is under way is then waited for."""
        under_way: set[asyncio.Task[None]] = set()
        due = time.perf_counter()
        try:
            while True:
                due = max(due + _PROBE_EVERY_S, time.perf_counter() - _PROBE_EVERY_S)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if self.shard is not None:
                    task = asyncio.create_task(self._probe(self.shard, due))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
        finally:
            if under_way:
                await asyncio.wait(under_way, timeout=60.0)

    async def _probe(self, shard: str, due: float) -> None:
        try:
            await self.add(self.owner_by_shard[shard])
        except AgentMemError as failed:
            self.probe_errors.append(f"probe: {type(failed).__name__}: {failed.message}")
        self.probes.append((shard, due, time.perf_counter() - due))


def owner_in(topology: Topology, shard: str, number: int = 0) -> str:
    """A user whose memories lie in the shard; another one for each `number`."""
    for attempt in range(100_000):
        name = f"{shard}-{number}-{attempt}"
        found = topology.shard_of_owner(f"user:{name}")
        if found is not None and found.id == shard:
            return name
    raise LookupError(f"no owner was found in shard {shard}")


async def operate(cluster: DevCluster, load: ProbedLoad, wish: ops.OperationWish) -> list[Move]:
    """Begin an operation, wait for its end under the load, and say how each shard fared.

    Raises RuntimeError when it fails or has no end in time.
    """
    moves: dict[str, Move] = {}
    with Client(cluster.urls) as connection:
        admin = Admin(connection)
        prober = asyncio.create_task(load.keep_probing())
        try:
            async with asyncio.timeout(_OPERATION_S_MAX):
                operation = await asyncio.to_thread(admin.begin, wish)
                while True:
                    _note(operation, moves, load)
                    if operation.state != "running":
                        break
                    await asyncio.sleep(_POLL_S)
                    try:
                        operation = await asyncio.to_thread(admin.operation, operation.id)
                    except TemporarilyUnavailable:
                        continue
        finally:
            load.shard = None
            prober.cancel()
            await asyncio.gather(prober, return_exceptions=True)
    if operation.state != "done":
        errors = [f"{step.shard}: {step.error}" for step in operation.steps if step.error]
        raise RuntimeError(f"{wish.kind} {operation.state}: {operation.message} {errors}")
    for move in moves.values():
        _judge(move, load)
    return list(moves.values())


def _note(operation: ops.Operation, moves: dict[str, Move], load: ProbedLoad) -> None:
    now = time.perf_counter()
    current = None
    for step in operation.steps:
        if step.state not in ("done", "failed") and current is None:
            current = step.shard  # the next one is probed before it begins
        if step.state == "pending":
            continue
        move = moves.setdefault(step.shard, Move(step.shard, copying_at=now))
        move.copied_bytes = max(move.copied_bytes, step.done_bytes)
        if not move.copied_at and (step.state != "copying" or _is_copied(step)):
            move.copied_at = now
        if step.state in ("done", "failed") and not move.ended_at:
            move.ended_at = now
    load.shard = current


def _is_copied(step: ops.StepProgress) -> bool:
    return step.total_bytes > 0 and step.done_bytes >= step.total_bytes


def _judge(move: Move, load: ProbedLoad) -> None:
    met = [
        took
        for shard, due, took in load.probes
        if shard == move.shard
        and due + took >= move.copying_at - _POLL_S
        and due <= move.ended_at + _POLL_S
    ]
    move.probes, move.pause_s = len(met), max(met, default=0.0)


async def join(cluster: DevCluster) -> NodeFiles:
    """One more node, let in with a token and ready."""
    node = cluster.place_newcomer()

    def start() -> None:
        with Client(cluster.urls) as connection:
            token = Admin(connection).join_token(node=node.id).token
        cluster.join(node, token)

    await asyncio.to_thread(start)
    return node


async def until_nothing_runs(cluster: DevCluster) -> None:
    """Until no operation is under way, such as what the cluster mends by itself.

    Raises TimeoutError.
    """

    def runs() -> bool:
        with Client(cluster.urls) as connection:
            return any(one.state == "running" for one in Admin(connection).operations())

    async with asyncio.timeout(_OPERATION_S_MAX):
        while await asyncio.to_thread(runs):
            await asyncio.sleep(_POLL_S)


async def broken_invariants(cluster: DevCluster) -> list[str]:
    """What `agentmem cluster check` finds wrong, once the cluster had time to settle."""

    def check() -> list[str]:
        with Client(cluster.urls) as connection:
            found = Admin(connection).check()
        return [f"{one.name}: {one.message}" for one in found if not one.ok]

    deadline = time.monotonic() + _WELL_S_MAX
    while broken := await asyncio.to_thread(check):
        if time.monotonic() >= deadline:
            break
        await asyncio.sleep(_POLL_S)
    return broken
