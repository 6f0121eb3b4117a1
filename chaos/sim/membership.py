"""How a simulated node learns the map, is admitted, and what it does while it leads the meta group.

What `agentmem_node.service`'s membership, changes and healing are on a real machine, over virtual
time and simulated sessions: views are polled and pushed, admission is the real one, and the leader
of the meta group carries out what the real `Conductor` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from agentmem_chaos.sim.link import Refused, Reply, SimLink
from agentmem_chaos.sim.replicas import SimReplicas
from agentmem_cluster.epochs import conductor as do
from agentmem_cluster.epochs.change import Change, Phase
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.epochs.reports import Report
from agentmem_cluster.epochs.suspicions import Subject, Suspicions
from agentmem_cluster.errors import NotLeader, Unavailable
from agentmem_cluster.meta import (
    LEVEL,
    ClusterSettings,
    MetaStateMachine,
    NodeInfo,
    begin_change,
    end_change,
    found_epoch,
    init_cluster,
    put_node,
    redirect_change,
)
from agentmem_cluster.raft.api import GROUP_META, Applied
from agentmem_cluster.raft.core import NodeCore
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardMap
from agentmem_cluster.splitting import split_ranges
from agentmem_node.service.admission import admit
from agentmem_node.service.view import MetaGroup, View, load_view, save_view

POLL_S = 0.1
SETTLED_POLL_S = 1.0
LOOK_S = 0.1
HURRY_S = 0.01
HEAL_S = 1.0
PATIENCE_S = 3.0
CALL_S = 2.0
REPORT_S = 0.5
# A world ends half a minute after everything was healed, and meta leaders start to count anew.
TIMING = do.Timing(missing_s=4.0)


class Home(Protocol):
    name: str

    def later(self, delay_s: float, action: Callable[[], None]) -> None: ...
    def now_s(self) -> float: ...
    def tell(self, what: str) -> None: ...
    def run(self, step: Callable[[NodeCore], Any]) -> Any: ...
    def plan_turn(self) -> None: ...


class SimMembership:
    """Of one life of a node's process."""

    def __init__(
        self,
        home: Home,
        core: NodeCore,
        disk: Disk,
        record: LocalRecord,
        link: SimLink,
        voters: tuple[str, ...],
        first_map: ShardMap,
        meta: MetaStateMachine | None,
    ) -> None:
        """`meta`: the state of the meta group here, where this node votes in it."""
        self._home = home
        self._core = core
        self._disk = disk
        self._record = record
        self._link = link
        self._voters = voters
        self._first_map = first_map
        self._meta = meta
        self.view: View | None = None
        self.replicas: SimReplicas
        self._own = NodeInfo(
            f"{home.name}:1", f"http://{home.name}:7700", "", record.incarnation, "", LEVEL
        )
        self._conducted: dict[str, _Conducted] = {}
        self._suspicions = Suspicions(PATIENCE_S)
        self._changes_made = 0
        link.handlers |= {
            "meta.view": lambda peer, body, reply: reply(self.view_wire()),
            "meta.learn": self._on_learn,
            "meta.propose": self._on_propose,
        }

    def start(self) -> None:
        kept = load_view(self._disk)
        if kept is not None:
            self.adopt(kept[0])
        self._home.later(0.0, self._follow)
        self._home.later(LOOK_S, self._look)
        self._home.later(HEAL_S, self._heal)

    # -- views -----------------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        return self._core.is_leader(GROUP_META) and self.view is not None

    @property
    def is_registered(self) -> bool:
        return self.view is not None and self.view.nodes.get(self._home.name) == self._own

    def view_wire(self) -> Any:
        return None if self.view is None else self.view.to_wire()

    def learn(self, wire: Any) -> None:
        if wire is not None and self.view is not None:
            self.adopt(View.from_wire(wire))

    def adopt(self, view: View) -> None:
        if not view.is_newer_than(self.view):
            return
        try:
            admit(self._record, view, self._home.name, self._disk)
            self.view = view
            self._home.run(lambda core: self._learn(view))
            save_view(self._disk, view, self._voters)
        except OSError as error:
            self._home.tell(f"cannot adopt what the cluster is now: {error}")
        self._home.plan_turn()

    def _learn(self, view: View) -> None:
        try:
            self.replicas.set.learn(view.map, view.changes)
        except OSError as error:
            self._home.tell(f"cannot change what it holds: {error}")
        self.replicas.poke()

    def _own_view(self) -> View | None:
        if self._meta is None:
            return None
        group = MetaGroup(1, self._voters)
        return View.of(self._meta.state, self._meta.applied_index, group)

    def _on_learn(self, _peer: str, body: Any, reply: Reply) -> None:
        self.learn(body)
        reply(None)

    def tell_all(self) -> None:
        view = self._own_view()
        if view is not None:
            self.adopt(view)
        if self.view is None:
            return
        for peer in sorted(self._link.peers):
            self._link.call(peer, "meta.learn", self.view_wire(), lambda _: None, CALL_S)

    def _follow(self) -> None:
        """Keep the view current, and this node registered."""
        if self._meta is None:
            voter = next((v for v in self._voters if v in self._link.peers), None)
            if voter is not None:
                self._link.call(voter, "meta.view", None, self._fetched, CALL_S)
        else:
            view = self._own_view()
            if view is not None:
                self.adopt(view)
            elif self._core.is_leader(GROUP_META):
                settings = ClusterSettings("sim", "sim", "none", 0, "", 0)
                self.propose(init_cluster(settings, self._first_map), lambda _: None)
        is_settled = False
        if self.view is not None:
            is_settled = self.is_registered
            if not is_settled:
                self.propose(put_node(self._home.name, self._own), lambda _: None)
        self._home.later(SETTLED_POLL_S if is_settled else POLL_S, self._follow)

    def _fetched(self, outcome: Any) -> None:
        if outcome is not None and not isinstance(outcome, Exception):
            self.adopt(View.from_wire(outcome))

    # -- proposals -------------------------------------------------------------------------------

    def propose(self, command: bytes, done: Reply) -> None:
        """Have the meta group's leader replicate a command, wherever it is."""
        if self._core.is_leader(GROUP_META):
            self._propose_here(command, done)
            return
        leader = self._core.leader(GROUP_META) if self._meta is not None else None
        voters = [leader] if leader else list(self._voters)
        self._propose_at([v for v in voters if v in self._link.peers], command, done)

    def _propose_at(self, voters: list[str], command: bytes, done: Reply) -> None:
        """At the first of them that leads."""
        if not voters:
            done(Unavailable("no leader of the meta group can be reached"))
            return

        def answered(outcome: Any) -> None:
            if isinstance(outcome, Refused) and outcome.reason == NotLeader.code:
                self._propose_at(voters[1:], command, done)
            else:
                done(outcome)

        self._link.call(voters[0], "meta.propose", command, answered, CALL_S)

    def _on_propose(self, _peer: str, body: Any, reply: Reply) -> None:
        if not self._core.is_leader(GROUP_META):
            raise NotLeader(f"{self._home.name} does not lead the meta group")
        self._propose_here(body, reply)

    def _propose_here(self, command: bytes, done: Reply) -> None:
        over = False

        def once(outcome: Any) -> None:
            nonlocal over
            if not over:
                over = True
                is_applied = isinstance(outcome, Applied)
                done(list(outcome.result) if is_applied else outcome)
                if is_applied:
                    self._home.later(0.0, self.tell_all)

        self._home.later(CALL_S, lambda: once(Unavailable("no answer in time")))
        self._home.run(lambda core: core.propose(GROUP_META, command, once))
        self._home.plan_turn()

    def begin(self, change: Change, done: Reply) -> None:
        self.propose(begin_change(change), done)

    # -- conducting ------------------------------------------------------------------------------

    def _look(self) -> None:
        """One conductor for each change, while this node leads the meta group."""
        wanted = {}
        if self.leads and self.view is not None:
            wanted = {change.id: change for change in self.view.changes.values()}
        for change_id in [c for c in self._conducted if c not in wanted]:
            self._conducted.pop(change_id).over = True
        for change_id, change in wanted.items():
            if change_id not in self._conducted:
                one = self._conducted[change_id] = _Conducted(
                    do.Conductor(change, self._home.now_s(), TIMING)
                )
                self._round(one)
        self._home.later(LOOK_S, self._look)

    def _round(self, one: _Conducted) -> None:
        change = one.conductor.change
        found = None if self.view is None else self.view.changes.get(change.shard)
        if one.over or found is None or found.id != change.id:
            return
        current = found
        reports: dict[str, Report] = {}
        nodes = [node for node in current.nodes if self._link.is_connected(node)]
        waiting = len(nodes)

        def answered(node: str, outcome: Any) -> None:
            nonlocal waiting
            waiting -= 1
            if not isinstance(outcome, Exception):
                reports[node] = Report.from_wire(node, outcome)
            if waiting == 0:
                self._step(one, current, reports)

        if not nodes:
            self._step(one, current, {})
        for node in nodes:
            self._link.call(
                node,
                "replica.report",
                {"change": current.to_wire()},
                lambda outcome, node=node: answered(node, outcome),  # type: ignore[misc]
                REPORT_S,
            )

    def _step(self, one: _Conducted, current: Change, reports: dict[str, Report]) -> None:
        if one.over:
            return
        steps = one.conductor.step(current, reports, self._home.now_s())
        is_sealed = any(r.old is not None and r.old.seal for r in reports.values())
        hurry = current.phase is Phase.FOUNDED or is_sealed or bool(steps)
        waiting = len(steps)

        def go_on() -> None:
            self._home.later(HURRY_S if hurry else LOOK_S, lambda: self._round(one))

        def carried_out(step: do.Instruction, outcome: Any) -> None:
            nonlocal waiting
            waiting -= 1
            if isinstance(outcome, Exception):
                self._home.tell(f"{step} of {current.shard}: {outcome}; trying again")
            if waiting == 0:
                go_on()

        if not steps:
            go_on()
        for step in steps:
            self._carry_out(
                current,
                step,
                lambda outcome, step=step: carried_out(step, outcome),  # type: ignore[misc]
            )

    def _carry_out(self, change: Change, step: do.Instruction, done: Reply) -> None:
        old = {"shard": change.shard, "epoch": change.from_epoch}
        match step:
            case do.Stage(node, shard, source):
                body = {"change": change.to_wire(), "shard": shard, "source": source}
                self._link.call(node, "replica.stage", body, done, CALL_S)
            case do.Checkpoint(node):
                self._link.call(node, "replica.checkpoint", old, done, CALL_S)
            case do.SealOld(node):
                self._link.call(node, "replica.seal", old, done, CALL_S)
            case do.Found(base):
                self.propose(found_epoch(change.id, change.shard, base), done)
            case do.Redirect(members):
                preferred = change.targets[0].preferred_leader
                preferred = preferred if preferred in members else members[0]
                self.propose(redirect_change(change.id, change.shard, members, preferred), done)
            case do.Finish() | do.GiveUp(_):
                self.propose(end_change(change.id, change.shard, change.phase), done)

    # -- healing ---------------------------------------------------------------------------------

    def _heal(self) -> None:
        """As the leader of the meta group: have copied anew what is lost or of no use."""
        self._home.later(HEAL_S, self._heal)
        view = self.view
        if not self.leads or view is None:
            self._suspicions.clear()
            return
        answers: dict[str, Any] = {}
        nodes = [node for node in sorted(view.map.nodes()) if self._link.is_connected(node)]
        waiting = len(nodes)

        def answered(node: str, outcome: Any) -> None:
            nonlocal waiting
            waiting -= 1
            if not isinstance(outcome, Exception):
                answers[node] = outcome
            if waiting == 0 and self.leads:
                self._mend(view, answers)

        for node in nodes:
            self._link.call(
                node,
                "node.replicas",
                None,
                lambda outcome, node=node: answered(node, outcome),  # type: ignore[misc]
                REPORT_S,
            )

    def _mend(self, view: View, answers: dict[str, Any]) -> None:
        now_s = self._home.now_s()
        for shard, info in view.map.shards.items():
            if shard in view.changes:
                continue
            fresh, is_sealed, is_certain = [], False, True
            for member in info.members:
                answer = answers.get(member)
                if answer is None or shard in answer["copying"]:
                    continue
                mine = [r for r in answer["replicas"] if r[:2] == [shard, info.epoch]]
                wrong = "" if mine and not mine[0][2] else "of no use" if mine else "lost"
                subject = Subject(shard, info.epoch, member)
                self._suspicions.saw(subject, wrong, now_s)
                if wrong:
                    fresh.append(member)
                    is_certain &= self._suspicions.is_certain(subject, now_s)
                else:
                    is_sealed |= mine[0][3]
            if is_sealed and not fresh:
                subject = Subject(shard, info.epoch, "")
                self._suspicions.saw(subject, "sealed", now_s)
                is_certain = self._suspicions.is_certain(subject, now_s)
            healthy = len(info.members) - len(fresh)
            if (fresh or is_sealed) and is_certain and 2 * healthy > len(info.members):
                self.begin(self.change(shard, info.members, tuple(fresh)), lambda _: None)
        self._suspicions.keep(
            lambda one: (
                one.shard not in view.changes and view.map.shards[one.shard].epoch == one.epoch
            )
        )

    def change(self, shard: str, members: tuple[str, ...], fresh: tuple[str, ...] = ()) -> Change:
        """To give `shard` these members, as this node knows it now."""
        assert self.view is not None
        info = self.view.map.shards[shard]
        self._changes_made += 1
        target = type(info)(
            shard,
            info.epoch + 1,
            tuple(sorted(members)),
            info.preferred_leader if info.preferred_leader in members else sorted(members)[0],
            info.slot_start,
            info.slot_end,
        )
        name = f"{self._home.name}-{self._record.incarnation[:4]}-{self._home.now_s():.6f}"
        return Change(
            f"{name}-{self._changes_made}",
            shard,
            info.epoch,
            info.members,
            (target,),
            fresh=fresh,
        )

    def split(self, shard: str) -> Change:
        """To make two of `shard`, on the members that it has."""
        assert self.view is not None
        cut = split_ranges(self.view.map, shard)
        change = self.change(shard, self.view.map.shards[shard].members)
        (whole,) = change.targets
        parts = ((cut.shard, cut.kept_slots), (cut.new_shard, cut.new_slots))
        targets = [replace(whole, id=i, slot_start=s[0], slot_end=s[1]) for i, s in parts]
        return replace(change, targets=tuple(targets))


class _Conducted:
    """A conductor at work; a new leader's begins anew."""

    def __init__(self, conductor: do.Conductor) -> None:
        self.conductor = conductor
        self.over = False
