"""The cluster as its nodes tell it: one digest, one epoch, one answer from every replica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentmem_chaos.checkers.base import Evidence, Finding, Stored, finding

NO_VIEWS = "not every node told its view of the cluster at the end"
DIGESTS = "digests"
DIGESTS_CLAIM = "replicas of a shard at the same index have the same digest"
EPOCHS = "one-epoch"
EPOCHS_CLAIM = "all nodes see one shard map: version, epochs and members"
REPLICAS = "replicas"
REPLICAS_CLAIM = "every node's own replica lists exactly what a linearizable list does"
CRASHES = "crashes"
CRASHES_CLAIM = "no node ends by itself unless its disk fails or its data is damaged"
CONVERGES = "converges"
DAMAGE = "damage"
DAMAGE_CLAIM = "a node whose files are damaged recovers, or refuses in words that name the file"


def digests_of(views: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[int, str]]]:
    """Shard to node to (applied index, digest), of replicas that a node has itself."""
    found: dict[str, dict[str, tuple[int, str]]] = {}
    for node, view in views.items():
        for shard, told in view["shards"].items():
            if "digest" in told:
                applied = int(told["applied"][node])
                found.setdefault(f"{shard}-e{told['epoch']}", {})[node] = (applied, told["digest"])
    return found


def digests(evidence: Evidence) -> Finding:
    if evidence.views is None:
        return finding(DIGESTS, DIGESTS_CLAIM, 0, [], unknown=NO_VIEWS)
    violations, behind = [], []
    looked_at = 0
    for shard, replicas in digests_of(evidence.views).items():
        by_index: dict[int, set[str]] = {}
        for applied, digest in replicas.values():
            by_index.setdefault(applied, set()).add(digest)
        looked_at += len(replicas)
        if any(len(different) > 1 for different in by_index.values()):
            told = {node: f"{at} {digest[:12]}" for node, (at, digest) in replicas.items()}
            violations.append(f"shard {shard}: {told}")
        elif len(by_index) > 1:
            behind.append(f"{shard} is at {sorted(by_index)}")
    unknown = f"replicas did not catch up: {'; '.join(behind)}" if behind else ""
    return finding(DIGESTS, DIGESTS_CLAIM, looked_at, violations, unknown=unknown)


def one_epoch(evidence: Evidence) -> Finding:
    if evidence.views is None:
        return finding(EPOCHS, EPOCHS_CLAIM, 0, [], unknown=NO_VIEWS)
    seen: dict[str, list[str]] = {}
    for node, view in evidence.views.items():
        shards = {s: (v["epoch"], sorted(v["members"])) for s, v in sorted(view["shards"].items())}
        seen.setdefault(f"version {view['version']}: {shards}", []).append(node)
    violations = []
    if len(seen) > 1:
        violations = [f"{' '.join(nodes)}: {what[:300]}" for what, nodes in seen.items()]
    return finding(EPOCHS, EPOCHS_CLAIM, len(evidence.views), violations)


def replicas(evidence: Evidence) -> Finding:
    if evidence.inventory is None or evidence.replicas is None:
        unknown = "the memories could not be listed at the end"
        return finding(REPLICAS, REPLICAS_CLAIM, 0, [], unknown=unknown)
    violations, unknown = [], ""
    looked_at = 0
    for node, inventory in evidence.replicas.items():
        if isinstance(inventory, str):
            # A refusal may pass; an internal error says that the replica cannot be read.
            if inventory.startswith("500"):
                violations.append(f"{node} cannot list what it has: {inventory}")
            unknown = f"{node} did not list what it has: {inventory}"
            continue
        for owner, expected in evidence.inventory.items():
            looked_at += len(expected)
            difference = _difference(expected, inventory.get(owner, ()))
            if difference:
                violations.append(f"{node}, {owner}: {difference}")
    return finding(REPLICAS, REPLICAS_CLAIM, looked_at, violations, unknown=unknown)


def _difference(expected: Any, found: Any) -> str:
    wanted: set[Stored] = set(expected)
    there: set[Stored] = set(found)
    parts = []
    if missing := wanted - there:
        parts.append(f"{len(missing)} missing, as {sorted(m.content for m in missing)[:3]}")
    if extra := there - wanted:
        parts.append(f"{len(extra)} too many, as {sorted(m.content for m in extra)[:3]}")
    return "; ".join(parts)


def crashes(evidence: Evidence) -> Finding:
    violations = [
        f"{crash.node} ended at {crash.at_s:.1f} s:\n{crash.log_tail}" for crash in evidence.crashes
    ]
    return finding(CRASHES, CRASHES_CLAIM, 1, violations)


def damage(evidence: Evidence) -> Finding:
    """A refusal is loud when it names what is damaged and is no crash."""
    violations = []
    for one in evidence.damages:
        what = f"{one.file} of {one.node} ({one.how})"
        ending = one.said[-1_500:]
        if one.outcome == "hung":
            violations.append(f"{what}: neither ready nor ended:\n{ending}")
        elif one.outcome == "refused":
            folder, _, file = one.file.rpartition("/")
            if one.exit_code is not None and one.exit_code < 0:
                violations.append(f"{what}: killed by signal {-one.exit_code}:\n{ending}")
            elif "Traceback" in one.said:
                violations.append(f"{what}: refused with a traceback:\n{ending}")
            elif file not in one.said and folder not in one.said:
                violations.append(f"{what}: the refusal does not name it:\n{ending}")
    return finding(DAMAGE, DAMAGE_CLAIM, len(evidence.damages), violations)


def converges(evidence: Evidence) -> Finding:
    claim = f"within {evidence.converge_s_max:g} s of healing, every node is ready"
    violations = list(evidence.trouble)
    if evidence.converged_s is None and not violations:
        violations = ["it did not"]
    return finding(CONVERGES, claim, 1, violations)
