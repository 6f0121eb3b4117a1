"""The harness is worth what it catches: bugs are planted, and each must be caught by its rule."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agentmem_chaos.sim.disk import SimDisk
from agentmem_chaos.sim.machine import Effect, MachineState, MachineStore, Observer, RegisterMachine
from agentmem_chaos.sim.parts import Parts, open_journal
from agentmem_chaos.sim.plan import Fault, WorldPlan
from agentmem_chaos.sim.world import World
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.raft import following, pysync
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.core import NodeCore
from agentmem_cluster.raft.matching import Accepted, Refused, reconcile
from agentmem_cluster.raft.voice import Voice

WORLDS_MAX = 15
CRASHES = {Fault.KILL: 3.0, Fault.POWER_LOSS: 3.0, Fault.POWER_LOSS_ALL: 6.0}
CUTS = {Fault.PARTITION: 3.0, Fault.PARTITION_ONE_WAY: 4.0, Fault.PAUSE: 4.0}
ELECTIONS = {Fault.KILL: 1.0, Fault.BREAK_SESSION: 0.5, Fault.PARTITION: 2.0}
STALLS = {Fault.BREAK_SESSION: 0.5, Fault.SLOW_DISK: 4.0, Fault.KILL: 2.0}


def caught(
    parts: Parts,
    faults: dict[Fault, float],
    worlds: int = WORLDS_MAX,
    slowness: tuple[float, float, float] = (1.0, 1.0, 1.0),
    delay_s: tuple[float, float] = (0.0002, 0.004),
) -> set[str]:
    """The rules that the first violated world names. Worlds run until one is."""
    for seed in range(1, worlds + 1):
        drawn = WorldPlan.draw(seed, nodes=3, seconds=40.0)
        plan = dataclasses.replace(
            drawn,
            # Nobody is preferred, and so elections are contested.
            groups=tuple(dataclasses.replace(group, preferred=None) for group in drawn.groups),
            net=dataclasses.replace(drawn.net, delay_s=delay_s),
            fault_every_s=faults,
            slowness=slowness,
            sync_s=(0.001, 0.01),
            append_bytes_max=500,
            think_s=(0.0, 0.1),
            clients=4,
        )
        result = World(plan, parts=parts).run()
        if not result.passed:
            return {violation.split(" at ")[0] for violation in result.violations}
    return set()


@pytest.mark.parametrize("faults", [CRASHES, CUTS, STALLS])
def test_without_a_planted_bug_these_worlds_are_clean(faults: dict[Fault, float]) -> None:
    assert caught(Parts(), faults, worlds=2) == set()


def test_speaking_before_the_sync_is_caught() -> None:
    assert caught(Parts(syncs_before_it_speaks=False), CRASHES) & {
        "durable rule",
        "acknowledged writes survive",
        "state machine safety",
    }


def test_a_promise_that_leaves_before_its_flush_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Voice, "promise", Voice.say)
    assert caught(Parts(), CRASHES) == {"durable rule"}


def test_a_leader_that_counts_itself_for_what_it_has_not_synced_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As pysyncobj does: two of three are a majority, and one of the two has it in its cache."""
    monkeypatch.setattr(
        pysync._SyncObj, "_SyncObj__getCurrentLogIndex", lambda self: self.member.log.last_index
    )
    assert caught(Parts(), STALLS, slowness=(1.0, 30.0, 1.0)) & {
        "durable rule",
        "state machine safety",
    }


def test_a_new_leader_that_reads_before_it_knows_what_is_committed_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pysync.Member, "noop_index", property(lambda self: 0))
    assert caught(Parts(), ELECTIONS, worlds=30) == {"linearizability"}


def test_a_disk_that_lies_about_syncs_is_caught() -> None:
    def lying(disk: SimDisk, plan: WorldPlan) -> Journal:
        disk.honours_sync = False
        return open_journal(disk, plan)

    assert caught(Parts(open_journal=lying), CRASHES)


def test_a_read_without_a_quorum_round_is_caught() -> None:
    assert caught(Parts(confirms_reads=False), CUTS) == {"linearizability"}


def test_truncating_entries_that_match_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_released(
        log: Any, commit: int, previous: int, previous_term: int, terms: Any, commands: Any
    ) -> Accepted | Refused:
        verdict = reconcile(log, commit, previous, previous_term, terms, commands)
        if isinstance(verdict, Accepted) and commit < verdict.verified < log.last_index:
            return dataclasses.replace(verdict, truncate_from=verdict.verified + 1)
        return verdict

    monkeypatch.setattr(following, "reconcile", as_released)
    assert caught(Parts(), STALLS)


def test_a_second_vote_in_a_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = pysync.Member.receive

    def forgetting_its_vote(member: Any, peer: str, message: dict[str, Any]) -> None:
        if message["type"] == "request_vote":
            member._so._SyncObj__votedForNodeId = None
        receive(member, peer, message)

    monkeypatch.setattr(pysync.Member, "receive", forgetting_its_vote)
    # The journal itself refuses to write a second vote, which stops the node.
    assert caught(Parts(), ELECTIONS, worlds=30, delay_s=(0.01, 0.12)) & {
        "election safety",
        "state machine safety",
        "no stop without cause",
    }


def test_a_journal_that_loses_its_last_entry_is_caught() -> None:
    def forgetful(disk: SimDisk, plan: WorldPlan) -> Journal:
        journal = open_journal(disk, plan)
        for group, epoch in journal.groups():
            log = journal.group(group, epoch)
            if log.last_index >= log.first_index:
                log.truncate_from(log.last_index)
        return journal

    assert caught(Parts(open_journal=forgetful), CRASHES)


class WithoutLedger(RegisterMachine):
    keeps_ledger = False


class Opinionated(RegisterMachine):
    """Its result depends on how often this process has been asked: on where it runs."""

    lives = 0

    def __init__(self, store: MachineStore, observe: Observer) -> None:
        super().__init__(store, observe)
        Opinionated.lives += 1
        self.asked = Opinionated.lives

    def _apply_one(self, state: MachineState, entry: Entry) -> Effect:
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


@pytest.mark.parametrize(
    ("machine", "rule"),
    [
        (WithoutLedger, "exactly once"),
        (Opinionated, "equal digests"),
        (ForgetsApplied, "gapless apply"),
    ],
)
def test_a_wrong_state_machine_is_caught(machine: type[RegisterMachine], rule: str) -> None:
    assert rule in caught(Parts(make_machine=machine), CRASHES | CUTS)


class Raises(NodeCore):
    def read_index(self, group_id: str, done: Any) -> None:
        raise ZeroDivisionError


class Stops(NodeCore):
    def read_index(self, group_id: str, done: Any) -> None:
        self.fatal = ZeroDivisionError()


class NeverReads(NodeCore):
    def read_index(self, group_id: str, done: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("core", "rule"),
    [(Raises, "no exceptions"), (Stops, "no stop without cause"), (NeverReads, "liveness")],
)
def test_a_core_that_raises_or_stops_or_hangs_is_caught(core: type[NodeCore], rule: str) -> None:
    assert caught(Parts(make_core=core), CUTS) == {rule}
