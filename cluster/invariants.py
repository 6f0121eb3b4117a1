"""What must hold of a cluster, checked from what its map says and its nodes report.

Pure. The answer has every check once, in a fixed order, so that what is printed can be compared
from one day to the next. A check that fails says which shard or node, and what to do where that
is not plain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from agentmem_cluster.nodestate import Nodes, NodeState, majority, states_of
from agentmem_cluster.ring import SLOTS
from agentmem_cluster.shardmap import ShardMap
from agentmem_cluster.zones import fair_shares, fits, load_bounds, zone_ranges

LAG_MAX = 1_000
_FAULTS_SHOWN_MAX = 3


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a node says of one replica that it has open."""

    shard: str
    epoch: int
    applied_index: int
    digest: bytes  # of all that was applied up to `applied_index`
    is_leader: bool
    term: int
    lag: int  # entries that are committed, as far as the node knows, and not applied
    needs_reseed: bool
    is_sealed: bool = False  # its epoch is over: it serves nobody, and goes away
    is_damaged: bool = False  # something in it is not what was written


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    ok: bool
    message: str


Reports = Mapping[str, Sequence[ReplicaReport]]


def check_cluster(
    map: ShardMap,
    nodes: Nodes,
    reports: Reports,
    replication: int,
    voters: Sequence[str],
    *,
    lag_max: int = LAG_MAX,
) -> list[Finding]:
    """Every check, held or not. `reports` is by node; a node that did not answer is not in it.

    `voters` are those of the meta group, `lag_max` is in entries.
    """
    view = _View(map, states_of(nodes, map), reports)
    return [
        _slots(map),
        _replication(view, replication),
        _answers(view),
        _quorums(view),
        _epochs(view),
        _leaders(view),
        _digests(view),
        _freshness(view, lag_max),
        _leftovers(view),
        _zones(view, replication),
        _loads(view, replication),
        _meta_group(view, voters),
    ]


class _View:
    def __init__(self, map: ShardMap, states: Mapping[str, NodeState], reports: Reports) -> None:
        self.map = map
        self.states = states
        self.reports = reports
        self.active = {n: state.zone for n, state in states.items() if state.is_active}

    def open_replicas(self) -> Iterable[tuple[str, ReplicaReport]]:
        """(node, report) of every replica whose epoch is not over, by node."""
        for node in sorted(self.reports):
            for report in self.reports[node]:
                if not report.is_sealed:
                    yield node, report

    def is_current(self, node: str, report: ReplicaReport) -> bool:
        info = self.map.shards.get(report.shard)
        return info is not None and report.epoch == info.epoch and node in info.members

    def current_replicas(self) -> dict[str, dict[str, ReplicaReport]]:
        """By shard and node, the replicas that the map speaks of."""
        found: dict[str, dict[str, ReplicaReport]] = {name: {} for name in self.map.shards}
        for node, report in self.open_replicas():
            if self.is_current(node, report):
                found[report.shard][node] = report
        return found


def _finding(name: str, faults: Sequence[str], holds: str) -> Finding:
    if not faults:
        return Finding(name, True, f"{holds}.")
    shown = "; ".join(faults[:_FAULTS_SHOWN_MAX])
    more = len(faults) - _FAULTS_SHOWN_MAX
    return Finding(name, False, f"{shown}; and {more} more." if more > 0 else f"{shown}.")


def _slots(map: ShardMap) -> Finding:
    faults, covered = [], 0
    for info in sorted(map.shards.values(), key=lambda s: (s.slot_start, s.slot_end)):
        if info.slot_start > covered:
            faults.append(f"no shard has slots {covered} to {info.slot_start - 1}")
        if info.slot_start < covered:
            faults.append(f"{info.id} and another shard both have slot {info.slot_start}")
        covered = max(covered, info.slot_end)
    if covered < SLOTS:
        faults.append(f"no shard has slots {covered} to {SLOTS - 1}")
    return _finding("slots", faults, f"each of {SLOTS} slots has one of {len(map.shards)} shards")


def _replication(view: _View, replication: int) -> Finding:
    room = len(view.active)
    advice = f" (nodes that can hold one: {room}, add another)" if room < replication else ""
    faults = []
    for info in view.map.shards.values():
        have = sum(not view.states[n].is_lost for n in info.members)
        if have < replication:
            faults.append(f"{info.id} has {have} replicas of {replication}{advice}")
        elif len(info.members) > replication:
            faults.append(f"{info.id} has {len(info.members)} replicas, {replication} are wanted")
    return _finding("replication", faults, f"every shard has {replication} replicas")


def _answers(view: _View) -> Finding:
    current = view.current_replicas()
    silent = [n for n in view.states if n not in view.reports]
    faults = [f"{node} does not answer" for node in silent]
    for info in view.map.shards.values():
        faults += [
            f"{node} has not opened its replica of {info.id} at epoch {info.epoch}"
            for node in info.members
            if node in view.reports and node not in current[info.id]
        ]
    return _finding("answers", faults, f"all {len(view.states)} nodes answer with their replicas")


def _quorums(view: _View) -> Finding:
    current = view.current_replicas()
    faults = []
    for info in view.map.shards.values():
        # A node that is up but has not opened its replica does not vote.
        votes = [
            n
            for n in info.members
            if view.states[n].is_live and (n not in view.reports or n in current[info.id])
        ]
        need = majority(info.members)
        if len(votes) < need:
            gone = ", ".join(n for n in info.members if n not in votes)
            faults.append(
                f"{info.id} has {len(votes)} of {len(info.members)} replicas live and needs "
                f"{need}: bring back {gone}"
            )
    return _finding("quorum", faults, "every shard has a live majority")


def _epochs(view: _View) -> Finding:
    faults = []
    for node, report in view.open_replicas():
        info = view.map.shards.get(report.shard)
        if report.is_leader and (info is None or report.epoch != info.epoch):
            says = "does not have it" if info is None else f"says {info.epoch}"
            faults.append(
                f"{node} serves {report.shard} at epoch {report.epoch}, and the map {says}"
            )
    return _finding("epochs", faults, "no shard is served at an epoch other than the map's")


def _leaders(view: _View) -> Finding:
    leaders: dict[tuple[str, int], list[tuple[int, str]]] = {
        (name, info.epoch): [] for name, info in view.map.shards.items()
    }
    for node, report in view.open_replicas():
        if report.is_leader:
            leaders.setdefault((report.shard, report.epoch), []).append((report.term, node))
    faults = []
    for (shard, epoch), found in sorted(leaders.items()):
        found.sort()
        terms = Counter(term for term, _ in found)
        where = f"{shard} at epoch {epoch}"
        if not found:
            faults.append(f"{where} has no leader")
        for term, count in terms.items():
            if count > 1:
                both = " and ".join(node for t, node in found if t == term)
                faults.append(f"{both} both lead {where} in term {term}")
        faults += [
            f"{node} takes itself for the leader of {where} in term {term}, "
            f"and {found[-1][1]} leads in term {found[-1][0]}"
            for term, node in found
            if term < found[-1][0]
        ]
    return _finding("leaders", faults, "every shard has one leader")


def _digests(view: _View) -> Finding:
    same: dict[tuple[str, int, int], dict[bytes, list[str]]] = defaultdict(dict)
    for node, report in view.open_replicas():
        key = (report.shard, report.epoch, report.applied_index)
        same[key].setdefault(report.digest, []).append(node)
    faults = []
    for (shard, _, index), groups in sorted(same.items()):
        if len(groups) > 1:
            sides = sorted(groups.values(), key=lambda side: (-len(side), side))
            odd = [node for side in sides[1:] for node in side]
            verb = "differs" if len(odd) == 1 else "differ"
            told = f"{', '.join(odd)} {verb} from {', '.join(sides[0])}"
            faults.append(f"{shard} at index {index}: {told}")
    compared = sum(len(nodes) > 1 for groups in same.values() for nodes in groups.values())
    return _finding(
        "digests",
        faults,
        f"replicas at the same index are equal ({compared} of {len(view.map.shards)} shards had "
        "some to compare)",
    )


def _freshness(view: _View, lag_max: int) -> Finding:
    faults = []
    for node, report in view.open_replicas():
        if not view.is_current(node, report):
            continue
        if report.is_damaged:
            faults.append(f"{node} has a damaged replica of {report.shard}, to be made anew")
        elif report.needs_reseed:
            faults.append(f"{node} needs {report.shard} to be re-seeded")
        elif report.lag > lag_max:
            faults.append(f"{node} is {report.lag:,} entries behind in {report.shard}")
    return _finding("freshness", faults, f"no replica is more than {lag_max:,} entries behind")


def _leftovers(view: _View) -> Finding:
    faults = []
    for node, report in view.open_replicas():
        if not view.is_current(node, report) and not report.is_leader:
            info = view.map.shards.get(report.shard)
            where = "on no node" if info is None else f"on {', '.join(info.members)}"
            at = "" if info is None else f" at epoch {info.epoch}"
            faults.append(
                f"{node} still has {report.shard} at epoch {report.epoch}, which is {where}{at}"
            )
    return _finding("leftovers", faults, "no node has a replica that it should not have")


def _zones(view: _View, replication: int) -> Finding:
    if len(set(view.active.values())) < 2:
        return Finding("zones", True, "Nodes are in one zone, or carry no labels.")
    copies = min(replication, len(view.active))
    ranges = zone_ranges(view.active, copies)
    faults = []
    for info in view.map.shards.values():
        zones = [view.active[n] for n in info.members if n in view.active]
        if not fits(zones, ranges, max(copies, len(zones))):
            zone, count = Counter(sorted(zones)).most_common(1)[0]
            where = f"in zone {zone}" if zone else "on nodes without a label"
            faults.append(
                f"{info.id} has {count} of {len(zones)} replicas {where}, and other zones could "
                "take some: rebalance"
            )
    return _finding("zones", faults, f"shards are spread over {len(ranges)} zones")


def _loads(view: _View, replication: int) -> Finding:
    if not view.active:
        return Finding("load", False, "No node can hold replicas.")
    copies = min(replication, len(view.active))
    shares = fair_shares(view.active, len(view.map.shards), copies)
    faults = []
    for node, share in shares.items():
        least, most = load_bounds(share)
        load = len(view.map.shards_of_node(node))
        if not least <= load <= most:
            faults.append(f"{node} has {load} replicas, and {least} to {most} are its part")
    if not faults:
        return Finding("load", True, "every node has its part of the replicas.")
    # Advice: a cluster that has just grown, or a shard that was split, is uneven and well.
    advice = _finding("load", [f"{faults[0]}: rebalance", *faults[1:]], "").message
    return Finding("load", True, f"Uneven: {advice}")


def _meta_group(view: _View, voters: Sequence[str]) -> Finding:
    faults = []
    alive = [n for n in voters if n in view.states and view.states[n].is_live]
    if len(alive) < majority(voters):
        gone = ", ".join(sorted(set(voters) - set(alive))) or "a voter"
        faults.append(
            f"{len(alive)} of {len(voters)} voters are up and {majority(voters)} are needed: "
            f"bring back {gone}"
        )
    if len(voters) % 2 == 0:
        faults.append(f"{len(voters)} voters are an even number: one of them adds no safety")
    if len(voters) < 3 <= len(view.active):
        faults.append(f"only {len(voters)} of {len(view.active)} nodes can vote, 3 or 5 should")
    return _finding("meta group", faults, f"{len(alive)} of {len(voters)} voters are up")
