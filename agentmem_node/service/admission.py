"""Whether this node's disk is the one that the cluster knows, and what follows when it is not.

A node that lost its disk has forgotten its votes. It may hold replicas again, but never of an
epoch in which its old self may have taken part: all epochs that serve when it comes back are
closed to it, and the cluster gives it a place in the next ones.

A disk takes part in nothing before the cluster knows it, or a disk that was lost before its
registration came through would be one that nobody had known: its successor could vote again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from agentmem_cluster.epochs.record import Held, LocalRecord
from agentmem_cluster.epochs.replicas import folder_name
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.raft.api import GROUP_META
from agentmem_cluster.runtime import Disk, Rng
from agentmem_node.service.view import View

log = logging.getLogger("agentmem.membership")

META_FOLDER = "meta"
_INCARNATION_BYTES = 12


def open_record(disk: Disk, logs: Iterable[tuple[str, int]], rng: Rng) -> LocalRecord:
    """The record on this disk; a new one for a new disk. Raises RecordCorrupt, OSError.

    `logs`: the groups in the journal. A version that kept no record left its groups there, before
    this version ran on the disk or after it.
    """
    record = LocalRecord.load(disk)
    is_new = record is None
    if record is None:
        record = LocalRecord(rng.token(_INCARNATION_BYTES).hex())
    # With a record, a group is in it before it is in the journal, and closed before it leaves.
    unknown = [
        (group, epoch)
        for group, epoch in logs
        if group not in record.held and epoch > record.closed.get(group, 0)
    ]
    for group, epoch in unknown:
        record.is_admitted = True
        folder = META_FOLDER if group == GROUP_META else folder_name(group, epoch)
        record.hold(group, Held(epoch, folder))
    if is_new or unknown:
        record.save(disk)
    return record


def admit(record: LocalRecord, view: View, node_id: str, disk: Disk) -> bool:
    """Compare this disk with what the cluster knows. Returns whether replicas were given up.

    Raises OSError when the record cannot be written.
    """
    known = view.nodes.get(node_id)
    is_known_disk = known is not None and known.incarnation == record.incarnation
    # Versions before had no incarnations: a disk with their data is the one they knew.
    is_old_disk = known is not None and known.incarnation == "" and record.is_admitted
    if record.is_admitted and (known is None or is_known_disk or is_old_disk):
        return False
    if known is None:
        return False  # it registers first
    # The view in which it is registered may be the first to show an epoch of its old self.
    is_another = not is_known_disk or GROUP_META in record.closed
    if not is_known_disk:
        log.warning(
            "the cluster knows node %s with another disk: what was on it is taken as lost, and is "
            "copied from other nodes",
            node_id,
        )
    failpoint("admission.before_record")
    with record.kept(disk):
        if is_another:
            for info in view.map.shards.values():
                record.close(info.id, info.epoch)
            record.close(GROUP_META, 1 if view.meta is None else view.meta.epoch)
        record.is_admitted |= is_known_disk
    failpoint("admission.after_record")
    return is_another
