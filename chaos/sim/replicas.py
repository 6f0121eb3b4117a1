"""What moves the replicas of one simulated node: the driver of `agentmem_cluster.epochs.replicas`.

What `agentmem_node.service.replicas` is on a real machine, over virtual time and simulated
sessions: it opens states, copies them from peers, follows their logs, asks old members to close and
begins epochs. The decisions are `ReplicaSet`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from agentmem_chaos.sim.copies import Snapshot, install, open_snapshot
from agentmem_chaos.sim.link import Refused, Reply, SimLink
from agentmem_chaos.sim.machine import Divisible, ReplicaStore
from agentmem_chaos.sim.rewinds import KeptState
from agentmem_cluster.epochs import fence
from agentmem_cluster.epochs.change import Change
from agentmem_cluster.epochs.commands import Begin, Seal, encode
from agentmem_cluster.epochs.machine import EpochAware, EpochMachine
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.epochs.replicas import ReplicaSet, Served, Staged
from agentmem_cluster.epochs.reports import Staging
from agentmem_cluster.errors import AgentMemError, BadRequest, Unavailable, WrongShard
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.raft.applying import LogBehind
from agentmem_cluster.raft.core import NodeCore
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardInfo

IDLE_S = 0.25
BUSY_S = 0.02
RETRY_S = 1.0
TAIL_POLL_S = 0.03
TAIL_BYTES_MAX = 20_000
DURABLE_EVERY_S = 1.0
CALL_S = 2.0
LEASE_S = 30.0
LINGER_S = 3.0


class Paused(Unavailable):
    """The source has no such snapshot or log any more: the copy begins again."""

    code = "copy_paused"


class Home(Protocol):
    """What the driver needs of its node."""

    name: str

    def open_state(self, shard: str, folder: str) -> Divisible: ...
    def close_state(self, folder: str) -> None: ...
    def store_of(self, shard: str, folder: str) -> ReplicaStore: ...
    def drop_store(self, folder: str) -> None: ...
    def later(self, delay_s: float, action: Callable[[], None]) -> None: ...
    def after_sync(self, job: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        """Run a job that syncs, in its time; `done` is told what it raised."""
        ...

    def now_s(self) -> float: ...
    def tell(self, what: str) -> None: ...
    def follows(self, folder: str, whole: str | None) -> None: ...
    def kept(self, source: str) -> KeptState: ...
    def rebased(self, folder: str, index: int) -> None: ...
    def served(self, served: Served) -> None: ...
    def gone(self, shard: str) -> None: ...
    def run(self, step: Callable[[NodeCore], Any]) -> Any: ...
    def plan_turn(self) -> None: ...
    def pick(self, names: list[str]) -> str: ...


@dataclass(slots=True)
class _Leased:
    snapshot: Snapshot
    used_s: float


@dataclass(slots=True, eq=False)
class _Copy:
    """One attempt to copy and follow; dropped when another begins."""

    staged: Staged
    shard: str
    source: str
    snapshot: str = ""
    chunks: list[bytes] = field(default_factory=list)
    opened: Any = None
    durable_s: float = 0.0
    over: bool = False


class SimReplicas:
    """Of one life of a node's process."""

    def __init__(
        self,
        home: Home,
        core: NodeCore,
        disk: Disk,
        record: LocalRecord,
        link: SimLink,
        view_wire: Callable[[], Any],
        learn: Callable[[Any], None],
    ) -> None:
        self._home = home
        self._core = core
        self._record = record
        self._disk = disk
        self._link = link
        self._view_wire = view_wire
        self._learn = learn
        self.set = ReplicaSet(
            home.name,
            disk,
            record,
            core,
            self,
            on_served=lambda served, _: home.served(served),
            on_gone=home.gone,
            on_change=self.poke,
        )
        self._copies: dict[str, _Copy] = {}
        self._begins: dict[str, set[str]] = {}
        self._retry_s: dict[str, float] = {}
        self._leased: dict[str, _Leased] = {}
        self._followed: dict[str, float] = {}
        self._numbers = 0
        self._step_due_s = float("inf")
        link.handlers |= {
            "replica.open": self._on_open,
            "replica.chunk": self._on_chunk,
            "replica.tail": self._on_tail,
            "replica.report": self._on_report,
            "replica.stage": self._on_stage,
            "replica.checkpoint": self._on_checkpoint,
            "replica.seal": self._on_seal,
            "replica.close": self._on_close,
            "node.replicas": self._on_replicas,
        }

    def start(self) -> None:
        for shard in list(self._record.ready):
            try:
                self.set.reopen(shard)
            except OSError as error:
                self._home.tell(f"cannot forget a copy that is not there: {error}")
        self.poke()

    # -- States: where ReplicaSet gets its state machines from -----------------------------------

    def open(self, shard: str, folder: str) -> EpochAware:
        return self._home.open_state(shard, folder)

    def release(self, shard: str, folder: str, state: EpochAware) -> None:
        def drop() -> None:
            if folder not in self.set.folders_in_use():
                self._home.drop_store(folder)

        self._home.later(LINGER_S, drop)

    def rebase(self, state: EpochAware, index: int, ended: int) -> None:
        machine: Any = state
        machine.rebase(index, ended)
        (folder,) = (
            staged.folder
            for staged in self.set.staged.values()
            if staged.machine is not None and staged.machine.inner is state
        )
        self._home.rebased(folder, index)

    # -- what is to be done by itself ------------------------------------------------------------

    def poke(self) -> None:
        """Something may be possible now that was not before: soon, and in no callback's midst."""
        self._step_in(0.0)

    def _step_in(self, delay_s: float) -> None:
        due_s = self._home.now_s() + delay_s
        if due_s < self._step_due_s:
            self._step_due_s = due_s
            self._home.later(delay_s, lambda: self._step_if_due(due_s))

    def _step_if_due(self, due_s: float) -> None:
        if due_s != self._step_due_s:
            return
        self._step_due_s = float("inf")
        self._home.run(lambda core: self._step())
        self._home.plan_turn()
        self._step_in(BUSY_S if self._is_busy() else IDLE_S)

    def _is_busy(self) -> bool:
        if any(not served.machine.has_begun for served in self.set.served.values()):
            return True
        return any(change.base is not None for change in self.set.changes.values())

    def _step(self) -> None:
        try:
            self.settle()
        except OSError as error:
            self._home.tell(f"cannot change what it holds: {error}")
            return
        for shard, served in self.set.served.items():
            if not served.machine.has_begun and self._core.is_leader(shard):
                self._begin(shard, served)
        now_s = self._home.now_s()
        for info in self.set.wanted():
            if now_s >= self._retry_s.get(info.id, 0.0):
                self._retry_s[info.id] = now_s + RETRY_S
                running = self._copies.get(info.id)
                if running is not None:
                    self._end(running)  # it follows an epoch that is over; what it began may end
                    continue
                source = self._serving_member(info)
                if source is not None:
                    self._start_copy(self.set.begin_copy(info, "", info.epoch), info.id, source)
        for staged, change in self.set.restored_again():
            if staged.info.id not in self._copies and now_s >= self._retry_s.get(staged.info.id, 0):
                self._retry_s[staged.info.id] = now_s + RETRY_S
                self._restore(staged, change)
        for staged in self.set.staged.values():
            machine = staged.machine
            if (
                staged.state is Staging.COMPLETE
                and machine is not None
                and machine.durable_index < machine.inner.applied_index  # it was rebased
                and staged.info.id not in self._copies
            ):
                self._make_usable(staged, machine)
        if self.set.map is not None:
            try:
                dropped = self.set.drop_copies(list(self.set.staged.values()))
            except OSError as error:
                self._home.tell(f"cannot forget what it copied: {error}")
                dropped = []
            for staged in dropped:
                copy = self._copies.pop(staged.info.id, None)
                if copy is not None:
                    copy.over = True
                self._home.drop_store(staged.folder)
        self._expire(now_s)

    def settle(self) -> None:
        while True:
            try:
                self.set.settle()
                return
            except LogBehind as error:
                shard = next((s for s in sorted(self._record.held) if s not in self.set.served), "")
                if not shard:
                    raise
                self._home.tell(f"its replica of {shard} is of no use: {error}")
                self._record.close(shard, self._record.held[shard].epoch)
                self._record.save(self._disk)

    def _serving_member(self, info: ShardInfo) -> str | None:
        peers = [m for m in info.members if m in self._link.peers]
        return self._home.pick(peers) if peers else None

    # -- beginning an epoch ----------------------------------------------------------------------

    def _begin(self, shard: str, served: Served) -> None:
        """As the leader of an epoch: begin it, once the one before is closed."""
        info = served.info
        change = next((c for c in self.set.changes.values() if c.target_of(shard) == info), None)
        if change is None or f"{shard}/{info.epoch}" in self._begins:
            return
        closed: set[str] = set()
        self._begins[f"{shard}/{info.epoch}"] = closed
        self._ask_to_close(shard, served, change, closed)

    def _ask_to_close(self, shard: str, served: Served, change: Change, closed: set[str]) -> None:
        name = f"{shard}/{served.info.epoch}"
        current = self.set.served.get(shard)
        if (
            current is None
            or current.info.epoch != served.info.epoch
            or not self._core.is_leader(shard)
            or served.machine.has_begun
        ):
            self._begins.pop(name, None)
            return

        def again() -> None:
            self._ask_to_close(shard, served, change, closed)

        if fence.is_fenced(change.old_members, closed):
            begin = encode(Begin(served.info.epoch))
            self._propose(shard, begin, lambda _: self._home.later(BUSY_S, again))
            return
        left = [m for m in change.old_members if m not in closed and self._link.is_connected(m)]
        waiting = len(left)

        def answered(member: str, outcome: Any) -> None:
            nonlocal waiting
            waiting -= 1
            if outcome is True:
                closed.add(member)
            if waiting == 0:
                self._home.later(0.0 if outcome is True else BUSY_S, again)

        if not left:
            self._home.later(BUSY_S, again)
        body = {"shard": change.shard, "epoch": change.from_epoch, "view": self._view_wire()}
        for member in left:
            self._link.call(
                member,
                "replica.close",
                body,
                lambda outcome, member=member: answered(member, outcome),  # type: ignore[misc]
                CALL_S,
            )

    def _propose(self, shard: str, command: bytes, done: Reply) -> None:
        """`done` is called once, at the latest after `CALL_S`."""
        over = False

        def once(outcome: Any) -> None:
            nonlocal over
            if not over:
                over = True
                done(outcome)

        self._home.later(CALL_S, lambda: once(Unavailable("no answer in time")))
        self._home.run(lambda core: core.propose(shard, command, once))
        self._home.plan_turn()

    def _on_close(self, _peer: str, body: Any, reply: Reply) -> None:
        self._learn(body["view"])
        reply(self.set.close(body["shard"], body["epoch"]))
        self.poke()

    # -- what the conductor and others ask -------------------------------------------------------

    def _on_report(self, _peer: str, body: Any, reply: Reply) -> None:
        reply(self.set.report(Change.from_wire(body["change"])).to_wire())

    def _on_checkpoint(self, _peer: str, body: Any, reply: Reply) -> None:
        self._local(body["shard"], body["epoch"])
        self._core.checkpoint_soon(body["shard"])
        self._home.plan_turn()
        reply(None)

    def _on_seal(self, _peer: str, body: Any, reply: Reply) -> None:
        served = self._local(body["shard"], body["epoch"])
        if served.machine.is_sealed:
            reply(None)
            return
        self._propose(
            body["shard"],
            encode(Seal(body["epoch"])),
            lambda outcome: reply(outcome if isinstance(outcome, AgentMemError) else None),
        )

    def _on_replicas(self, _peer: str, _body: Any, reply: Reply) -> None:
        rows = []
        for shard, served in self.set.served.items():
            status = self._core.status(shard)
            rows.append([shard, served.info.epoch, status.needs_reseed, served.machine.is_sealed])
        reply({"replicas": rows, "copying": sorted(self.set.staged)})

    def _on_stage(self, _peer: str, body: Any, reply: Reply) -> None:
        change = Change.from_wire(body["change"])
        target = change.target_of(body["shard"])
        if target is None or self._home.name not in target.members:
            raise BadRequest(f"Node {self._home.name} is not to have {body['shard']}.")
        if not self._record.is_admitted:
            raise Unavailable(f"Node {self._home.name} has not been admitted yet.")
        if not self.set.may_copy(target):
            reply(None)
            return
        running = self._copies.get(target.id)
        staged = self.set.staged.get(target.id)
        is_same = staged is not None and (staged.info, staged.change_id) == (target, change.id)
        if is_same and staged is not None and staged.state is Staging.COMPLETE:
            reply(None)
            return
        if running is not None and not running.over:
            if is_same:
                reply(None)
                return
            running.over = True
        if staged is None or not is_same or staged.machine is None:
            staged = self.set.begin_copy(target, change.id, change.from_epoch)
        if change.source:
            self._restore(staged, change)
        else:
            self._start_copy(staged, change.shard, body["source"])
        reply(None)

    def _local(self, shard: str, epoch: int) -> Served:
        served = self.set.served.get(shard)
        if served is None or served.info.epoch != epoch:
            raise WrongShard(f"epoch {epoch} of {shard} is not on {self._home.name}")
        return served

    # -- giving copies ---------------------------------------------------------------------------

    def _on_open(self, peer: str, body: Any, reply: Reply) -> None:
        served = self._local(body["shard"], body["epoch"])
        index = served.machine.inner.applied_index
        snapshot = open_snapshot(self._home.store_of(served.info.id, served.folder))
        self._numbers += 1
        name = f"{peer}-{self._numbers}"
        self._leased[name] = _Leased(snapshot, self._home.now_s())
        self._follow_log(served.info.id, index)
        try:
            term = self._core.term_at(served.info.id, index)
        except IndexError as error:
            raise Paused(f"The term of {index} is not known here: {error}") from None
        reply(
            {
                "snapshot": name,
                "chunks": snapshot.chunks,
                "head": snapshot.head,
                "index": index,
                "term": term,
            }
        )

    def _on_chunk(self, _peer: str, body: Any, reply: Reply) -> None:
        leased = self._leased.get(body["snapshot"])
        if leased is None:
            raise Paused("That snapshot is no longer kept here.")
        leased.used_s = self._home.now_s()
        reply(leased.snapshot.read(body["number"]))

    def _on_tail(self, _peer: str, body: Any, reply: Reply) -> None:
        self._local(body["shard"], body["epoch"])
        shard, after = body["shard"], body["after"]
        try:
            entries = self._core.read_log(shard, after, TAIL_BYTES_MAX)
        except IndexError:
            raise Paused(f"Entries after {after} are compacted here.") from None
        self._follow_log(shard, after)
        applied = self._core.status(shard).applied_index
        reply({"entries": [list(entry) for entry in entries], "applied": applied})

    def _follow_log(self, shard: str, index: int) -> None:
        self._followed[shard] = self._home.now_s()
        self._core.retain(shard, index)

    def _expire(self, now_s: float) -> None:
        for name, leased in list(self._leased.items()):
            if leased.used_s < now_s - LEASE_S:
                leased.snapshot.close()
                del self._leased[name]
        for shard, used_s in list(self._followed.items()):
            if used_s < now_s - LEASE_S:
                del self._followed[shard]
                self._core.retain(shard, None)

    # -- taking copies ---------------------------------------------------------------------------

    def _start_copy(self, staged: Staged, shard: str, source: str) -> None:
        copy = self._copies[staged.info.id] = _Copy(staged, shard, source)
        staged.state, staged.error = Staging.COPYING, ""
        if staged.machine is not None:
            self._tail(copy)
            return
        self._home.follows(staged.folder, shard if self._is_part(staged) else None)
        # What an attempt that was of no use left there, perhaps before a crash.
        self._home.store_of(staged.info.id, staged.folder)
        self._home.drop_store(staged.folder)
        self._ask(
            copy,
            "replica.open",
            {"shard": shard, "epoch": staged.follows},
            lambda opened: self._opened(copy, opened),
        )

    def _ask(self, copy: _Copy, method: str, body: Any, then: Callable[[Any], None]) -> None:
        def answered(outcome: Any) -> None:
            if copy.over or self.set.staged.get(copy.staged.info.id) is not copy.staged:
                self._end(copy)
                return
            if isinstance(outcome, Exception):
                self._fail(copy, outcome)
                return
            try:
                then(outcome)
            except OSError as error:
                self._fail(copy, error)

        self._link.call(copy.source, method, body, answered, CALL_S)

    def _opened(self, copy: _Copy, opened: Any) -> None:
        copy.opened = opened
        copy.staged.total_bytes = opened["chunks"]
        self._next_chunk(copy)

    def _next_chunk(self, copy: _Copy) -> None:
        opened = copy.opened
        number = len(copy.chunks)
        copy.staged.done_bytes = number
        if number < opened["chunks"]:
            body = {"snapshot": opened["snapshot"], "number": number}
            self._ask(copy, "replica.chunk", body, lambda data: self._took(copy, data))
            return
        staged = copy.staged
        store = self._home.store_of(staged.info.id, staged.folder)

        def whole(failure: OSError | None) -> None:
            if copy.over or self.set.staged.get(staged.info.id) is not staged:
                self._end(copy)
                return
            if failure is not None:
                self._fail(copy, failure)
                return
            state = self._home.open_state(staged.info.id, staged.folder)
            staged.machine = EpochMachine(state, staged.follows)
            staged.last_term = opened["term"]
            if (
                self._is_part(staged)
                and self._home.pick(["ahead", "ahead", "at the end"]) == "ahead"
            ):
                state.trim(_slots(staged))
            self._tail(copy)

        def put() -> None:
            if not copy.over:  # another may stand in its place
                install(store, opened["head"], copy.chunks, opened["index"])

        self._home.after_sync(put, whole)

    def _took(self, copy: _Copy, data: bytes) -> None:
        copy.chunks.append(data)
        self._next_chunk(copy)

    def _tail(self, copy: _Copy) -> None:
        machine = copy.staged.machine
        assert machine is not None
        body = {
            "shard": copy.shard,
            "epoch": copy.staged.follows,
            "after": machine.inner.applied_index,
        }
        self._ask(copy, "replica.tail", body, lambda answer: self._tailed(copy, answer))

    def _tailed(self, copy: _Copy, answer: Any) -> None:
        staged, machine = copy.staged, copy.staged.machine
        assert machine is not None
        entries = [Entry(*entry) for entry in answer["entries"]]
        if entries:
            try:
                staged.apply(entries)
            except AgentMemError as error:  # the disk is full
                self._fail(copy, error)
                return
        if machine.is_sealed and staged.follows < staged.info.epoch:
            if self._is_part(staged) and not staged.is_restricted:
                state: Any = machine.inner
                state.restrict(_slots(staged))
                self._home.follows(staged.folder, None)
                staged.is_restricted = True
            self._make_durable(copy, machine, lambda: self._complete(copy))
            return
        if answer["applied"] - machine.inner.applied_index > 0 and entries:
            self._tail(copy)
            return
        if staged.follows == staged.info.epoch:
            staged.state = Staging.FOLLOWING
            self._make_durable(copy, machine, lambda: self._settle_and_follow(copy))
        elif self._home.now_s() >= copy.durable_s:
            copy.durable_s = self._home.now_s() + DURABLE_EVERY_S
            self._make_durable(copy, machine, lambda: self._poll(copy))
        else:
            self._poll(copy)

    def _restore(self, staged: Staged, change: Change) -> None:
        """What was kept becomes the copy, instead of a member's state."""
        copy = self._copies[staged.info.id] = _Copy(staged, change.shard, change.source)
        staged.state, staged.error = Staging.COPYING, ""
        if staged.machine is not None:
            self._make_durable(copy, staged.machine, lambda: self._complete(copy))
            return
        kept = self._home.kept(change.source)
        self._home.store_of(staged.info.id, staged.folder)
        self._home.drop_store(staged.folder)
        store = self._home.store_of(staged.info.id, staged.folder)

        def put() -> None:
            if not copy.over:
                install(store, kept.head, list(kept.chunks), kept.index)

        def whole(failure: OSError | None) -> None:
            if copy.over or self.set.staged.get(staged.info.id) is not staged:
                self._end(copy)
            elif failure is not None:
                self._fail(copy, failure)
            else:
                state = self._home.open_state(staged.info.id, staged.folder)
                staged.machine = EpochMachine(state, staged.follows)
                staged.last_term = kept.term
                self._make_durable(copy, staged.machine, lambda: self._complete(copy))

        self._home.after_sync(put, whole)

    def _make_usable(self, staged: Staged, machine: EpochMachine) -> None:
        copy = self._copies[staged.info.id] = _Copy(staged, staged.info.id, "")

        def usable() -> None:
            self._end(copy)
            self.poke()

        self._make_durable(copy, machine, usable)

    def _poll(self, copy: _Copy) -> None:
        def again() -> None:
            if copy.over or self.set.staged.get(copy.staged.info.id) is not copy.staged:
                self._end(copy)
            else:
                self._tail(copy)

        copy.staged.state = Staging.FOLLOWING
        self._home.later(TAIL_POLL_S, again)

    def _settle_and_follow(self, copy: _Copy) -> None:
        self.poke()
        self._poll(copy)

    def _complete(self, copy: _Copy) -> None:
        try:
            self.set.complete(copy.staged)
        except OSError as error:
            self._fail(copy, error)
            return
        self._end(copy)
        self.poke()

    def _make_durable(self, copy: _Copy, machine: EpochMachine, then: Callable[[], None]) -> None:
        job = machine.checkpoint()
        if job is None:
            then()
            return

        def done(failure: OSError | None) -> None:
            if failure is None:
                machine.checkpoint_done(job)
            if copy.over or self.set.staged.get(copy.staged.info.id) is not copy.staged:
                self._end(copy)
            elif failure is not None:
                self._fail(copy, failure, is_unsure=True)
            else:
                then()

        self._home.after_sync(job.run, done)

    def _fail(self, copy: _Copy, error: Exception, *, is_unsure: bool = False) -> None:
        """`is_unsure`: whether what the disk has of it is unknown."""
        staged = copy.staged
        self._end(copy)
        staged.state, staged.error = Staging.FAILED, str(error)
        self._home.tell(f"copying {staged.info.id} from {copy.source}: {error}; trying again")
        is_paused = isinstance(error, Refused) and error.reason == Paused.code
        if self.set.staged.get(staged.info.id) is not staged:
            return
        if is_paused or is_unsure or not staged.change_id:
            if staged.machine is not None:
                self._home.close_state(staged.folder)
                staged.machine = None
                staged.is_restricted = False
            self._home.drop_store(staged.folder)
        if not staged.change_id:
            del self.set.staged[staged.info.id]  # so that it is wanted again

    def _is_part(self, staged: Staged) -> bool:
        changes = self.set.changes.values()
        return any(change.id == staged.change_id and change.is_split for change in changes)

    def _end(self, copy: _Copy) -> None:
        copy.over = True
        if self._copies.get(copy.staged.info.id) is copy:
            del self._copies[copy.staged.info.id]


def _slots(staged: Staged) -> tuple[int, int]:
    return staged.info.slot_start, staged.info.slot_end
