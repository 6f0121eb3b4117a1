"""The two log entries that bound an epoch: SEAL, its last, and BEGIN, the first of the next.

They stand in the logs of all groups among commands that this layer cannot read, so they begin
with a byte that no msgpack value begins with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import msgpack

MARK: Final = b"\xc1"
FORMAT: Final = 1
_SEAL: Final = 1
_BEGIN: Final = 2  # 3 is no control entry, but says in a log where it began: backup/origin.py
_EPOCH_END: Final = 1 << 63


# Not tuples, as the others here: a tuple of one number equals any other of the same number.
@dataclass(frozen=True, slots=True)
class Seal:
    """Epoch `epoch` takes no more commands: what was applied before is its final state."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Begin:
    """Epoch `epoch` takes commands from here on: nobody can be reading the one before any more."""

    epoch: int


Control = Seal | Begin


class Sealed(NamedTuple):
    """The result of a command that came outside its epoch. It did nothing: certainly not done."""

    epoch: int


class EpochState(NamedTuple):
    """What of epochs a state machine keeps with its state.

    Commands take effect in the group of epoch `epoch`, unless it is sealed.
    """

    epoch: int = 1
    is_sealed: bool = False

    def after(self, control: Control) -> EpochState:
        """The state after a control entry; the same object when it does nothing."""
        if isinstance(control, Seal):
            if control.epoch != self.epoch or self.is_sealed:
                return self
            return EpochState(self.epoch, True)
        if control.epoch <= self.epoch:
            return self
        return EpochState(control.epoch, False)


class HasEpoch(Protocol):
    @property
    def epoch_state(self) -> EpochState: ...


def encode(control: Control) -> bytes:
    kind = _SEAL if isinstance(control, Seal) else _BEGIN
    body: bytes = msgpack.packb([FORMAT, kind, control.epoch])
    return MARK + body


def is_control(command: bytes) -> bool:
    return command[:1] == MARK


def decode(command: bytes) -> Control | None:
    """None for what is no control entry of a format and kind that this version knows."""
    if not is_control(command):
        return None
    try:
        value: Any = msgpack.unpackb(command[1:])
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return None
    if (
        type(value) is not list
        or len(value) != 3
        or any(type(item) is not int for item in value)
        or value[0] != FORMAT
        or not 0 < value[2] < _EPOCH_END
    ):
        return None
    if value[1] == _SEAL:
        return Seal(value[2])
    return Begin(value[2]) if value[1] == _BEGIN else None
