"""Commands of the meta group: msgpack lists, `[format, kind, ...]`, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import msgpack

from agentmem_cluster.epochs.change import Base, Change, Phase
from agentmem_cluster.meta.state import ClusterSettings, NodeInfo
from agentmem_cluster.shardmap import ShardMap

FORMAT: Final = 1
INIT: Final = 1
PUT_NODE: Final = 2
SET_MAP: Final = 3
KV_PUT: Final = 4
KV_DELETE: Final = 5
REMOVE_NODE: Final = 6
# From level 2 on: proposed only when every node has said that it knows them.
BEGIN_CHANGE: Final = 7
FOUND_EPOCH: Final = 8
REDIRECT_CHANGE: Final = 9
END_CHANGE: Final = 10
CHANGE_VOTERS: Final = 11

Status = Literal["ok", "exists", "conflict", "not_found", "too_large", "bad_command"]


class Outcome(NamedTuple):
    """What became of a command. `exists`: the cluster was founded before; nothing changed."""

    status: Status
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def init_cluster(settings: ClusterSettings, shard_map: ShardMap) -> bytes:
    """Found the cluster, unless it was: then the outcome is `exists`."""
    return _pack(INIT, settings.to_wire(), shard_map.to_wire())


def put_node(node_id: str, info: NodeInfo) -> bytes:
    return _pack(PUT_NODE, node_id, info.to_wire())


def remove_node(node_id: str) -> bytes:
    return _pack(REMOVE_NODE, node_id)


def set_map(expected_version: int, shard_map: ShardMap) -> bytes:
    """Replace the map, if it still has `expected_version`; the new one is the next version."""
    return _pack(SET_MAP, expected_version, shard_map.to_wire())


def kv_put(key: str, value: bytes) -> bytes:
    return _pack(KV_PUT, key, value)


def kv_delete(key: str) -> bytes:
    return _pack(KV_DELETE, key)


def begin_change(change: Change) -> bytes:
    """Begin to change a shard's epoch; refused while another change of the shard is under way."""
    return _pack(BEGIN_CHANGE, change.to_wire())


def found_epoch(change_id: str, shard: str, base: Base) -> bytes:
    """The next epoch of a shard serves from now on: the map changes, and never back."""
    return _pack(FOUND_EPOCH, change_id, shard, base.index, base.term)


def redirect_change(change_id: str, shard: str, members: Sequence[str], preferred: str) -> bytes:
    """Give the next epoch other members, while it is not founded."""
    return _pack(REDIRECT_CHANGE, change_id, shard, list(members), preferred)


def end_change(change_id: str, shard: str, phase: Phase) -> bytes:
    """It is finished when its epoch was founded, and given up when not.

    `phase`: as whoever wants this knows it. Who gives up must not end what was founded meanwhile:
    members that do not serve yet learn from the change where their log begins.
    """
    return _pack(END_CHANGE, change_id, shard, phase.value)


def change_voters(epoch: int, members: Sequence[str]) -> bytes:
    """Name the voters of the meta group's next epoch; its seal and founding follow."""
    return _pack(CHANGE_VOTERS, epoch, list(members))


def _pack(kind: int, *values: Any) -> bytes:
    packed: bytes = msgpack.packb([FORMAT, kind, *values])
    return packed
