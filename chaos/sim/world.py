"""One world from a seed to a verdict: first anything may break, then everything must converge."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.audit import Auditor
from agentmem_chaos.sim.clients import Call, Caller, Fate, PlainCaller, SimClient
from agentmem_chaos.sim.core_caller import CoreCaller
from agentmem_chaos.sim.epochs import EpochJudge
from agentmem_chaos.sim.invariants import Invariants
from agentmem_chaos.sim.judge import Judge, Ledger
from agentmem_chaos.sim.moves import groups_of, newest, unfinished
from agentmem_chaos.sim.moving_node import MovingNode
from agentmem_chaos.sim.nemesis import Nemesis
from agentmem_chaos.sim.net import SimNet
from agentmem_chaos.sim.node import SimNode
from agentmem_chaos.sim.parts import Parts, open_journal
from agentmem_chaos.sim.places import Places
from agentmem_chaos.sim.plan import Fault, WorldPlan
from agentmem_chaos.sim.recency import Recency
from agentmem_chaos.sim.result import WorldResult
from agentmem_chaos.sim.schedule import Schedule, stream
from agentmem_chaos.sim.serving import Serving
from agentmem_chaos.sim.story import Story
from agentmem_chaos.sim.web import Web
from agentmem_cluster.raft.api import GroupSpec, Role
from agentmem_cluster.shardmap import ShardMap

# Of the second phase: when a write must have succeeded, and when clients stop.
WRITE_WITHIN_S = 9.0
WRITE_WITHIN_S_OF_MOVES = 20.0  # a change may have to wait for its stragglers, and be redirected
QUIET_S = 5.0
MEETING_S = 2.0
FINAL_READS_S = 5.0
SHARED_MEMORY = Path("/dev/shm")


class World:
    def __init__(self, plan: WorldPlan, *, parts: Parts | None = None, story: bool = False) -> None:
        self.plan = plan
        self.parts = parts or Parts()
        self.schedule = Schedule()
        self.story = Story(keep=story)
        self.judge = Judge(self.story, self.schedule)
        self.invariants = Invariants(self.judge)
        self.nodes: dict[str, SimNode] = {}
        self.places = Places(group.id for group in plan.asked)
        self.judge.group_of = self.places.group_of
        # Files of real engines: in memory where that is possible, since their syncs are simulated.
        in_memory = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="agentmem-sim-", dir=in_memory))
        self.net = SimNet(
            self.schedule,
            plan.seed,
            plan.net,
            lambda name: self.nodes[name].boot_number,
            self.story.trace,
        )
        for name in plan.nodes:
            self.nodes[name] = (MovingNode if plan.moves else SimNode)(
                name,
                plan,
                self.parts,
                self.schedule,
                self.net,
                self.judge,
                self.invariants,
                self.story,
                lambda: self.auditor,
                self.folder / name,
                self.places,
            )
        for name, node in self.nodes.items():
            self.net.attach(name, node)
        movers = self.movers = {n: m for n, m in self.nodes.items() if isinstance(m, MovingNode)}
        self.epochs = EpochJudge(movers, self.judge, self.schedule, self.places)
        for node in movers.values():
            first_map = ShardMap.initial(plan.nodes, len(plan.asked), 3)
            node.prepare(self.epochs, plan.groups[0].members, first_map)
        self.auditor = Auditor(
            self.nodes,
            lambda disk: open_journal(disk, plan),
            self.judge,
            stream(plan.seed, "audit"),
            lambda: self.schedule.now_s,
        )
        self.servers = {
            name: Serving(node, self.judge, self.auditor, confirms_reads=self.parts.confirms_reads)
            for name, node in self.nodes.items()
        }
        self.web = Web(plan, self.nodes, self.servers, self.schedule, self.places)
        self.calls: list[Call] = []
        self.nemesis = Nemesis(
            plan,
            self.nodes,
            self.net,
            self.schedule,
            self.story,
            self.places,
            lambda group: {call.key for call in self.calls if call.group == group},
        )
        self.recency = Recency(self.judge)
        self.clients = [self._client(number) for number in range(plan.clients)]
        self.left_behind = 0

    def _client(self, number: int) -> SimClient:
        chance = stream(self.plan.seed, f"client/{number}")
        caller: Caller
        if self.plan.core_clients:
            seeds = chance.sample(self.plan.nodes, chance.randint(1, len(self.plan.nodes)))
            caller = CoreCaller(self.web, seeds, self.schedule, chance)
        else:
            caller = PlainCaller(
                self.servers,
                self.schedule,
                chance,
                moves=self.plan.moves,
                splits=Fault.SPLIT in self.plan.fault_every_s,
            )
        return SimClient(
            number,
            caller,
            self.plan,
            self.schedule,
            chance,
            self.story,
            self.calls,
            self.recency,
        )

    def run(self) -> WorldResult:
        """Play both phases; a violation ends the world where it is found. It can run once."""
        try:
            return self._run()
        finally:
            self.close()

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()
        shutil.rmtree(self.folder)

    def _run(self) -> WorldResult:
        self._tell_plan()
        for node in self.nodes.values():
            node.boot_later(0.0)
        for client in self.clients:
            client.start()
        self.nemesis.start()
        if self._play(self.plan.calm_at_s):
            self._calm()
        return self._result()

    def _play(self, until_s: float) -> bool:
        """Whether the world is still without a violation at `until_s`."""
        self.schedule.run_until(until_s)
        return not self.judge.violations

    def _calm(self) -> None:
        plan = self.plan
        self.nemesis.heal()
        healed_s = self.schedule.now_s
        within_s = WRITE_WITHIN_S_OF_MOVES if plan.moves else WRITE_WITHIN_S
        if not self._play(healed_s + within_s):
            return
        for group in plan.asked:
            if not self._written_since(group, healed_s) and not self._probe(group):
                self.judge.accuse(
                    "liveness",
                    f"no write to {group.id} succeeded within {within_s} s of healing\n"
                    + self._statuses(),
                )
                return
        if not self._play(plan.seconds - QUIET_S):
            return
        for client in self.clients:
            client.stopped = True
        # At one moment of these everybody has met: an election may fall on any single one.
        if not self._play(plan.seconds - MEETING_S):
            return
        while (apart := self._apart()) and self.schedule.now_s < plan.seconds:
            if not self._play(min(plan.seconds, self.schedule.now_s + MEETING_S / 10)):
                return
        if apart:
            self.judge.accuse("liveness", f"{apart}\n{self._statuses()}")
        elif self._play(plan.seconds):
            self._final_reads()
        if not self.judge.violations:
            groups = self._groups_now()
            ledgers = {group.id: self._ledger(group) for group in groups}
            operations = self.judge.history(
                self.calls, lambda call: ledgers[self._shard_of(call)], self.schedule.now_s
            )
            rewinds = self.epochs.rewinds
            operations = rewinds.as_shards_compare(operations)
            operations += rewinds.operations((call.group, call.key) for call in self.calls)
            self.judge.linearizable(operations)

    def _shard_of(self, call: Call) -> str:
        """Where its key is now."""
        state = newest(list(self.movers.values()))
        if state is None or state.map is None:
            return call.group
        return state.map.shard_of_slot(self.places.slot(call.group, call.key)).id

    def _ledger(self, group: GroupSpec) -> Ledger:
        nodes = [self.nodes[name] for name in group.members]
        machines = [node.machines[group.id] for node in nodes if group.id in node.machines]
        return max(machines, key=lambda machine: machine.applied_index).outcome

    def _groups_now(self) -> tuple[GroupSpec, ...]:
        return groups_of(self.plan, self.movers) if self.plan.moves else self.plan.groups

    def _written_since(self, group: GroupSpec, since_s: float) -> bool:
        return any(
            call.group == group.id
            and call.kind is not Kind.READ
            and call.fate is Fate.ANSWERED
            and call.returned_s >= since_s
            for call in reversed(self.calls)
        )

    def _probe(self, group: GroupSpec) -> bool:
        """Clients may have been elsewhere: one write of our own decides."""
        call = self.clients[0].probe(group)
        return self._play(self.schedule.now_s + 2.0) and call.fate is Fate.ANSWERED

    def _apart(self) -> str:
        """What keeps everybody from being up, idle, and at the same index with the same digest."""
        self.left_behind = 0
        for client in self.clients:
            if not client.idle:
                return f"client {client.number} still waits"
        if self.plan.moves and (left := unfinished(self.movers)):
            return left
        for group in self._groups_now():
            ends = {}
            for name in group.members:
                node = self.nodes[name]
                if not node.alive:
                    return f"{name} is down at the end"
                if not self._was_left_behind(group, node) and not node.may_have_lost(group):
                    machine = node.machines[group.id]
                    ends[name] = (machine.applied_index, machine.digest(), machine.contents())
            if len(set(ends.values())) != 1 or 2 * len(ends) <= len(group.members):
                return f"{group.id} did not meet"
        return ""

    def _was_left_behind(self, group: GroupSpec, node: SimNode) -> bool:
        """Whether no log has what this replica lacks: then only a new epoch could bring it back.

        Its word is not taken for it: every log that is at the end must really begin later.
        """
        if node.core is None or group.id not in node.groups:
            return False
        if not node.core.needs_reseed(group.id):
            return False
        own = node.core.status(group.id)
        others = [self.nodes[name] for name in group.members if name != node.name]
        ahead = [o.core.status(group.id) for o in others if o.core and group.id in o.groups]
        behind = all(
            s.first_index > own.last_index + 1 or self._conflicts(group, node, s.first_index - 1)
            for s in ahead
            if s.role is Role.LEADER
        )
        if behind:
            self.left_behind += 1
        return behind

    def _conflicts(self, group: GroupSpec, node: SimNode, index: int) -> bool:
        """Whether a replica has another entry at `index` than those who compacted it since."""
        assert node.journal is not None
        term = node.journal.group(group.id, group.epoch).term_at(index)
        others = [self.nodes[name] for name in group.members if name != node.name]
        logs = [o.journal.group(group.id, group.epoch) for o in others if o.journal is not None]
        return all(log.term_at(index) != term for log in logs if log.first_index == index + 1)

    def _final_reads(self) -> None:
        """A linearizable read on every replica of every group answers, if asked now and then."""
        missing = {
            (group.id, name)
            for group in self._groups_now()
            for name in group.members
            if not self._was_left_behind(group, self.nodes[name])
            and not self.nodes[name].may_have_lost(group)
        }
        until_s = self.schedule.now_s + FINAL_READS_S

        def answer(where: tuple[str, str], outcome: object) -> None:
            if not isinstance(outcome, Exception):
                missing.discard(where)

        while missing and self.schedule.now_s < until_s:
            for group_id, name in sorted(missing):
                self.servers[name].read_shard(
                    group_id,
                    "k0",
                    lambda outcome, where=(group_id, name): answer(where, outcome),  # type: ignore[misc]
                )
            if not self._play(self.schedule.now_s + 1.0):
                return
        if missing:
            self.judge.accuse(
                "liveness", f"no linearizable read on {sorted(missing)}\n{self._statuses()}"
            )

    def _statuses(self) -> str:
        lines = []
        for node in self.nodes.values():
            if node.core is None:
                lines.append(f"  {node.name} is down")
                continue
            for group in node.groups:
                s = node.core.status(group)
                lines.append(
                    f"  {node.name} {group}: {s.role.value} term {s.term} leader {s.leader} "
                    f"log {s.first_index}..{s.last_index} durable {s.durable_index} "
                    f"commit {s.commit_index} applied {s.applied_index} match {s.match_index} "
                    f"queued {s.queued}"
                )
        return "\n".join(lines)

    def _tell_plan(self) -> None:
        plan = self.plan
        self.story.tell(0.0, "", f"world {plan.seed}: {len(plan.nodes)} nodes, {plan.seconds:g} s")
        for group in plan.groups:
            self.story.tell(0.0, "", f"group {group.id} on {', '.join(group.members)}")
        for fault, every_s in plan.fault_every_s.items():
            self.story.tell(0.0, "", f"{fault.value}: every {every_s:.1f} s or so")

    def _result(self) -> WorldResult:
        answered = [call for call in self.calls if call.fate is Fate.ANSWERED]
        return WorldResult(
            seed=self.plan.seed,
            nodes=len(self.plan.nodes),
            groups=len(self.plan.groups),
            engine=self.plan.engine.value,
            core_clients=self.plan.core_clients,
            seconds=self.schedule.now_s,
            violations=[str(violation) for violation in self.judge.violations],
            calls=len(self.calls),
            acknowledged=sum(call.kind is not Kind.READ for call in answered),
            reads=sum(call.kind is Kind.READ for call in answered),
            faults=self.nemesis.faults,
            audits=self.auditor.audits,
            left_behind=self.left_behind,
            has_moves=self.plan.moves,
            moves=self.epochs.moves,
            splits=self.epochs.splits,
            rewinds=self.epochs.rewinds.count,
            pauses_s=self.epochs.pauses_s,
            elections=self.judge.elections,
            events=self.schedule.events,
            bursts=self.net.bursts,
            checker_steps=self.judge.checker_steps,
            trace_hash=self.story.trace_hash,
            lines=self.story.lines,
        )
