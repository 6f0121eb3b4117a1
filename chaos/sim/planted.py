"""The harness proof: protections are taken away, in the simulator only, and each must be missed.

A plant is a bug and the worlds to find it in. What it breaks is patched where it is used and put
back afterwards; the code that runs in production knows nothing of it. To add one, add a line to
`PLANTS`: `agentmem-chaos prove` and `tests/sim/test_planted_bugs.py` take it from there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from agentmem_chaos.sim import membership
from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.machine import Effect, MachineStore, Observer, RegisterMachine
from agentmem_chaos.sim.parts import Parts, open_journal
from agentmem_chaos.sim.plan import Engine, Fault, WorldPlan
from agentmem_chaos.sim.runner import quiet
from agentmem_chaos.sim.shard_machine import ShardMachine
from agentmem_chaos.sim.shard_store import ShardStore
from agentmem_chaos.sim.world import World
from agentmem_client.core import Exchange
from agentmem_cluster.epochs import fence
from agentmem_cluster.epochs import machine as epoch_machine
from agentmem_cluster.epochs.commands import Seal, decode
from agentmem_cluster.epochs.conductor import Conductor
from agentmem_cluster.epochs.machine import EpochMachine
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.epochs.replicas import ReplicaSet
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft import following, pysync
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.matching import Accepted, Refused, reconcile
from agentmem_cluster.raft.readindex import ReadIndex
from agentmem_cluster.raft.voice import Voice
from agentmem_node.service.admission import admit
from agentmem_node.storage import environment, restrict
from agentmem_node.storage.ledger import Ledger

CRASHES = {Fault.KILL: 3.0, Fault.POWER_LOSS: 3.0, Fault.POWER_LOSS_ALL: 6.0}
CUTS = {Fault.PARTITION: 3.0, Fault.PARTITION_ONE_WAY: 4.0, Fault.PAUSE: 4.0}
ELECTIONS = {Fault.KILL: 1.0, Fault.BREAK_SESSION: 0.5, Fault.PARTITION: 2.0}
STALLS = {Fault.BREAK_SESSION: 0.5, Fault.SLOW_DISK: 4.0, Fault.KILL: 2.0}
DEPOSED = {Fault.CUT_LEADER: 2.0, Fault.CLOCK_RATE: 2.0}
WORLDS_MAX = 15
SAVE = LocalRecord.save
REMOVE = restrict._remove


@dataclass(frozen=True)
class Worlds:
    """Worlds of seeds 1, 2, .. with what a plan draws replaced by what brings a bug out."""

    faults: Mapping[Fault, float]
    nodes: int = 3
    groups_max: int = 9
    seconds: float = 40.0
    delay_s: tuple[float, float] = (0.0002, 0.004)
    break_after_s: tuple[float, float] = (0.3, 1.0)
    slowness: tuple[float, ...] | None = None
    engine: Engine = Engine.REGISTERS
    core_clients: bool = False
    moves: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, seed: int) -> WorldPlan:
        drawn = WorldPlan.draw(
            seed, nodes=self.nodes, seconds=self.seconds, engine=self.engine, moves=self.moves
        )
        groups = drawn.groups[: self.groups_max]
        return dataclasses.replace(
            drawn,
            # Nobody is preferred, and so elections are contested.
            groups=tuple(dataclasses.replace(group, preferred=None) for group in groups),
            net=dataclasses.replace(
                drawn.net, delay_s=self.delay_s, break_after_s=self.break_after_s
            ),
            fault_every_s=dict(self.faults),
            slowness=self.slowness or (1.0,) * len(drawn.nodes),
            core_clients=self.core_clients,
            **{
                "sync_s": (0.001, 0.01),
                "append_bytes_max": 500,
                "think_s": (0.0, 0.1),
                "clients": 4,
                "quiet_groups": False,
                **self.fields,
            },
        )


@dataclass(frozen=True)
class Plant:
    """`rules`: the violations that may name it first, any of them."""

    protection: str
    bug: str
    rules: frozenset[str]
    worlds: Worlds
    parts: Parts = field(default_factory=Parts)
    planted: Callable[[], AbstractContextManager[Any]] = nullcontext
    worlds_max: int = WORLDS_MAX


@dataclass(frozen=True)
class Found:
    """What became of a plant: `rules` is empty when none of `worlds` was violated."""

    plant: str
    worlds: int
    rules: frozenset[str]
    first: str
    seconds: float

    @property
    def is_found(self) -> bool:
        return bool(self.rules)


def find(plant: Plant) -> Found:
    """Play the plant's worlds until one is violated."""
    begun_s = time.monotonic()
    with quiet(), plant.planted():
        for seed in range(1, plant.worlds_max + 1):
            result = World(plant.worlds.plan(seed), parts=plant.parts).run()
            if not result.passed:
                rules = frozenset(violation.split(" at ")[0] for violation in result.violations)
                first = result.violations[0].splitlines()[0]
                return Found(plant.bug, seed, rules, first, time.monotonic() - begun_s)
    return Found(plant.bug, plant.worlds_max, frozenset(), "", time.monotonic() - begun_s)


# -- Raft and the journal --


def _truncating_what_matches() -> AbstractContextManager[Any]:
    def as_released(
        log: Any, commit: int, previous: int, previous_term: int, terms: Any, commands: Any
    ) -> Accepted | Refused:
        verdict = reconcile(log, commit, previous, previous_term, terms, commands)
        if isinstance(verdict, Accepted) and commit < verdict.verified < log.last_index:
            return dataclasses.replace(verdict, truncate_from=verdict.verified + 1)
        return verdict

    return patch.object(following, "reconcile", as_released)


def _counting_itself() -> AbstractContextManager[Any]:
    """As pysyncobj does: two of three are a majority, and one of the two has it in its cache."""
    return patch.object(
        pysync._SyncObj, "_SyncObj__getCurrentLogIndex", lambda self: self.member.log.last_index
    )


def _voting_twice() -> AbstractContextManager[Any]:
    receive = pysync.Member.receive

    def forgetting_its_vote(member: Any, peer: str, message: dict[str, Any]) -> None:
        if message["type"] == "request_vote":
            member._so._SyncObj__votedForNodeId = None
        receive(member, peer, message)

    return patch.object(pysync.Member, "receive", forgetting_its_vote)


@contextmanager
def _obeying_old_leaders() -> Iterator[None]:
    on_append = following.Following.on_append

    def obeying(self: Any, peer: str, frame: list[Any]) -> bool:
        if not self._member.is_leader:
            frame[4] = max(frame[4], self._member.term)
        return on_append(self, peer, frame)

    with patch.object(following.Following, "on_append", obeying):
        yield


@contextmanager
def _two_are_a_majority() -> Iterator[None]:
    begin = ReadIndex.__init__

    def with_two(reads: ReadIndex, members: int, retry_s: float) -> None:
        begin(reads, members, retry_s)
        reads._majority = min(reads._majority, 2)

    with patch.object(ReadIndex, "__init__", with_two):
        yield


def _lying_disk(disk: SimDisk, plan: WorldPlan) -> Journal:
    disk.honours_sync = False
    return open_journal(disk, plan)


def _forgetful_journal(disk: SimDisk, plan: WorldPlan) -> Journal:
    journal = open_journal(disk, plan)
    for group, epoch in journal.groups():
        log = journal.group(group, epoch)
        if log.last_index >= log.first_index:
            log.truncate_from(log.last_index)
    return journal


# -- state machines --


class WithoutLedger(RegisterMachine):
    keeps_ledger = False


class Opinionated(RegisterMachine):
    """Its result depends on how often this process has been asked: on where it runs."""

    lives = 0

    def __init__(self, store: MachineStore, observe: Observer) -> None:
        super().__init__(store, observe)
        Opinionated.lives += 1
        self.asked = Opinionated.lives

    def _apply_one(self, state: Any, entry: Entry) -> Effect:
        self.asked += 1
        effect = super()._apply_one(state, entry)
        return effect._replace(value=self.asked) if self.asked % 50 == 0 else effect


class ForgetsApplied(RegisterMachine):
    """Applies what it has applied before: an applied index that is not in the same transaction."""

    def apply(self, entries: Any) -> list[Effect]:
        effects = super().apply(entries)
        if len(entries) > 1 and entries[-1].index % 7 == 0:
            super().apply(entries[-1:])
        return effects


class DurableTooSoon(RegisterMachine):
    """Calls durable what a checkpoint has not written yet: the log is compacted too early."""

    @property
    def durable_index(self) -> int:
        return self.applied_index


class Stray(ShardMachine):
    """A replica in whose files a bit rots, while every result stays as it was."""

    lives = 0

    def __init__(self, store: ShardStore, observe: Observer) -> None:
        super().__init__(store, observe)
        Stray.lives += 1
        if Stray.lives == 4:
            apply = self._shard._store.update

            def rotten(doc: int, old: Any, **new: Any) -> Any:
                return apply(doc, old, **{**new, "record": new["record"] + b" "})

            self._shard._store.update = rotten  # type: ignore[method-assign]


@contextmanager
def _from(lives: type[Opinionated] | type[Stray]) -> Iterator[None]:
    lives.lives = 0
    yield


# -- epochs --


def _saved_but_not_synced(record: LocalRecord, disk: Any) -> None:
    honours, disk.honours_sync = disk.honours_sync, False
    try:
        SAVE(record, disk)
    finally:
        disk.honours_sync = honours


def _has_it_in_memory(conductor: Conductor, report: Any, target: Any, seal: Any) -> bool:
    staged = report.staged.get(target.id)
    if staged is not None:
        return bool(staged.seal == seal)
    return report.old is not None and report.old.seal == seal


def _applied_after_the_seal(machine: EpochMachine, entries: Any) -> list[Any]:
    before = machine.inner.epoch_state
    results = machine.inner.apply(entries)
    machine._passed = entries[-1].index
    if machine.inner.epoch_state != before:
        machine._on_change()
    return results


def _either_is_a_seal(command: bytes) -> Any:
    control = decode(command)
    return Seal(control.epoch) if control is not None else None


def _admitted_at_once(record: LocalRecord, view: Any, node: str, disk: Any) -> bool:
    if not record.is_admitted:
        record.is_admitted = True
        record.save(disk)
    return False


def _admitted_when_unknown(record: LocalRecord, view: Any, node: str, disk: Any) -> bool:
    if node in view.nodes:
        return admit(record, view, node, disk)
    return _admitted_at_once(record, view, node, disk)


# -- the client library --


@contextmanager
def _another_key_each_time() -> Iterator[None]:
    headers = Exchange._headers
    attempts = 0

    def drawn_anew(exchange: Exchange[Any], *arguments: Any) -> dict[str, str]:
        nonlocal attempts
        sent = headers(exchange, *arguments)
        if "Idempotency-Key" in sent:
            attempts += 1
            sent["Idempotency-Key"] = f"a{attempts}"
        return sent

    with patch.object(Exchange, "_headers", drawn_anew):
        yield


@contextmanager
def _certainly_not_done() -> Iterator[None]:
    fail = Exchange._fail

    def reassuring(exchange: Exchange[Any], error: Any) -> Any:
        failed = fail(exchange, error)
        error.outcome_unknown = False
        return failed

    with patch.object(Exchange, "_fail", reassuring):
        yield


def _without_versions(
    store: Any, outside: Any, names: Any, key: bytes, doc: int, deleted: int
) -> None:
    """What is removed ahead is remembered, but as if it had never been changed."""
    REMOVE(store, outside, names, key, doc, deleted)
    outside.known[key] = outside.known[key]._replace(version=1)


def _leaving_ids(store: Any, outside: Any, names: Any, key: bytes, doc: int, deleted: int) -> None:
    """All of a memory is removed, but not what leads to it."""
    txn, ids = store.env.txn, store.env.db["ids"]
    row = txn.get(key, db=ids)
    REMOVE(store, outside, names, key, doc, deleted)
    txn.put(key, row, db=ids)


@contextmanager
def _patched(*patches: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def _rules(*names: str) -> frozenset[str]:
    return frozenset(names)


DURABLE = _rules("durable rule", "acknowledged writes survive", "state machine safety")
SAFETY = _rules(
    "state machine safety",
    "leader completeness",
    "durable rule",
    "order of indexes",
    "no exceptions",
)
SHARDS = {Fault.KILL: 2.0, Fault.POWER_LOSS: 2.0, Fault.POWER_LOSS_ALL: 5.0}
CHECKPOINTS = {
    "checkpoint_entries": 20,
    "checkpoint_s": 1.0,
    "tail_bytes": 1,
    "padding_bytes_max": 100_000,
    "state_needs_room": False,
}

MOVING = Worlds(
    {
        Fault.MOVE: 1.5,
        Fault.KILL: 5.0,
        Fault.POWER_LOSS: 5.0,
        Fault.CUT_LEADER: 4.0,
        Fault.BREAK_SESSION: 2.0,
    },
    nodes=4,
    seconds=50.0,
    moves=True,
)
SPLITTING = dataclasses.replace(
    MOVING,
    engine=Engine.SHARD,
    faults={Fault.SPLIT: 4.0, Fault.MOVE: 4.0, Fault.KILL: 8.0, Fault.BREAK_SESSION: 4.0},
)
REWINDING = dataclasses.replace(
    MOVING,
    faults={Fault.REWIND: 2.0, Fault.MOVE: 6.0, Fault.KILL: 6.0, Fault.CUT_LEADER: 6.0},
)
LOSING = dataclasses.replace(MOVING, faults={Fault.MOVE: 2.0, Fault.LOSE_DISK: 4.0})

PLANTS: tuple[Plant, ...] = (
    Plant(
        "fsync before send",
        "frames leave before the journal is synced",
        DURABLE,
        Worlds(CRASHES),
        Parts(syncs_before_it_speaks=False),
    ),
    Plant(
        "fsync before send",
        "promises do not wait for their flush",
        _rules("durable rule"),
        Worlds(CRASHES),
        planted=lambda: patch.object(Voice, "promise", Voice.say),
    ),
    Plant(
        "fsync before send",
        "a leader counts itself for what it has not synced",
        _rules("durable rule", "state machine safety", "order of indexes"),
        Worlds(STALLS, slowness=(1.0, 30.0, 1.0)),
        planted=_counting_itself,
    ),
    Plant(
        "fsync before send",
        "a truncation forgets that a flush is under way",
        _rules("durable rule"),
        Worlds(
            {Fault.CUT_LEADER: 1.5},
            slowness=(50.0, 50.0, 1.0, 1.0, 1.0),
            delay_s=(0.02, 0.2),
            nodes=5,
            groups_max=1,
            break_after_s=(4.0, 6.0),
            fields={
                "sync_s": (0.004, 0.01),
                "append_bytes_max": 1 << 20,
                "inflight_appends_max": 256,
                "think_s": (0.0, 0.05),
            },
        ),
        planted=lambda: patch.object(Journal, "truncated", lambda self, group: None),
        worlds_max=30,
    ),
    Plant(
        "fsync before send",
        "a disk that lies about syncs",
        DURABLE | _rules("recovery"),
        Worlds(CRASHES),
        Parts(open_journal=_lying_disk),
    ),
    Plant(
        "conflict-only truncation",
        "entries that match are truncated",
        SAFETY | DURABLE | _rules("no stop without cause"),
        Worlds(STALLS),
        planted=_truncating_what_matches,
    ),
    Plant(
        "term stamps",
        "a leader of an older term is obeyed",
        SAFETY | DURABLE | _rules("no stop without cause", "linearizability"),
        Worlds(DEPOSED),
        planted=_obeying_old_leaders,
    ),
    Plant(
        "one vote a term",
        "a second vote is cast in a term",
        # The journal itself refuses to write a second vote, which stops the node.
        _rules("election safety", "state machine safety", "no stop without cause"),
        Worlds(ELECTIONS, delay_s=(0.01, 0.12)),
        planted=_voting_twice,
        worlds_max=30,
    ),
    Plant(
        "ledger",
        "registers keep no ledger",
        _rules("exactly once"),
        Worlds(CRASHES | CUTS),
        Parts(make_machine=WithoutLedger),
    ),
    Plant(
        "ledger",
        "the shard's ledger finds nothing",
        _rules("exactly once"),
        Worlds(CRASHES | CUTS, engine=Engine.SHARD),
        planted=lambda: patch.object(Ledger, "find", lambda self, tenant, request: None),
    ),
    Plant(
        "read index",
        "reads are answered without a quorum round",
        _rules("stale reads", "linearizability"),
        Worlds(CUTS),
        Parts(confirms_reads=False),
    ),
    Plant(
        "read index",
        "a new leader reads before it knows what is committed",
        _rules("stale reads", "linearizability"),
        Worlds(ELECTIONS),
        planted=lambda: patch.object(pysync.Member, "noop_index", property(lambda self: 0)),
        worlds_max=30,
    ),
    Plant(
        "read index",
        "a read round takes two of five for a majority",
        _rules("stale reads", "linearizability"),
        Worlds(
            DEPOSED,
            nodes=5,
            seconds=30.0,
            fields={"keys_per_group": 1, "clients": 6, "think_s": (0.0, 0.03)},
        ),
        planted=_two_are_a_majority,
        worlds_max=30,
    ),
    Plant(
        "digest",
        "a replica computes another result",
        _rules("equal digests"),
        Worlds(CRASHES | CUTS),
        Parts(make_machine=Opinionated),
        planted=lambda: _from(Opinionated),
    ),
    Plant(
        "digest",
        "a replica stores something else and answers the same",
        _rules("equal digests", "liveness"),
        Worlds(CUTS, engine=Engine.SHARD),
        Parts(make_shard=Stray),
        planted=lambda: _from(Stray),
    ),
    Plant(
        "apply once",
        "an entry is applied again after a restart",
        _rules("gapless apply"),
        Worlds(CRASHES | CUTS),
        Parts(make_machine=ForgetsApplied),
    ),
    Plant(
        "checkpoints",
        "the journal loses its last entry",
        SAFETY | DURABLE | _rules("recovery", "honest answers", "linearizability"),
        Worlds(CRASHES),
        Parts(open_journal=_forgetful_journal),
    ),
    Plant(
        "checkpoints",
        "the log is compacted before the state is durable",
        _rules("order of indexes", "recovery"),
        Worlds(CRASHES, fields=CHECKPOINTS),
        Parts(make_machine=DurableTooSoon),
        worlds_max=30,
    ),
    Plant(
        "checkpoints",
        "a shard starts on what its files hold, not on its checkpoint",
        _rules("recovery", "no exceptions", "no stop without cause", "equal digests"),
        Worlds(SHARDS, engine=Engine.SHARD, fields=CHECKPOINTS),
        planted=lambda: patch.object(environment, "restore_metas", lambda *_: None),
    ),
    Plant(
        "client",
        "each attempt has a request id of its own",
        _rules("linearizability", "acknowledged writes survive", "refused means not done"),
        Worlds(CUTS | CRASHES, core_clients=True),
        planted=_another_key_each_time,
    ),
    Plant(
        "client",
        "a call that may have happened is said not to have",
        _rules("refused means not done"),
        Worlds(CUTS | CRASHES, core_clients=True),
        planted=_certainly_not_done,
    ),
    Plant(
        "epochs",
        "an epoch begins while the one before may still be read",
        _rules("fence", "stale reads", "linearizability"),
        # Old and new members must differ, and the old ones learn late that they are.
        dataclasses.replace(
            MOVING,
            nodes=6,
            faults={
                Fault.MOVE: 1.0,
                Fault.PARTITION: 1.5,
                Fault.PAUSE: 1.0,
                Fault.BREAK_SESSION: 0.5,
            },
        ),
        planted=lambda: patch.object(fence, "is_fenced", lambda *_: True),
        worlds_max=30,
    ),
    Plant(
        "epochs",
        "the record of what a node takes part in is not synced",
        _rules("promises on disk", "fence", "amnesia", "recovery"),
        MOVING,
        planted=lambda: patch.object(LocalRecord, "save", _saved_but_not_synced),
    ),
    Plant(
        "epochs",
        "an epoch is founded before a majority has its first state on disk",
        _rules("founded on a majority"),
        dataclasses.replace(MOVING, fields={"sync_s": (0.02, 0.06)}),
        planted=lambda: patch.object(Conductor, "_has_final", _has_it_in_memory),
    ),
    Plant(
        "epochs",
        "what follows the seal in the log is applied",
        SAFETY | _rules("liveness", "gapless apply", "equal digests", "no stop without cause"),
        dataclasses.replace(MOVING, fields={"think_s": (0.0, 0.02), "clients": 7}),
        planted=lambda: patch.object(EpochMachine, "apply", _applied_after_the_seal),
    ),
    Plant(
        "epochs",
        "the beginning of an epoch is taken for its end",
        SAFETY | _rules("gapless apply", "equal digests", "stale reads", "honest answers"),
        # It takes a leader that changes while its epoch begins.
        dataclasses.replace(
            MOVING,
            faults={
                Fault.MOVE: 1.0,
                Fault.CUT_LEADER: 1.0,
                Fault.KILL: 3.0,
                Fault.POWER_LOSS_ALL: 4.0,
            },
        ),
        planted=lambda: patch.object(epoch_machine, "decode", _either_is_a_seal),
        worlds_max=40,
    ),
    Plant(
        "epochs",
        "a node that lost its disk takes part in the epochs that it has forgotten",
        _rules("amnesia"),
        LOSING,
        planted=lambda: patch.object(membership, "admit", _admitted_at_once),
    ),
    Plant(
        "epochs",
        "a disk takes part before the cluster knows it",
        _rules("amnesia"),
        dataclasses.replace(LOSING, faults={Fault.LOSE_DISK: 1.0, Fault.CUT_LEADER: 1.0}),
        planted=lambda: patch.object(membership, "admit", _admitted_when_unknown),
        worlds_max=40,
    ),
    Plant(
        "splits",
        "a part forgets versions of what it was rid of ahead",
        _rules("equal digests", "base is the final state"),
        SPLITTING,
        planted=lambda: patch.object(restrict, "_remove", _without_versions),
    ),
    Plant(
        "splits",
        "a part keeps what is the other's",
        _rules("a part has its own"),
        SPLITTING,
        planted=lambda: patch.object(restrict, "_remove", _leaving_ids),
    ),
    Plant(
        "rewinds",
        "what comes out of a backup does not take the place of the epoch that it ends",
        _rules("no exceptions"),
        REWINDING,
        planted=lambda: patch.object(ReplicaSet, "_is_restored", lambda *_: False),
    ),
    Plant(
        "epochs",
        "a change waits for a member that will never come",
        _rules("liveness"),
        LOSING,
        planted=lambda: patch.object(Conductor, "_may_come", lambda *_: True),
        worlds_max=40,
    ),
)
