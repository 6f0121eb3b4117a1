"""A node ends at each point of a move: there is one serving epoch afterwards, and nothing is lost.

The move is completed or given up, within 20 s of the node's return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from agentmem_cluster import failpoints
from tests.failpoints.cluster import IS_LONG, FaultyCluster, Load, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]

OPERATION_S = 20.0


@dataclass(frozen=True)
class Move:
    """`source`: whom the conductor has the joiner copy from, a follower before the leader."""

    shard: str
    joiner: str
    leaver: str
    stayers: list[str]
    leader: str
    source: str
    conductor: str

    @property
    def wish(self) -> dict[str, str]:
        return {
            "kind": "move",
            "shard": self.shard,
            "node": self.joiner,
            "away_from": self.leaver,
        }


def planned(cluster: FaultyCluster, shard: str) -> Move:
    views = cluster.views()
    members = next(iter(views.values()))["map"][shard][1]
    leader = next(name for name, view in views.items() if shard in view["leads"])
    shards = next(iter(views.values()))["map"].values()
    holds = {name: sum(name in nodes for _, nodes in shards) for name in cluster.names}
    # Whoever has most, so that the shares stay even.
    leaver = max((name for name in members if name != leader), key=lambda name: holds[name])
    return Move(
        shard=shard,
        joiner=next(name for name in cluster.names if name not in members),
        leaver=leaver,
        stayers=[name for name in members if name != leaver],
        leader=leader,
        source=min(name for name in members if name != leader),
        conductor=next(name for name, view in views.items() if view["leads_meta"]),
    )


Role = Callable[[Move], list[str]]
ROLES: dict[str, Role] = {
    "conductor": lambda move: [move.conductor],
    "joiner": lambda move: [move.joiner],
    "source": lambda move: [move.source],
    "leaver": lambda move: [move.leaver],
    "leader": lambda move: [move.leader],
    "stayer": lambda move: move.stayers[:1],
    # Whoever leads the new epoch: the first of them.
    "founder": lambda move: [move.joiner, *move.stayers],
}

SHORT = [
    ("conductor", "changes.after_found"),
    ("joiner", "replicas.after_record"),
    ("leader", "epoch.after_seal"),
]
LONG = [
    ("joiner", "copying.after_chunk"),
    *(
        ("conductor", f"changes.{when}_{step}")
        for step in ("begin", "stage", "seal", "found", "finish")
        for when in ("before", "after")
        if (when, step) != ("after", "found")
    ),
    ("conductor", "meta.before_rename"),
    ("conductor", "meta.after_rename"),
    *(("source", f"copying.source_{what}") for what in ("open", "chunk", "tail")),
    ("joiner", "copying.after_open"),
    ("joiner", "copying.before_finish"),
    ("joiner", "copying.before_rename"),
    ("joiner", "copying.after_rename"),
    ("joiner", "copying.after_tail"),
    ("joiner", "copying.after_complete"),
    *(("joiner", f"record.{when}") for when in ("before_write", "after_write", "after_rename")),
    *(("joiner", f"view.{when}") for when in ("before_write", "after_write", "after_rename")),
    ("joiner", "replicas.before_record"),
    ("joiner", "replicas.after_add_group"),
    ("stayer", "replicas.before_record"),
    ("stayer", "replicas.after_record"),
    ("stayer", "replicas.after_stop"),
    ("stayer", "replicas.after_add_group"),
    ("leaver", "replicas.before_close"),
    ("leaver", "replicas.after_close"),
    ("leaver", "replicas.after_leave"),
    ("leader", "epoch.before_seal"),
    ("founder", "epoch.after_fence"),
    ("founder", "epoch.after_begin"),
]
CASES = [*SHORT, *LONG] if IS_LONG else SHORT


def begin(cluster: FaultyCluster, wish: dict[str, str], armed: list[str]) -> str:
    """Begin it through a node that is to live, if there is one. Returns the operation's id.

    The meta group's leader may end before it answers: then it was begun, or is begun again.
    """
    through = [*(n for n in cluster.names if n not in armed), *armed][0]
    said: list[Any] = []

    def begun() -> str | None:
        for view in cluster.views().values():
            for operation, state in view["operations"].items():
                if operation not in before and state != "stopped":
                    return str(operation)
        said[:] = [cluster.command(through, "begin", wish=wish)]
        found: str | None = said[0].get("id")
        return found

    before = {one for view in cluster.views().values() for one in view["operations"]}
    return until(begun, OPERATION_S, lambda: f"it is begun: {said}")


def over(cluster: FaultyCluster, operation: str) -> str:
    """How it ended."""

    def state() -> str | None:
        for view in cluster.views().values():
            found: str = view["operations"].get(operation, "")
            if found in ("done", "failed"):
                return found
        return None

    return until(state, OPERATION_S, lambda: f"{operation} ends: {cluster.views()}")


def check(cluster: FaultyCluster, move: Move, state: str) -> None:
    """The shard is where it was to go, or where it was."""
    cluster.soundly()
    view: dict[str, Any] = cluster.command(cluster.names[0], "look")
    members = view["map"][move.shard][1]
    if state == "done":
        assert members == sorted([move.joiner, *move.stayers])
    else:
        assert members == sorted([move.leaver, *move.stayers])


@pytest.mark.parametrize(("role", "point"), CASES)
def test_a_crash_during_a_move_leaves_one_serving_epoch(
    cluster: FaultyCluster, role: str, point: str
) -> None:
    move = planned(cluster, f"s0{CASES.index((role, point)) % 2}")
    armed = ROLES[role](move)
    with Load(cluster.urls, f"{role}-{point}") as load:
        for name in armed:
            cluster.command(name, "arm", plan=f"{point}=crash")
        operation = begin(cluster, move.wish, armed)
        cluster.any_ends_at(point)
        for name in armed:
            if not cluster.crashed(name, point):
                cluster.disarm(name)
        for name in armed:
            if cluster.crashed(name, point):
                cluster.restart(name)
        state = over(cluster, operation)
        load.more(10)
    check(cluster, move, state)
    load.nothing_is_lost(cluster.urls)


def test_a_move_is_completed_although_every_node_is_slow_at_every_point(
    cluster: FaultyCluster,
) -> None:
    move = planned(cluster, "s00")
    with Load(cluster.urls, "slow") as load:
        for number, name in enumerate(cluster.names):
            slow = ";".join(f"{point}=delay:0.05%0.02" for point in failpoints.POINTS)
            cluster.command(name, "arm", plan=f"seed={number};{slow}")
        try:
            state = over(cluster, begin(cluster, move.wish, []))
            load.more(10)
        finally:
            for name in cluster.names:
                cluster.disarm(name)
    assert state == "done"
    check(cluster, move, state)
    load.nothing_is_lost(cluster.urls)


FULL_SHORT = [("joiner", "record.before_write")]
FULL_LONG = [
    ("joiner", "record.after_write"),
    ("stayer", "record.before_write"),
    ("leaver", "record.after_write"),
    ("joiner", "copying.after_chunk"),
    ("joiner", "copying.before_finish"),
    ("joiner", "checkpoint.before_rename"),
    ("joiner", "view.before_write"),
    ("joiner", "view.after_write"),
    ("conductor", "meta.before_rename"),
    ("stayer", "checkpoint.before_rename"),
]


@pytest.mark.parametrize(("role", "point"), [*FULL_SHORT, *FULL_LONG] if IS_LONG else FULL_SHORT)
def test_a_disk_that_is_full_during_a_move_is_waited_out(
    cluster: FaultyCluster, role: str, point: str
) -> None:
    move = planned(cluster, "s00")
    victims = ROLES[role](move)
    with Load(cluster.urls, f"full-{role}-{point}") as load:
        for name in victims:
            cluster.command(name, "arm", plan=f"{point}=error:ENOSPC")
        operation = begin(cluster, move.wish, victims)
        for name in victims:
            cluster.met(name, point)
        load.more(50)  # the cluster serves, whatever one node cannot write
        for name in victims:
            cluster.disarm(name)
        state = over(cluster, operation)
        load.more(10)
    check(cluster, move, state)
    assert all(cluster.is_running(name) for name in victims)
    load.nothing_is_lost(cluster.urls)
