"""Named places where a crash, a delay or a disk's error may be asked for: free when nobody does.

    failpoint("journal.after_sync")

costs a call and a comparison while nothing is armed. A plan arms some of them:

    journal.after_sync=crash@3;replicas.before_record=delay:0.2;meta.before_rename=error:EIO%0.1

`crash` ends the process as SIGKILL does; `delay:SECONDS` blocks the thread that comes by, which
on the event loop is a stall of the whole node; `error:EIO` and `error:ENOSPC` raise OSError, only
where one can occur anyway. `@N`: at the N-th pass only. `%P`: with a probability, which follows
from the entry `seed=N` of the plan, the name and the pass. With neither: at every pass.

A node reads its plan from the environment (`VARIABLE`). What a crash and a delay are is injected
(`agentmem_cluster.realtime.RealFaults`).
"""

from __future__ import annotations

import errno
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NoReturn, Protocol

from agentmem_cluster.errors import AgentMemError

log = logging.getLogger("agentmem.failpoints")

VARIABLE: Final = "AGENTMEM_CHAOS_FAILPOINTS"
_ENTRY: Final = re.compile(
    r"(?P<name>[a-z_]+\.[a-z_]+)="
    r"(?P<action>crash|delay:(?P<delay_s>\d+(\.\d+)?)|error:(?P<error>EIO|ENOSPC))"
    r"(@(?P<at>[1-9]\d*)|%(?P<chance>[01](\.\d+)?))?"
)
_SEED: Final = re.compile(r"seed=(\d+)")

# name -> what has just happened there. The journal's are in the order in which a flush meets them.
POINTS: Final[dict[str, str]] = {
    "journal.recovered": "all segments were read; what was torn is not cut yet",
    "journal.before_roll": "the segment is full: the next one begins with this write",
    "journal.before_write": "entries are buffered, nothing of them is in the file",
    "journal.after_write": "the batch is in the page cache, not on disk",
    "journal.before_sync": "in the flush thread, before datasync",
    "journal.after_sync": "the batch is on disk, nobody knows",
    "journal.before_dir_sync": "a new segment is synced, its name is not",
    "journal.after_dir_sync": "the new segment's name is durable",
    "journal.before_mark": "the mark of what is synced is still the old one",
    "journal.after_mark": "the mark is written",
    "journal.before_remove": "a dead segment is about to go",
    "journal.before_recycle": "a dead segment is about to become the next one",
    "journal.after_recycle": "a dead segment has its new name, which is not durable",
    "journal.after_allocate": "room for the next segment was allocated ahead",
    "gate.after_release": "promises that the flush covers may leave",
    "outbox.before_send": "frames were taken out of the gate and go to the link next",
    "apply.before_batch": "committed entries are about to be applied",
    "apply.after_batch": "a batch is applied within an open transaction",
    "apply.before_commit": "the state row is about to be written and committed",
    "apply.after_commit": "LMDB committed, without a sync",
    "checkpoint.before_datasync": "the snapshot is pinned",
    "checkpoint.after_datasync": "its pages are on disk, the checkpoint file is the old one",
    "checkpoint.before_rename": "the new checkpoint file is synced under another name",
    "checkpoint.after_rename": "it has its name, which is not durable",
    "checkpoint.after_dir_sync": "the checkpoint is durable, the journal is not told",
    "shard.before_rename": "a new, empty environment is whole under another name",
    "shard.after_rename": "it has its name, which is not durable",
    "meta.before_rename": "the meta group's state is synced under another name",
    "meta.after_rename": "it has its name, which is not durable",
    "record.before_write": "what the node takes part in changed in memory only",
    "record.after_write": "the new record is synced under another name",
    "record.after_rename": "the new record has its name, which is not durable",
    "replicas.before_record": "a replica is ready for its epoch",
    "replicas.after_record": "the record names the epoch, the group of the one before still runs",
    "replicas.after_stop": "the group of the epoch before is gone, its log is dropped",
    "replicas.after_add_group": "the new epoch's group runs",
    "replicas.before_close": "the map gives the shard to others",
    "replicas.after_close": "the record closes the epoch, its group still runs",
    "replicas.after_leave": "the group is gone, the folder still there",
    "copying.source_open": "on the source: a snapshot is pinned",
    "copying.source_chunk": "on the source: a chunk is asked for",
    "copying.source_tail": "on the source: the log after the snapshot is asked for",
    "copying.after_open": "the receiver knows what is to come",
    "copying.after_chunk": "a chunk is in the partial copy",
    "copying.before_finish": "all chunks are there, nothing is synced",
    "copying.before_rename": "the copy is durable under its partial name",
    "copying.after_rename": "the copy has its name, which is not durable",
    "copying.while_trimming": "a part of a split is rid of some of what it will not have",
    "copying.after_tail": "entries of the source's log are here, not applied",
    "copying.after_restrict": "the copy is a part of the shard that was split, not on disk",
    "copying.after_complete": "the copy has the final state, on disk",
    "changes.before_begin": "a change was planned",
    "changes.after_begin": "the meta group has it",
    "changes.before_stage": "a node is about to be asked to copy",
    "changes.after_stage": "it said that it does",
    "changes.before_seal": "the old epoch's leader is about to be asked for the seal",
    "changes.after_seal": "the seal is committed",
    "changes.before_found": "enough members have the final state",
    "changes.after_found": "the meta group has named the next epoch",
    "changes.before_finish": "all new members serve",
    "changes.after_finish": "the change is over",
    "epoch.before_seal": "on the old epoch's leader: the seal is about to be proposed",
    "epoch.after_seal": "on the old epoch's leader: it is applied, nobody was answered",
    "epoch.after_fence": "on the new epoch's leader: enough old members closed the old epoch",
    "epoch.after_begin": "on the new epoch's leader: the epoch has begun",
    "link.after_accept": "a peer was greeted",
    "link.before_send": "frames of this turn are about to be handed to the socket",
    "write.before_propose": "a write is decided",
    "write.after_apply": "a write is applied here, the client was not answered",
    "admission.before_record": "the cluster's view of this disk is known, not kept",
    "admission.after_record": "this disk is admitted, and the record says so",
    "view.before_write": "a newer view was adopted, the old one is on disk",
    "view.after_write": "the new view is synced under another name",
    "view.after_rename": "the new view has its name, which is not durable",
}

# Where the disk may refuse anyway, so that an OSError tells nothing that cannot be.
MAY_FAIL: Final = frozenset(
    {
        "journal.before_write",
        "journal.after_write",
        "journal.before_sync",
        "journal.before_dir_sync",
        "journal.before_mark",
        "checkpoint.before_datasync",
        "checkpoint.before_rename",
        "meta.before_rename",
        "record.before_write",
        "record.after_write",
        "view.before_write",
        "view.after_write",
        "copying.after_chunk",
        "copying.before_finish",
    }
)


class WrongPlan(AgentMemError):
    """A plan of failpoints that cannot be read. Nothing was armed."""

    code = "wrong_failpoints"


class Faults(Protocol):
    """What a crash and a delay are."""

    def crash(self) -> NoReturn:
        """End the process now: nothing is flushed, nobody is told."""
        ...

    def stall(self, seconds: float) -> None:
        """Block the calling thread."""
        ...


@dataclass(frozen=True, slots=True)
class Fault:
    """`delay_s` and `error` None: a crash. `at` 0: at every pass, as far as `chance` wants it."""

    name: str
    delay_s: float | None = None
    error: int | None = None
    at: int = 0
    chance: float = 1.0


def failpoint(name: str) -> None:
    """Do here what the armed plan says, if any is. Raises OSError when the plan says so."""
    if _armed is not None:
        _armed(name)


_armed: Callable[[str], None] | None = None


def arm(plan: str, faults: Faults) -> None:
    """Replace what is armed; an empty plan disarms. Raises WrongPlan, and then changes nothing."""
    global _armed
    wanted, seed = parse(plan)
    _armed = _Armed(wanted, seed, faults).passed if wanted else None
    if wanted:
        log.warning("failpoints are armed, this node will fail on purpose: %s", plan)


def parse(plan: str) -> tuple[list[Fault], int]:
    """The faults of a plan and its seed. Raises WrongPlan."""
    found: list[Fault] = []
    seed = 0
    for entry in filter(None, map(str.strip, plan.split(";"))):
        if match := _SEED.fullmatch(entry):
            seed = int(match[1])
            continue
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise WrongPlan(
                f"{entry!r} is no failpoint's entry.",
                hint="Write NAME=crash, NAME=delay:SECONDS or NAME=error:EIO, then perhaps @PASS "
                "or %PROBABILITY; entries are separated by `;`.",
            )
        found.append(_fault(match))
    return found, seed


def _fault(match: re.Match[str]) -> Fault:
    name = match["name"]
    if name not in POINTS:
        raise WrongPlan(
            f"There is no failpoint {name!r}.", hint=f"There are: {', '.join(sorted(POINTS))}."
        )
    if match["error"] and name not in MAY_FAIL:
        raise WrongPlan(
            f"No disk can refuse anything at {name}.",
            hint=f"Errors may be asked for at: {', '.join(sorted(MAY_FAIL))}.",
        )
    return Fault(
        name,
        float(match["delay_s"]) if match["delay_s"] else None,
        getattr(errno, match["error"]) if match["error"] else None,
        int(match["at"] or 0),
        float(match["chance"] or 1.0),
    )


class _Armed:
    """Counts the passes of the points that matter. They come from the loop and from threads."""

    def __init__(self, faults: list[Fault], seed: int, effects: Faults) -> None:
        self._faults: dict[str, list[Fault]] = {}
        for fault in faults:
            self._faults.setdefault(fault.name, []).append(fault)
        self._passes = dict.fromkeys(self._faults, 0)
        self._seed = seed
        self._effects = effects
        self._lock = threading.Lock()

    def passed(self, name: str) -> None:
        faults = self._faults.get(name)
        if faults is None:
            return
        with self._lock:
            self._passes[name] = number = self._passes[name] + 1
        for fault in faults:
            if self._is_due(fault, number):
                self._carry_out(fault, number)

    def _is_due(self, fault: Fault, number: int) -> bool:
        if fault.at:
            return fault.at == number
        return fault.chance >= 1.0 or self._draw(fault.name, number) < fault.chance

    def _draw(self, name: str, number: int) -> float:
        """In [0, 1), the same for the same seed, name and pass."""
        mixed = blake2b(f"{self._seed} {name} {number}".encode(), digest_size=8).digest()
        return int.from_bytes(mixed) / 2**64

    def _carry_out(self, fault: Fault, number: int) -> None:
        if fault.error is not None:
            log.warning("failpoint %s: an error at pass %d", fault.name, number)
            raise OSError(fault.error, f"asked for by failpoint {fault.name}")
        if fault.delay_s is not None:
            log.warning("failpoint %s: %g s at pass %d", fault.name, fault.delay_s, number)
            self._effects.stall(fault.delay_s)
            return
        log.critical("failpoint %s: crash at pass %d", fault.name, number)
        self._effects.crash()
