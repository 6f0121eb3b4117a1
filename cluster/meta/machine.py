"""The state machine of the meta group.

Every command is checked here, on every replica alike, because a command may come from a node of
another version: a bad one is a result, never an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import msgpack

from agentmem_cluster.epochs.change import Base, Change, Phase
from agentmem_cluster.epochs.commands import Begin, Control, EpochState
from agentmem_cluster.epochs.commands import decode as decode_control
from agentmem_cluster.meta import commands as kind_of
from agentmem_cluster.meta.checkpoint import MetaCheckpoint, MetaCorrupt, read_file
from agentmem_cluster.meta.commands import FORMAT, Outcome
from agentmem_cluster.meta.reading import TEXT_CHARS_MAX, exactly, integer, text
from agentmem_cluster.meta.state import LEVEL, ClusterSettings, MetaState, NodeInfo
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardMap

_NODES_MAX = 1_024
_VOTERS_MAX = 7
_KINDS_OF_CHANGE = (
    kind_of.BEGIN_CHANGE,
    kind_of.FOUND_EPOCH,
    kind_of.REDIRECT_CHANGE,
    kind_of.END_CHANGE,
)
_KEY_CHARS_MAX = 512
_VALUE_BYTES_MAX = 1 << 20
_KV_BYTES_MAX = 64 << 20


class MetaStateMachine:
    """Implements `agentmem_cluster.raft.api.StateMachine`. Lives in memory, kept by checkpoints."""

    def __init__(self, disk: Disk, path: str = "meta") -> None:
        """Raises MetaCorrupt when the checkpoint is damaged."""
        self._disk = disk
        self._path = path
        self.state = MetaState()
        self.on_change: list[Callable[[], None]] = []
        self.applied_index = 0
        self.durable_index = 0
        # The state was kept by an older version meanwhile, and lacks what that did not understand
        # of commands which this one would have carried out whole.
        self.is_from_older = False
        self._digest = bytes(16)
        self._kv_bytes = 0
        self._checkpointing = False
        if not disk.exists(path):
            disk.make_dir(path)
            disk.sync_dir(path.rpartition("/")[0])
        self._load()

    def apply(self, entries: Sequence[Entry]) -> list[Outcome]:
        results = []
        changed = False
        for entry in entries:
            outcome = self._apply_one(entry.command)
            results.append(outcome)
            changed |= outcome.ok and bool(entry.command)
            hasher = blake2b(self._digest, digest_size=16)
            hasher.update(entry.index.to_bytes(8, "little"))
            hasher.update(entry.command)
            self._digest = hasher.digest()
        if entries:
            self.applied_index = entries[-1].index
        if changed:
            for callback in self.on_change:
                callback()
        return results

    def digest(self) -> bytes:
        return self._digest

    def close(self) -> None:
        """Nothing is open: what no checkpoint has is in the journal."""

    # -- applying -----------------------------------------------------------------------

    @property
    def epoch_state(self) -> EpochState:
        return self.state.epoch

    def _apply_one(self, command: bytes) -> Outcome:
        if not command:
            return Outcome("ok")  # Raft's own entry at the start of a term
        control = decode_control(command)
        if control is not None:
            return self._change_epoch(control)
        try:
            values = msgpack.unpackb(command)
            if not isinstance(values, list) or len(values) < 3 or values[0] != FORMAT:
                raise ValueError(f"a command of format {FORMAT} was expected")
            return self._decide(values[1], values[2:])
        except (ValueError, TypeError, msgpack.UnpackException) as wrong:
            return Outcome("bad_command", str(wrong)[:TEXT_CHARS_MAX])

    def _decide(self, kind: int, values: list[Any]) -> Outcome:
        if kind == kind_of.INIT:
            settings, shard_map = exactly(values, 2)
            return self._init(ClusterSettings.from_wire(settings), ShardMap.from_wire(shard_map))
        if kind == kind_of.PUT_NODE:
            node_id, info = exactly(values, 2)
            return self._put_node(text(node_id, "node id"), NodeInfo.from_wire(info))
        if kind == kind_of.REMOVE_NODE:
            (node_id,) = exactly(values, 1)
            gone = self.state.nodes.pop(text(node_id, "node id"), None)
            return Outcome("ok" if gone is not None else "not_found")
        if kind == kind_of.SET_MAP:
            expected, shard_map = exactly(values, 2)
            return self._set_map(integer(expected, "version"), ShardMap.from_wire(shard_map))
        if kind == kind_of.KV_PUT:
            key, value = exactly(values, 2)
            return self._kv_put(text(key, "key", _KEY_CHARS_MAX), value)
        if kind == kind_of.KV_DELETE:
            (key,) = exactly(values, 1)
            value = self.state.kv.pop(text(key, "key", _KEY_CHARS_MAX), None)
            if value is None:
                return Outcome("not_found")
            self._kv_bytes -= len(key) + len(value)
            return Outcome("ok")
        if kind == kind_of.CHANGE_VOTERS:
            epoch, members = exactly(values, 2)
            return self._change_voters(integer(epoch, "epoch"), members)
        if kind in _KINDS_OF_CHANGE:
            return self._decide_change(kind, values)
        raise ValueError(f"kind {kind!r} is unknown")

    def _change_epoch(self, control: Control) -> Outcome:
        before = self.state.epoch
        self.state.epoch = before.after(control)
        if self.state.epoch == before:
            return Outcome("conflict")
        if isinstance(control, Begin) and self.state.next_voters:
            self.state.voters, self.state.next_voters = self.state.next_voters, ()
        return Outcome("ok")

    def _change_voters(self, epoch: int, members: Any) -> Outcome:
        if not isinstance(members, list) or not 1 <= len(members) <= _VOTERS_MAX:
            raise ValueError(f"the voters are not a list of 1 to {_VOTERS_MAX}")
        names = tuple(sorted({text(member, "node id") for member in members}))
        if len(names) != len(members) or len(names) % 2 == 0:
            raise ValueError("voters are an odd number of nodes")
        if self.state.epoch != EpochState(epoch, False):
            return Outcome("conflict", f"the meta group is at epoch {self.state.epoch.epoch}")
        self.state.next_voters = names
        return Outcome("ok")

    def _decide_change(self, kind: int, values: list[Any]) -> Outcome:
        if kind == kind_of.BEGIN_CHANGE:
            (wire,) = exactly(values, 1)
            return self._begin_change(Change.from_wire(wire))
        if len(values) < 2:
            raise ValueError("neither a change nor its shard is named")
        change_id, shard = text(values[0], "change"), text(values[1], "shard")
        change = self.state.changes.get(shard)
        if change is None or change.id != change_id:
            return Outcome("not_found", f"shard {shard} has no change {change_id}")
        if kind == kind_of.END_CHANGE:
            _, _, phase = exactly(values, 3)
            if phase != change.phase.value:
                return Outcome("conflict", f"the change of {shard} is {change.phase.value}")
            del self.state.changes[shard]
            return Outcome("ok")
        if change.phase is not Phase.COPY:
            return Outcome("conflict", f"epoch {change.to_epoch} of {shard} is founded")
        if kind == kind_of.REDIRECT_CHANGE:
            _, _, members, preferred = exactly(values, 4)
            if change.is_split:
                raise ValueError("a split is given up, not redirected")
            target = replace(change.targets[0], members=tuple(members), preferred_leader=preferred)
            self.state.changes[shard] = replace(change, targets=(target,), fresh=())
            return Outcome("ok")
        _, _, index, term = exactly(values, 4)
        founded = change.founded(Base(integer(index, "index"), integer(term, "term")))
        assert self.state.map is not None  # there is a change of one of its shards
        self.state.map = founded.apply_to(self.state.map)
        self.state.changes[shard] = founded
        return Outcome("ok")

    def _begin_change(self, change: Change) -> Outcome:
        if self.state.map is None or change.phase is not Phase.COPY:
            return Outcome("conflict", "there is no map, or the change was founded before")
        if change.shard in self.state.changes:
            return Outcome("conflict", f"another change of shard {change.shard} is under way")
        current = self.state.map.shards.get(change.shard)
        if current is None or (current.epoch, current.members) != (
            change.from_epoch,
            change.old_members,
        ):
            return Outcome("conflict", f"shard {change.shard} is not as the change expects it")
        new = {target.id for target in change.targets}
        for other in self.state.changes.values():
            # The second of them could never be founded, when its shard has been sealed already.
            if taken := new & {target.id for target in other.targets}:
                return Outcome("conflict", f"{other.shard} is to be {min(taken)} by another change")
        change.apply_to(self.state.map)  # raises what a founding would
        self.state.changes[change.shard] = change
        return Outcome("ok")

    def _init(self, settings: ClusterSettings, shard_map: ShardMap) -> Outcome:
        if self.state.settings is not None:
            return Outcome("exists", f"cluster {self.state.settings.cluster_id} was founded before")
        self.state.settings = settings
        self.state.map = shard_map
        return Outcome("ok")

    def _put_node(self, node_id: str, info: NodeInfo) -> Outcome:
        if node_id not in self.state.nodes and len(self.state.nodes) >= _NODES_MAX:
            return Outcome("too_large", f"a cluster has at most {_NODES_MAX} nodes")
        self.state.nodes[node_id] = info
        return Outcome("ok")

    def _set_map(self, expected: int, shard_map: ShardMap) -> Outcome:
        current = 0 if self.state.map is None else self.state.map.version
        if current != expected or shard_map.version != expected + 1:
            return Outcome("conflict", f"the map has version {current}")
        self.state.map = shard_map
        return Outcome("ok")

    def _kv_put(self, key: str, value: Any) -> Outcome:
        if not isinstance(value, bytes):
            raise ValueError("a value is not bytes")
        if len(value) > _VALUE_BYTES_MAX:
            return Outcome("too_large", f"a value has at most {_VALUE_BYTES_MAX} bytes")
        old = self.state.kv.get(key)
        size = self._kv_bytes + len(key) + len(value)
        size -= 0 if old is None else len(key) + len(old)
        if size > _KV_BYTES_MAX:
            return Outcome("too_large", f"all values have at most {_KV_BYTES_MAX} bytes")
        self.state.kv[key] = value
        self._kv_bytes = size
        return Outcome("ok")

    # -- checkpoints --------------------------------------------------------------------

    def checkpoint(self) -> MetaCheckpoint | None:
        if self.applied_index == self.durable_index or self._checkpointing:
            return None
        self._checkpointing = True
        return MetaCheckpoint(self._disk, self._path, self.applied_index, self.image())

    def image(self) -> bytes:
        """All of it, as a checkpoint holds it and as a new voter is given it."""
        body: bytes = msgpack.packb(
            {
                "applied_index": self.applied_index,
                "digest": self._digest,
                "state": self.state.to_wire(),
            }
        )
        return body

    @classmethod
    def install(cls, disk: Disk, path: str, image: bytes) -> MetaStateMachine:
        """A machine that begins with another's image, on disk. Raises MetaCorrupt, OSError."""
        if not disk.exists(path):
            disk.make_dir(path)
            disk.sync_dir(path.rpartition("/")[0])
        MetaCheckpoint(disk, path, 0, image).run()
        return cls(disk, path)

    def checkpoint_done(self, job: Any) -> None:
        self._checkpointing = False
        self.durable_index = max(self.durable_index, job.index)

    def _load(self) -> None:
        name = f"{self._path}/state"
        if not self._disk.exists(name):
            return
        file = self._disk.open(name)
        try:
            data = file.pread(file.size(), 0)
        finally:
            file.close()
        try:
            kept = read_file(data)
            self.state = MetaState.from_wire(kept["state"])
            self.is_from_older = integer(kept["state"].get("level", 1), "level") < LEVEL
            self._digest = bytes(kept["digest"])
            self.applied_index = self.durable_index = integer(kept["applied_index"], "index")
        except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as wrong:
            raise MetaCorrupt(
                f"The checkpoint of the meta group is damaged: {name}: {wrong}.",
                hint="Check the disk, and restore this node's data directory from an intact copy; "
                "the other voters serve without it while a majority is up.",
                file=name,
            ) from wrong
        self._kv_bytes = sum(len(key) + len(value) for key, value in self.state.kv.items())
