"""Operations as the meta group keeps them: what was wished, its steps, and how far they are."""

from __future__ import annotations

from typing import Any

import msgspec

from agentmem_cluster.epochs.change import Change
from agentmem_cluster.shardmap import ShardInfo, ShardMap
from agentmem_node.model import operations as ops


class StoredStep(msgspec.Struct, kw_only=True):
    """The target of one epoch change. A split has a `new_shard`, from `at_slot` on."""

    shard: str
    members: list[str]
    preferred: str
    reason: str
    fresh: list[str] = []
    source: str = ""
    new_shard: str = ""
    at_slot: int = 0
    state: ops.StepState = "pending"
    epoch: int = 0  # the one that it founds, once it was begun
    error: str = ""
    bytes: int = 0
    from_members: list[str] = []

    def change(self, shard_map: ShardMap, change_id: str, operation: str) -> Change:
        """The change that this step is, of the shard as it is now. Raises KeyError."""
        info = shard_map.shards[self.shard]
        members = tuple(sorted(self.members))
        epoch = info.epoch + 1
        end = self.at_slot if self.new_shard else info.slot_end
        targets = [ShardInfo(self.shard, epoch, members, self.preferred, info.slot_start, end)]
        if self.new_shard:
            targets.append(
                ShardInfo(self.new_shard, epoch, members, self.preferred, end, info.slot_end)
            )
        return Change(
            change_id,
            self.shard,
            info.epoch,
            info.members,
            tuple(targets),
            fresh=tuple(sorted(self.fresh)),
            source=self.source,
            reason=self.reason,
            operation=operation,
        )


class StoredOperation(msgspec.Struct, kw_only=True):
    id: str
    wish: ops.OperationWish
    state: ops.OperationState = "running"
    created_at: str
    by: str
    message: str = ""
    steps: list[StoredStep]
    # How often its steps were begun: a change that is begun again has another id.
    begun: int = 0

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> StoredOperation:
        """Raises msgspec.DecodeError."""
        return msgspec.json.decode(data, type=cls)

    def shown(self, progress: dict[str, dict[str, Any]]) -> ops.Operation:
        """For a person. `progress` by shard: what the conductor knows beyond what is stored."""
        return ops.Operation(
            id=self.id,
            wish=self.wish,
            state=self.state,
            created_at=self.created_at,
            steps=[_shown(step, progress.get(step.shard, {})) for step in self.steps],
            message=self.message,
            by=self.by,
        )


def _shown(step: StoredStep, progress: dict[str, Any]) -> ops.StepProgress:
    live = progress if step.state not in ("done", "failed", "pending") else {}
    copies = _copies(step)
    total = int(live.get("total_bytes") or step.bytes)
    return ops.StepProgress(
        shard=step.shard,
        from_members=step.from_members,
        to_members=step.members,
        preferred_leader=step.preferred,
        reason=step.reason,
        bytes=step.bytes,
        copies=copies,
        state=live.get("state") or step.state,
        done_bytes=total if step.state == "done" else int(live.get("done_bytes") or 0),
        total_bytes=total,
        error=step.error or str(live.get("error") or ""),
    )


def _copies(step: StoredStep) -> int:
    if step.new_shard:
        return 2 * len(step.members)
    if step.source:
        return len(step.members)
    return len({*step.members, *step.fresh} - ({*step.from_members} - {*step.fresh}))
