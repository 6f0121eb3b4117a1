"""What a node says of its replicas of a shard that changes: plain values that cross the link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any


class Staging(Enum):
    """How far a copy is that will become a replica of the next epoch."""

    COPYING = "copying"
    FOLLOWING = "following"  # the copy is whole; it applies what the old epoch commits
    COMPLETE = "complete"  # it has applied the seal: the final state
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class OldReplica:
    """A replica of the epoch that ends. `seal`: index and term of its last entry, once applied."""

    applied_index: int
    durable_index: int
    is_leader: bool = False
    needs_reseed: bool = False
    seal: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class StagedReplica:
    state: Staging
    applied_index: int = 0
    durable_index: int = 0
    seal: tuple[int, int] | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class NewReplica:
    """A replica of the next epoch. `has_begun`: it has taken writes, as far as is applied here."""

    applied_index: int
    is_leader: bool = False
    has_begun: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """`staged` and `new` by the shard that they will be, or are."""

    node: str
    old: OldReplica | None = None
    staged: Mapping[str, StagedReplica] = field(default_factory=dict)
    new: Mapping[str, NewReplica] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "old": None if self.old is None else asdict(self.old),
            "staged": {
                shard: {**asdict(staged), "state": staged.state.value}
                for shard, staged in self.staged.items()
            },
            "new": {shard: asdict(new) for shard, new in self.new.items()},
        }

    @classmethod
    def from_wire(cls, node: str, wire: Any) -> Report:
        """Raises ValueError, TypeError or KeyError for what `to_wire` could not have made."""
        old = wire["old"]
        return cls(
            node,
            None if old is None else OldReplica(**{**old, "seal": _pair(old["seal"])}),
            {
                shard: StagedReplica(
                    **{**row, "state": Staging(row["state"]), "seal": _pair(row["seal"])}
                )
                for shard, row in wire["staged"].items()
            },
            {shard: NewReplica(**row) for shard, row in wire["new"].items()},
        )


def _pair(value: Any) -> tuple[int, int] | None:
    return None if value is None else (int(value[0]), int(value[1]))
