"""The replicas of one node, as the shard map moves them: which epochs it takes part in. No I/O but
the node's own record.

    learn(map, changes)   the node has heard of a newer map: what can be done at once is done
    report(change)        what the conductor asks
    close(shard, epoch)   the next epoch's leader asks: may nobody here confirm a read any more?
    wanted()              replicas that the map gives this node and that it must copy first

How the bytes of a copy get here is another's business (`Staged` is only told how far it is).
Whatever changes what this node takes part in stands in its `LocalRecord`, synced, before it
happens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from agentmem_cluster.epochs.change import Base, Change, Phase
from agentmem_cluster.epochs.machine import EpochAware, EpochMachine
from agentmem_cluster.epochs.record import Held, LocalRecord, Ready
from agentmem_cluster.epochs.reports import (
    NewReplica,
    OldReplica,
    Report,
    StagedReplica,
    Staging,
)
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.raft.api import Entry, GroupSpec, GroupStatus, StateMachine
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardInfo, ShardMap

log = logging.getLogger("agentmem.replicas")


class Groups(Protocol):
    """The node's Raft groups: `raft.host.Host`, or `raft.core.NodeCore` in the simulator."""

    def add_group(self, spec: GroupSpec, machine: StateMachine) -> Any: ...
    def remove_group(self, group_id: str) -> Any: ...
    def drop_log(self, group_id: str, epoch: int) -> None: ...
    def checkpoint_soon(self, group_id: str) -> None: ...
    def status(self, group_id: str) -> GroupStatus: ...
    def term_at(self, group_id: str, index: int) -> int: ...


class States(Protocol):
    """Where the replicas' states live."""

    def open(self, shard: str, folder: str) -> EpochAware:
        """The state in a folder; a new, empty one when there is none."""
        ...

    def release(self, shard: str, folder: str, state: EpochAware) -> None:
        """Nobody takes part with it any more: it may be closed, and its folder removed."""
        ...

    def rebase(self, state: EpochAware, index: int, ended: int) -> None:
        """Let a restored state be the final one of epoch `ended`, at entry `index`."""
        ...


@dataclass(slots=True)
class Served:
    """A replica that takes part in its epoch."""

    info: ShardInfo
    spec: GroupSpec
    machine: EpochMachine
    folder: str
    seal: tuple[int, int] | None = None


@dataclass(slots=True)
class Staged:
    """A copy on its way to be a replica of `info`. `follows`: the epoch whose log it applies."""

    info: ShardInfo
    change_id: str  # "" when the node copies by itself what the map gives it
    follows: int
    folder: str
    state: Staging = Staging.COPYING
    machine: EpochMachine | None = None
    last_term: int = 0  # of the last entry applied
    done_bytes: int = 0
    total_bytes: int = 0
    error: str = ""
    revision: int = 0  # of the view that asked for it
    is_restricted: bool = False  # a part of a split, from which the rest was removed

    def is_for(self, info: ShardInfo) -> bool:
        """Not only for that epoch: a change that was given up had the same, and other slots."""
        mine = self.info
        return (mine.epoch, mine.members, mine.slot_start, mine.slot_end) == (
            info.epoch,
            info.members,
            info.slot_start,
            info.slot_end,
        )

    def apply(self, entries: Sequence[Entry]) -> None:
        """Apply what the source has committed. What came after the seal changes nothing."""
        if self.machine is None or not entries:
            return
        self.machine.apply(entries)
        last = self.machine.inner.applied_index
        found = (entry.term for entry in reversed(entries) if entry.index == last)
        self.last_term = next(found, self.last_term)


class ReplicaSet:
    def __init__(
        self,
        node_id: str,
        disk: Disk,
        record: LocalRecord,
        groups: Groups,
        states: States,
        *,
        on_served: Callable[[Served, Any], None] = lambda served, group: None,
        on_gone: Callable[[str], None] = lambda shard: None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_served` gets what `add_group` returned; `on_change` is called when an epoch began or
        ended in the log of a replica."""
        self.node_id = node_id
        self.record = record
        self.served: dict[str, Served] = {}
        self.staged: dict[str, Staged] = {}
        self.map: ShardMap | None = None
        self.changes: Mapping[str, Change] = {}
        self.revision = 0
        self.settling = ""  # the shard that `learn` is at: of an error, the one it is about
        self._disk = disk
        self._groups = groups
        self._states = states
        self._on_served = on_served
        self._on_gone = on_gone
        self._on_change = on_change

    # -- what the map says ---------------------------------------------------------------------

    def learn(self, shard_map: ShardMap, changes: Mapping[str, Change], revision: int = 0) -> None:
        """Take part in what the map gives this node, as far as it can; leave what it takes away.

        `revision`: of the view that says so, which grows.
        Raises OSError when the record cannot be written: then nothing more was changed.
        """
        self.map = shard_map
        self.changes = changes
        self.revision = revision
        for shard in sorted({*shard_map.shards, *self.served, *self.record.held}):
            self.settling = shard
            self._settle(shard)

    def settle(self) -> None:
        """Again what `learn` could not do yet: a copy or a checkpoint may be ready now."""
        for shard, served in self.served.items():
            machine = served.machine
            if machine.is_sealed and machine.durable_index < machine.inner.applied_index:
                self._groups.checkpoint_soon(shard)  # the next epoch waits for it
        if self.map is not None:
            self.learn(self.map, self.changes, self.revision)

    def _settle(self, shard: str) -> None:
        assert self.map is not None
        info = self.map.shards.get(shard)
        served = self.served.get(shard)
        held = self.record.held.get(shard)
        if served is None and held is not None:
            self._open_held(shard, held, info)
            served = self.served.get(shard)
        if info is None:
            return
        if served is not None and served.info.epoch == info.epoch:
            served.info = info  # another preferred leader, perhaps
            return
        if served is not None and served.info.epoch > info.epoch:
            return  # an older map, late
        if self.node_id not in info.members:
            if served is not None:
                self._leave(shard, info.epoch - 1)
            return
        if served is None and held is None and info.epoch == 1 and self._may_hold(shard, 1):
            folder = folder_name(shard, 1)
            state = self._states.open(shard, folder)
            try:
                self._take_part(info, folder, state, Base(0, 0))
            except OSError:
                state.close()  # the next attempt opens it again
                raise
            return
        base = self._base_of(info)
        staged = self.staged.get(shard)
        if staged is not None and self._founds(staged, info):
            self._use_staged(info, staged, base)
        elif served is not None and base is not None and self._keeps_its_state(info):
            self._go_on(served, info, base)
        if (
            served is not None
            and self.served.get(shard) is served
            and not self._keeps_its_state(info)
            and not served.machine.is_sealed
            and self._groups.status(shard).leader is None
        ):
            # The others have left its epoch, so it will never be sealed here: a copy that follows
            # it would wait for ever, and is to fail and be made anew.
            self._leave(shard, info.epoch - 1)

    def _open_held(self, shard: str, held: Held, info: ShardInfo | None) -> None:
        """After a start: take part again in what the record says."""
        change = self.changes.get(shard)
        if info is not None and info.epoch == held.epoch:
            members, preferred = info.members, info.preferred_leader
            shown = info
        elif change is not None and change.from_epoch == held.epoch and info is not None:
            members, preferred = change.old_members, change.old_members[0]
            # Of a split, both parts: until it is over here, this is the whole.
            start = min(target.slot_start for target in change.targets)
            end = max(target.slot_end for target in change.targets)
            shown = ShardInfo(shard, held.epoch, members, preferred, start, end)
        elif info is not None and info.epoch > held.epoch:
            # The map moved on while this node was away: that epoch is over.
            self._close(shard, info.epoch - 1)
            return
        else:
            return  # the kept map is older than the record: a newer one will come
        spec = GroupSpec(shard, held.epoch, members, preferred, held.base_index, held.base_term)
        self._serve(shown, spec, held.folder, self._states.open(shard, held.folder))

    def _founding(self, info: ShardInfo) -> Change | None:
        """The change that has founded an epoch, while it is not over."""
        for change in self.changes.values():
            if change.phase is Phase.FOUNDED and change.target_of(info.id) == info:
                return change
        return None

    def _base_of(self, info: ShardInfo) -> Base | None:
        founding = self._founding(info)
        return None if founding is None else founding.base

    def _founds(self, staged: Staged, info: ShardInfo) -> bool:
        """Whether a copy was made to be this replica. One for a change that was given up may have
        the same target and another content: a rewind's is not what healing founds."""
        if not staged.is_for(info):
            return False
        founding = self._founding(info)
        return staged.follows == info.epoch or (
            founding is not None and founding.id == staged.change_id
        )

    def _keeps_its_state(self, info: ShardInfo) -> bool:
        change = self.changes.get(info.id)
        return change is not None and change.keeps_its_state(self.node_id, info.id)

    def _may_hold(self, shard: str, epoch: int) -> bool:
        return self.record.may_take_part(shard, epoch)

    def _is_restored(self, info: ShardInfo) -> bool:
        change = self.changes.get(info.id)
        return change is not None and bool(change.source) and change.target_of(info.id) == info

    def _go_on(self, served: Served, info: ShardInfo, base: Base) -> None:
        """With the replica that is here, once it has the final state on disk."""
        machine = served.machine
        if not machine.is_sealed or machine.inner.applied_index != base.index:
            return
        if self._groups.status(info.id).needs_reseed:
            return  # it is damaged: another is copied
        if machine.durable_index < base.index:
            return
        self._take_part(info, served.folder, machine.inner, base)

    def _use_staged(self, info: ShardInfo, staged: Staged, base: Base | None) -> None:
        machine = staged.machine
        if machine is None or machine.durable_index < machine.inner.applied_index:
            return
        if not self._may_hold(info.id, info.epoch):
            return
        if staged.follows == info.epoch:
            # It copied from a member of this very epoch: its log begins where the copy ends.
            if staged.state is not Staging.FOLLOWING:
                return
            base = Base(machine.inner.applied_index, staged.last_term)
        elif base is None or staged.state is not Staging.COMPLETE:
            return
        if self._is_restored(info) and machine.inner.applied_index != base.index:
            self._states.rebase(machine.inner, base.index, info.epoch - 1)
            return  # until that is on disk
        self._take_part(info, staged.folder, machine.inner, base)
        del self.staged[info.id]

    def _take_part(self, info: ShardInfo, folder: str, state: EpochAware, base: Base) -> None:
        before = self.served.get(info.id)
        failpoint("replicas.before_record")
        with self.record.kept(self._disk):
            self.record.hold(info.id, Held(info.epoch, folder, base.index, base.term))
        failpoint("replicas.after_record")
        if before is not None:
            self._stop(before)
            if before.machine.inner is not state:
                self._states.release(info.id, before.folder, before.machine.inner)
            failpoint("replicas.after_stop")
        spec = GroupSpec(
            info.id, info.epoch, info.members, info.preferred_leader, base.index, base.term
        )
        self._serve(info, spec, folder, state)
        log.info("takes part in epoch %d of %s from entry %d on", info.epoch, info.id, base.index)

    def _serve(self, info: ShardInfo, spec: GroupSpec, folder: str, state: EpochAware) -> None:
        machine = EpochMachine(state, info.epoch, on_change=self._on_change)
        served = self.served[info.id] = Served(info, spec, machine, folder)
        try:
            group = self._groups.add_group(spec, machine)
        except BaseException:
            del self.served[info.id]
            raise
        failpoint("replicas.after_add_group")
        self._on_served(served, group)

    def _stop(self, served: Served) -> None:
        self._groups.remove_group(served.info.id)
        self._groups.drop_log(served.info.id, served.info.epoch)
        self.served.pop(served.info.id, None)

    def _leave(self, shard: str, epoch: int) -> None:
        """The map gives the shard to others."""
        served = self.served[shard]
        self._close(shard, epoch)
        log.info("leaves %s, which is at epoch %d elsewhere", shard, epoch + 1)
        failpoint("replicas.after_leave")
        self._states.release(shard, served.folder, served.machine.inner)

    def _close(self, shard: str, epoch: int) -> None:
        failpoint("replicas.before_close")
        with self.record.kept(self._disk):
            self.record.close(shard, epoch)
        failpoint("replicas.after_close")
        served = self.served.get(shard)
        if served is not None:
            self._stop(served)
            self._on_gone(shard)

    # -- what others ask -----------------------------------------------------------------------

    def close(self, shard: str, epoch: int) -> bool:
        """Whether nobody can confirm a read of that epoch here any more, now and for ever.

        The caller knows that the next epoch is founded. Raises OSError.
        """
        served = self.served.get(shard)
        if served is None or served.info.epoch > epoch:
            if self.record.closed.get(shard, 0) < epoch:
                with self.record.kept(self._disk):
                    self.record.close(shard, epoch)
            return True
        is_of_use = not self._groups.status(shard).needs_reseed
        if served.machine.is_sealed and is_of_use and self._keeps_its_state_of(shard):
            return False  # its checkpoint is under way; then it goes on with the next epoch
        self._leave(shard, epoch)
        return True

    def _keeps_its_state_of(self, shard: str) -> bool:
        change = self.changes.get(shard)
        return change is not None and change.keeps_its_state(self.node_id, shard)

    def report(self, change: Change) -> Report:
        """What the conductor wants to know of this node."""
        served = self.served.get(change.shard)
        old = None
        if served is not None and served.info.epoch == change.from_epoch:
            status = self._groups.status(change.shard)
            old = OldReplica(
                applied_index=status.applied_index,
                durable_index=served.machine.durable_index,
                is_leader=status.leader == self.node_id,
                needs_reseed=status.needs_reseed,
                seal=self.seal_of(change.shard),
            )
        staged, new = {}, {}
        for target in change.targets:
            copy = self.staged.get(target.id)
            if copy is not None and copy.is_for(target) and copy.change_id in ("", change.id):
                staged[target.id] = _staged_report(copy)
            here = self.served.get(target.id)
            if here is not None and here.info.epoch == target.epoch:
                status = self._groups.status(target.id)
                new[target.id] = NewReplica(
                    applied_index=status.applied_index,
                    is_leader=status.leader == self.node_id,
                    has_begun=here.machine.has_begun,
                )
        return Report(self.node_id, old, staged, new)

    def seal_of(self, shard: str) -> tuple[int, int] | None:
        """Where the epoch served here ended: index and term of its seal, once applied."""
        served = self.served.get(shard)
        if served is None or not served.machine.is_sealed:
            return None
        if served.seal is None:
            index = served.machine.inner.applied_index
            served.seal = (index, self._groups.term_at(shard, index))
        return served.seal

    # -- copies --------------------------------------------------------------------------------

    def wanted(self) -> list[ShardInfo]:
        """Replicas of epochs that serve already and that this node is a member of, without one."""
        if self.map is None:
            return []
        found = []
        for info in self.map.shards.values():
            served = self.served.get(info.id)
            staged = self.staged.get(info.id)
            if (
                self.node_id in info.members
                and info.epoch > 1
                and (served is None or served.info.epoch < info.epoch)
                and (staged is None or not self._is_of_use(staged, info))
                and (staged is None or self._restoring(staged) is None)
                and not (served is not None and self._goes_on_soon(served, info))
                and self.may_copy(info)
            ):
                found.append(info)
        return found

    def _restoring(self, staged: Staged) -> Change | None:
        """The change that has founded an epoch from a backup, for which a copy was fetched."""
        founding = self._founding(staged.info)
        is_its = founding is not None and founding.id == staged.change_id
        return founding if is_its and founding is not None and founding.source else None

    def restored_again(self) -> list[tuple[Staged, Change]]:
        """Copies of a backup that failed after their epoch was founded: perhaps no member has a
        replica that could be copied instead."""
        found = ((s, self._restoring(s)) for s in self.staged.values())
        return [(s, c) for s, c in found if c is not None and s.state is Staging.FAILED]

    def _is_of_use(self, staged: Staged, info: ShardInfo) -> bool:
        """Whether a copy can still become the replica of an epoch that is founded. Not one that
        failed, for whom it followed has left, nor one that came too late to learn its base."""
        return staged.state is not Staging.FAILED and self._founds(staged, info)

    def _goes_on_soon(self, served: Served, info: ShardInfo) -> bool:
        return (
            served.machine.is_sealed
            and self._keeps_its_state(info)
            and not self._groups.status(info.id).needs_reseed
        )

    def may_copy(self, info: ShardInfo) -> bool:
        """Whether a copy for `info` can be of use: not once this node takes part in that epoch or
        has closed it. The instruction to copy may come late, and the copy's folder is the
        replica's by then."""
        held = self.record.held.get(info.id)
        is_held = held is not None and held.epoch >= info.epoch
        return not is_held and self._may_hold(info.id, info.epoch)

    def begin_copy(self, info: ShardInfo, change_id: str, follows: int) -> Staged:
        """A copy for `info` begins; another one of the shard is dropped.

        Raises OSError, and ValueError when it `may_copy` no more.
        """
        if not self.may_copy(info):
            raise ValueError(f"epoch {info.epoch} of {info.id} is held or closed on this node")
        self._forget_ready([info.id])  # before its folder has another content
        before = self.staged.pop(info.id, None)
        if before is not None and before.machine is not None:
            self._states.release(info.id, before.folder, before.machine.inner)
        staged = Staged(info, change_id, follows, folder_name(info.id, info.epoch))
        staged.revision = self.revision
        self.staged[info.id] = staged
        return staged

    def complete(self, staged: Staged) -> None:
        """Count a copy that is whole and durable, even after a crash: the next epoch is founded
        on it, and the old members leave then. Raises OSError."""
        machine = staged.machine
        assert machine is not None
        info, index = staged.info, machine.inner.applied_index
        ready = Ready(
            info, staged.change_id, staged.folder, index, staged.last_term, staged.revision
        )
        if self._may_hold(info.id, info.epoch):
            with self.record.kept(self._disk):
                self.record.ready[info.id] = ready
        staged.state = Staging.COMPLETE

    def reopen(self, shard: str) -> None:
        """After a start: a copy that was complete is so again. Raises OSError."""
        ready = self.record.ready[shard]
        state = self._states.open(shard, ready.folder)
        if state.applied_index < ready.index:  # its folder was lost, and is a new one
            state.close()
            self._forget_ready([shard])
            return
        follows = ready.info.epoch - 1
        staged = Staged(ready.info, ready.change_id, follows, ready.folder, Staging.COMPLETE)
        staged.machine = EpochMachine(state, follows)
        staged.last_term, staged.revision = ready.term, ready.revision
        self.staged[shard] = staged

    def _forget_ready(self, shards: Iterable[str]) -> None:
        known = [shard for shard in shards if shard in self.record.ready]
        if known:
            with self.record.kept(self._disk):
                for shard in known:
                    del self.record.ready[shard]

    def drop_copies(self, current: Iterable[Staged]) -> list[Staged]:
        """Copies that no change and no map asks for any more are taken out and returned.

        And those of epochs that serve already which failed: nobody stages them again, so that they
        are `wanted` from here on, and copied from a member of that very epoch. Raises OSError.
        """
        assert self.map is not None
        dropped = []
        for staged in current:
            info = self.map.shards.get(staged.info.id)
            is_asked_for = any(
                change.id == staged.change_id and staged.info in change.targets
                for change in self.changes.values()
            )
            is_needed = is_asked_for or (info is not None and self._founds(staged, info))
            is_late = info == staged.info and staged.state is Staging.FAILED
            is_late &= self._restoring(staged) is None  # it is fetched again
            is_known = staged.revision <= self.revision  # not so with a view kept from before
            if is_late or (not is_needed and is_known):
                dropped.append(staged)
        self._forget_ready(staged.info.id for staged in dropped)
        for staged in dropped:
            self.staged.pop(staged.info.id, None)
        return dropped

    def folders_in_use(self) -> set[str]:
        return {
            *(held.folder for held in self.record.held.values()),
            *(staged.folder for staged in self.staged.values()),
        }


def _staged_report(copy: Staged) -> StagedReplica:
    machine = copy.machine
    applied = 0 if machine is None else machine.inner.applied_index
    return StagedReplica(
        state=copy.state,
        applied_index=applied,
        durable_index=0 if machine is None else machine.durable_index,
        seal=(applied, copy.last_term) if copy.state is Staging.COMPLETE else None,
        done_bytes=copy.done_bytes,
        total_bytes=copy.total_bytes,
        error=copy.error,
    )


def folder_name(shard: str, epoch: int) -> str:
    return f"{shard}-e{epoch}"
