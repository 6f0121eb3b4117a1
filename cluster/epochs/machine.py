"""One epoch's view of a state machine: everything up to the seal, and nothing after it.

Entries may follow the seal in the log, because its leader had more under way. They must not
touch the state, not even its applied index: the next epoch's log begins right after the seal, on
every member alike. So this stands between the group and the state machine, counts such entries
as applied, and answers that they were not done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from agentmem_cluster.epochs.commands import EpochState, Sealed, decode
from agentmem_cluster.raft.api import Entry, StateMachine


class EpochAware(StateMachine, Protocol):
    """A state machine that carries out control entries and keeps their outcome with its state."""

    @property
    def epoch_state(self) -> EpochState: ...


class EpochMachine:
    """Implements `StateMachine` for the group of one epoch, over a state that outlives it."""

    def __init__(
        self,
        inner: EpochAware,
        epoch: int,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called when the epoch was sealed or has begun; it must not raise."""
        self.inner = inner
        self.epoch = epoch
        self._on_change = on_change
        self._passed = inner.applied_index  # entries counted, those after the seal included

    # -- what of the epoch is known ----------------------------------------------------------

    @property
    def is_sealed(self) -> bool:
        """This epoch has its final state, which is the state machine's."""
        state = self.inner.epoch_state
        return state.is_sealed and state.epoch == self.epoch

    @property
    def has_begun(self) -> bool:
        """Commands take effect, or did until the seal."""
        return self.inner.epoch_state.epoch == self.epoch

    @property
    def accepts(self) -> bool:
        """Whether a command proposed now would take effect, as far as is applied here."""
        return self.inner.epoch_state == EpochState(self.epoch, False)

    # -- the state machine ---------------------------------------------------------------------

    @property
    def applied_index(self) -> int:
        return self._passed

    @property
    def durable_index(self) -> int:
        return self.inner.durable_index

    def apply(self, entries: Sequence[Entry]) -> list[Any]:
        if not entries:
            return []
        before = self.inner.epoch_state
        last = 0 if self.is_sealed else self._end_of_epoch(entries)
        results = self.inner.apply(entries[:last]) if last else []
        self._passed = entries[-1].index
        if self.inner.epoch_state != before:
            self._on_change()
        return [*results, *[Sealed(self.epoch)] * (len(entries) - last)]

    def _end_of_epoch(self, entries: Sequence[Entry]) -> int:
        """How many of the entries belong to the epoch: all, or those up to its seal. An epoch may
        begin and end within them."""
        state = self.inner.epoch_state
        for number, entry in enumerate(entries, 1):
            control = decode(entry.command)
            if control is not None:
                state = state.after(control)
                if state == (self.epoch, True):
                    return number
        return len(entries)

    def checkpoint(self) -> Any:
        return self.inner.checkpoint()

    def checkpoint_done(self, job: Any) -> None:
        self.inner.checkpoint_done(job)

    def digest(self) -> bytes:
        return self.inner.digest()

    def close(self) -> None:
        self.inner.close()
