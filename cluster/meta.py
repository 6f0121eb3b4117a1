"""The state of the meta group: which cluster this is, its nodes, its shard map, small settings.

Every command is checked here, on every replica alike, because a command may come from a node of
another version: a bad one is a result, never an exception. Commands are msgpack lists,
`[format, kind, ...]`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, Final, Literal, NamedTuple
from zlib import crc32

import msgpack

from agentmem_cluster.epochs.change import Base, Change, Phase
from agentmem_cluster.epochs.commands import EpochState
from agentmem_cluster.epochs.commands import decode as decode_control
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.raft.api import Entry
from agentmem_cluster.runtime import Disk
from agentmem_cluster.shardmap import ShardMap

FORMAT: Final = 1
_INIT: Final = 1
_PUT_NODE: Final = 2
_SET_MAP: Final = 3
_KV_PUT: Final = 4
_KV_DELETE: Final = 5
_REMOVE_NODE: Final = 6
# From level 2 on: proposed only when every node has said that it knows them.
_BEGIN_CHANGE: Final = 7
_FOUND_EPOCH: Final = 8
_REDIRECT_CHANGE: Final = 9
_END_CHANGE: Final = 10
# The highest level of commands and formats that this program knows, and what needs which.
LEVEL: Final = 2
LEVEL_OF_CHANGES: Final = 2

_TEXT_CHARS_MAX = 1_024
_NODES_MAX = 1_024
_KEY_CHARS_MAX = 512
_VALUE_BYTES_MAX = 1 << 20
_KV_BYTES_MAX = 64 << 20
_INTEGER_END = 1 << 63

_FILE = struct.Struct("<4sIQI")  # magic, format, bytes, checksum
_FILE_MAGIC = b"AMMS"

Status = Literal["ok", "exists", "conflict", "not_found", "too_large", "bad_command"]


class Outcome(NamedTuple):
    """What became of a command. `exists`: the cluster was founded before; nothing changed."""

    status: Status
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What is decided once, when a cluster is founded."""

    cluster_id: str
    name: str
    model_name: str
    model_dim: int
    model_hash: str
    created_ms: int

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Any) -> ClusterSettings:
        """Raises ValueError. Keys of later versions are ignored."""
        return cls(**_read_fields(cls, wire))


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """Where a node is reached: `peer` HOST:PORT of its link, `http` the URL of its API.

    `incarnation` names its disk ("" in versions that had none), `zone` where it stands, `level`
    what it understands: the highest level of commands and formats.
    """

    peer: str
    http: str
    version: str
    incarnation: str = ""
    zone: str = ""
    level: int = 1

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: Any) -> NodeInfo:
        """Raises ValueError. Keys of later versions are ignored, those that came later default."""
        return cls(**_read_fields(cls, wire))


@dataclass(slots=True)
class MetaState:
    settings: ClusterSettings | None = None
    map: ShardMap | None = None
    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    kv: dict[str, bytes] = field(default_factory=dict)
    changes: dict[str, Change] = field(default_factory=dict)  # by shard: one at a time
    epoch: EpochState = field(default_factory=EpochState)  # of the meta group itself

    @property
    def level(self) -> int:
        """What all nodes understand: nothing newer may be written where others read it."""
        return min((info.level for info in self.nodes.values()), default=1)

    def to_wire(self) -> dict[str, Any]:
        return {
            "settings": None if self.settings is None else self.settings.to_wire(),
            "map": None if self.map is None else self.map.to_wire(),
            "nodes": {name: info.to_wire() for name, info in sorted(self.nodes.items())},
            "kv": dict(sorted(self.kv.items())),
            "changes": [change.to_wire() for _, change in sorted(self.changes.items())],
            "epoch": list(self.epoch),
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> MetaState:
        """Raises ValueError or KeyError. What the version before did not write is defaulted."""
        changes = [Change.from_wire(row) for row in wire.get("changes", [])]
        settings, shard_map = wire["settings"], wire["map"]
        return cls(
            None if settings is None else ClusterSettings.from_wire(settings),
            None if shard_map is None else ShardMap.from_wire(shard_map),
            {str(name): NodeInfo.from_wire(info) for name, info in wire["nodes"].items()},
            {str(key): bytes(value) for key, value in wire["kv"].items()},
            {change.shard: change for change in changes},
            EpochState(*wire.get("epoch", EpochState())),
        )


class MetaCorrupt(AgentMemError):
    """The checkpoint of the meta group cannot be read. The node must not start."""

    code = "meta_corrupt"


# -- commands ---------------------------------------------------------------------------


def init_cluster(settings: ClusterSettings, shard_map: ShardMap) -> bytes:
    """Found the cluster, unless it was: then the outcome is `exists`."""
    return _pack(_INIT, settings.to_wire(), shard_map.to_wire())


def put_node(node_id: str, info: NodeInfo) -> bytes:
    return _pack(_PUT_NODE, node_id, info.to_wire())


def remove_node(node_id: str) -> bytes:
    return _pack(_REMOVE_NODE, node_id)


def set_map(expected_version: int, shard_map: ShardMap) -> bytes:
    """Replace the map, if it still has `expected_version`; the new one is the next version."""
    return _pack(_SET_MAP, expected_version, shard_map.to_wire())


def kv_put(key: str, value: bytes) -> bytes:
    return _pack(_KV_PUT, key, value)


def kv_delete(key: str) -> bytes:
    return _pack(_KV_DELETE, key)


def begin_change(change: Change) -> bytes:
    """Begin to change a shard's epoch; refused while another change of the shard is under way."""
    return _pack(_BEGIN_CHANGE, change.to_wire())


def found_epoch(change_id: str, shard: str, base: Base) -> bytes:
    """The next epoch of a shard serves from now on: the map changes, and never back."""
    return _pack(_FOUND_EPOCH, change_id, shard, base.index, base.term)


def redirect_change(change_id: str, shard: str, members: Sequence[str], preferred: str) -> bytes:
    """Give the next epoch other members, while it is not founded."""
    return _pack(_REDIRECT_CHANGE, change_id, shard, list(members), preferred)


def end_change(change_id: str, shard: str) -> bytes:
    """It is finished when its epoch was founded, and given up when not."""
    return _pack(_END_CHANGE, change_id, shard)


def _pack(kind: int, *values: Any) -> bytes:
    packed: bytes = msgpack.packb([FORMAT, kind, *values])
    return packed


# -- the state machine ------------------------------------------------------------------


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
            before = self.state.epoch
            self.state.epoch = before.after(control)
            return Outcome("ok" if self.state.epoch != before else "conflict")
        try:
            values = msgpack.unpackb(command)
            if not isinstance(values, list) or len(values) < 3 or values[0] != FORMAT:
                raise ValueError(f"a command of format {FORMAT} was expected")
            return self._decide(values[1], values[2:])
        except (ValueError, TypeError, msgpack.UnpackException) as wrong:
            return Outcome("bad_command", str(wrong)[:_TEXT_CHARS_MAX])

    def _decide(self, kind: int, values: list[Any]) -> Outcome:
        if kind == _INIT:
            settings, shard_map = _exactly(values, 2)
            return self._init(ClusterSettings.from_wire(settings), ShardMap.from_wire(shard_map))
        if kind == _PUT_NODE:
            node_id, info = _exactly(values, 2)
            return self._put_node(_text(node_id, "node id"), NodeInfo.from_wire(info))
        if kind == _REMOVE_NODE:
            (node_id,) = _exactly(values, 1)
            gone = self.state.nodes.pop(_text(node_id, "node id"), None)
            return Outcome("ok" if gone is not None else "not_found")
        if kind == _SET_MAP:
            expected, shard_map = _exactly(values, 2)
            return self._set_map(_integer(expected, "version"), ShardMap.from_wire(shard_map))
        if kind == _KV_PUT:
            key, value = _exactly(values, 2)
            return self._kv_put(_text(key, "key", _KEY_CHARS_MAX), value)
        if kind == _KV_DELETE:
            (key,) = _exactly(values, 1)
            value = self.state.kv.pop(_text(key, "key", _KEY_CHARS_MAX), None)
            if value is None:
                return Outcome("not_found")
            self._kv_bytes -= len(key) + len(value)
            return Outcome("ok")
        if kind in (_BEGIN_CHANGE, _FOUND_EPOCH, _REDIRECT_CHANGE, _END_CHANGE):
            return self._decide_change(kind, values)
        raise ValueError(f"kind {kind!r} is unknown")

    def _decide_change(self, kind: int, values: list[Any]) -> Outcome:
        if kind == _BEGIN_CHANGE:
            (wire,) = _exactly(values, 1)
            return self._begin_change(Change.from_wire(wire))
        change_id, shard = _text(values[0], "change"), _text(values[1], "shard")
        change = self.state.changes.get(shard)
        if change is None or change.id != change_id:
            return Outcome("not_found", f"shard {shard} has no change {change_id}")
        if kind == _END_CHANGE:
            _exactly(values, 2)
            del self.state.changes[shard]
            return Outcome("ok")
        if change.phase is not Phase.COPY:
            return Outcome("conflict", f"epoch {change.to_epoch} of {shard} is founded")
        if kind == _REDIRECT_CHANGE:
            _, _, members, preferred = _exactly(values, 4)
            if change.is_split:
                raise ValueError("a split is given up, not redirected")
            target = replace(change.targets[0], members=tuple(members), preferred_leader=preferred)
            self.state.changes[shard] = replace(change, targets=(target,), fresh=())
            return Outcome("ok")
        _, _, index, term = _exactly(values, 4)
        founded = change.founded(Base(_integer(index, "index"), _integer(term, "term")))
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
        body: bytes = msgpack.packb(
            {
                "applied_index": self.applied_index,
                "digest": self._digest,
                "state": self.state.to_wire(),
            }
        )
        return MetaCheckpoint(self._disk, self._path, self.applied_index, body)

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
            kept = _read_file(data)
            self.state = MetaState.from_wire(kept["state"])
            self._digest = bytes(kept["digest"])
            self.applied_index = self.durable_index = _integer(kept["applied_index"], "index")
        except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as wrong:
            raise MetaCorrupt(
                f"The checkpoint of the meta group is damaged: {name}: {wrong}.",
                hint="Check the disk, and restore this node's data directory from an intact copy; "
                "the other voters serve without it while a majority is up.",
                file=name,
            ) from wrong
        self._kv_bytes = sum(len(key) + len(value) for key, value in self.state.kv.items())


class MetaCheckpoint:
    """One state on its way to the disk: it replaces the last one whole, or not at all."""

    def __init__(self, disk: Disk, path: str, index: int, body: bytes) -> None:
        self._disk = disk
        self._path = path
        self._body = body
        self.index = index

    def run(self) -> None:
        """Raises OSError; may be run again."""
        unfinished = f"{self._path}/state.new"
        file = self._disk.open(unfinished, create=True)
        try:
            file.truncate(0)
            header = _FILE.pack(_FILE_MAGIC, FORMAT, len(self._body), crc32(self._body))
            file.pwrite(header + self._body, 0)
            file.datasync()
        finally:
            file.close()
        self._disk.rename(unfinished, f"{self._path}/state")
        self._disk.sync_dir(self._path)


def _read_file(data: bytes) -> dict[str, Any]:
    if len(data) < _FILE.size:
        raise ValueError("it is cut short")
    magic, version, size, checksum = _FILE.unpack_from(data)
    body = data[_FILE.size :]
    if magic != _FILE_MAGIC:
        raise ValueError("it is no such file")
    if len(body) != size or crc32(body) != checksum:
        raise ValueError("its checksum is wrong")
    if version != FORMAT:
        raise ValueError(f"it is of format {version}, and this program reads {FORMAT}")
    kept = msgpack.unpackb(body)
    if not isinstance(kept, dict):
        raise ValueError("it is not a map")
    return kept


# -- reading what others wrote ----------------------------------------------------------


def _read_fields(kind: type[Any], wire: Any) -> dict[str, Any]:
    if not isinstance(wire, dict):
        raise ValueError(f"{kind.__name__} is not a map")
    values = {}
    for spec in fields(kind):
        value = wire.get(spec.name)
        if value is None and spec.default is not MISSING:
            continue
        check = _integer if spec.type == "int" else _any_text
        values[spec.name] = check(value, f"{kind.__name__}.{spec.name}")
    return values


def _exactly(values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise ValueError(f"{count} values were expected, not {len(values)}")
    return values


def _text(value: Any, name: str, chars_max: int = _TEXT_CHARS_MAX) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= chars_max:
        raise ValueError(f"{name} is not a text of 1 to {chars_max} characters")
    return value


def _any_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > _TEXT_CHARS_MAX:
        raise ValueError(f"{name} is not a text of at most {_TEXT_CHARS_MAX} characters")
    return value


def _integer(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < _INTEGER_END:
        raise ValueError(f"{name} is not an integer of 0 or more")
    return value
