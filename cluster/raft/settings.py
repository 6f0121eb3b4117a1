"""The figures a replica group works by, each with its reason. Nothing here is unbounded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RaftSettings:
    # A follower that hears no leader for a random time between these asks for votes. The least
    # must be several heartbeats, or one lost frame starts an election.
    election_s_min: float = 0.5
    election_s_max: float = 1.0
    # How often a leader that has nothing to say says so. All groups of a node say it at the
    # same moments, so that a peer is woken once for all of them.
    heartbeat_s: float = 0.1

    # One append carries at most this much (or one entry): a lagging follower is fed in bounded
    # pieces, and neither side ever holds the whole log.
    append_bytes_max: int = 1 << 20
    append_entries_max: int = 4_096
    # What may be on its way to one follower without an answer, before the leader waits.
    inflight_bytes_max: int = 8 << 20
    inflight_appends_max: int = 256

    # Proposals that are not applied yet, per group. More are refused with Overloaded at once.
    queue_commands_max: int = 10_000
    queue_bytes_max: int = 64 << 20
    command_bytes_max: int = 8 << 20
    # Reads that wait for their round, per group.
    queue_reads_max: int = 50_000

    # One call of the state machine applies at most this much, so that heartbeats go on
    # while a restarted node replays its journal.
    apply_bytes_max: int = 4 << 20
    apply_entries_max: int = 4_096

    # A checkpoint of the state machine is begun after this much was applied since the last.
    # A start applies it again, so this is some 60,000 memories a shard, or a second.
    checkpoint_bytes: int = 8 << 20
    checkpoint_entries: int = 100_000
    # ... and after this long in any case, so that a quiet group does not pin the journal.
    checkpoint_s: float = 60.0
    # Compaction leaves this much behind for followers that were away for a moment ...
    tail_bytes: int = 32 << 20
    # ... and up to this much for one that is connected but slow. One further behind than
    # that is told to re-seed.
    tail_bytes_max: int = 256 << 20

    # How often a full disk is tried again.
    disk_retry_s: float = 0.5
    # A hand-over that has not happened by then is given up, and proposals are taken again.
    transfer_s_max: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_s * 3 < self.election_s_min:
            raise ValueError(
                f"election_s_min={self.election_s_min} must be more than three heartbeats "
                f"(heartbeat_s={self.heartbeat_s}): otherwise one late frame starts an election"
            )
        if not self.election_s_min < self.election_s_max:
            raise ValueError(
                f"election_s_max={self.election_s_max} must be above "
                f"election_s_min={self.election_s_min}: equal timeouts split votes for ever"
            )
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")
