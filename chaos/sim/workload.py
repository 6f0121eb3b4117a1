"""What clients ask for: of registers and counters, or of memories that are made, changed, deleted.

A client decides on what it has seen itself, as a user does: an update names the version that was
read, and fails when another client was faster.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from typing import NamedTuple

from agentmem_chaos.checker import GONE, Kind

CLIENT_VALUES = 1_000_000  # values of a client, so that no two clients ever write the same one
SUM_READ_CHANCE = 0.25
DELETE_CHANCE = 0.06
BLIND_CHANCE = 0.3  # of the deletes that name no version


class Asked(NamedTuple):
    """`value` is made of the number of the call."""

    kind: Kind
    key: str
    value: Callable[[int], Hashable] = lambda number: 0
    expected: Hashable = None


class Registers:
    """Registers `k0`.. are written and compared, counters `sum0`.. are added to."""

    def __init__(self, client: int, keys: int, chance: random.Random) -> None:
        self._client = client
        self._keys = keys
        self._chance = chance
        self._seen: dict[str, Hashable] = {}

    def draw(self) -> Asked:
        kind = self._chance.choice(
            [Kind.READ, Kind.READ, Kind.READ, Kind.WRITE, Kind.WRITE, Kind.CAS, Kind.ADD]
        )
        return self._draw(kind)

    def draw_write(self) -> Asked:
        return self._draw(Kind.WRITE)

    def _draw(self, kind: Kind) -> Asked:
        chance = self._chance
        number = chance.randrange(self._keys)
        key = f"k{number}"
        if kind is Kind.ADD or (kind is Kind.READ and chance.random() < SUM_READ_CHANCE):
            key = f"sum{number}"  # adds have keys of their own, so that no write hides a lost one
        if kind is Kind.READ:
            return Asked(kind, key)
        if kind is Kind.ADD:
            amount = chance.randint(1, 3)
            return Asked(kind, key, lambda _: amount)
        expected = self._seen.get(key) if kind is Kind.CAS else None
        return Asked(kind, key, self._value, expected)

    def _value(self, number: int) -> int:
        return self._client * CLIENT_VALUES + number

    def learn(self, kind: Kind, key: str, value: Hashable, ok: bool, result: Hashable) -> None:
        self._seen[key] = result

    def forget(self, key: str) -> None:
        pass  # what was seen last is as good a guess as any


class _Somehow:
    """What a client knows of a memory that changed behind its back: that it was there once."""


SOMEHOW = _Somehow()


class Memories:
    """Memories `m0.0`..; one that is deleted stays so, and its place is taken by `m0.1`."""

    def __init__(self, client: int, keys: int, chance: random.Random) -> None:
        self._client = client
        self._keys = keys
        self._chance = chance
        self._lives: dict[int, int] = {}
        self._seen: dict[str, object] = {}  # None, (version, content) or SOMEHOW

    def draw(self) -> Asked:
        key = self._key()
        if self._chance.random() < 0.4 or self._seen.get(key) is SOMEHOW:
            return Asked(Kind.READ, key)
        return self._write(key)

    def draw_write(self) -> Asked:
        return self._write(self._key())

    def _key(self) -> str:
        number = self._chance.randrange(self._keys)
        return f"m{number}.{self._lives.get(number, 0)}"

    def _write(self, key: str) -> Asked:
        seen = self._seen.get(key)
        if not isinstance(seen, tuple):
            return Asked(Kind.CAS, key, lambda number: (1, self._content(number)))
        if self._chance.random() < DELETE_CHANCE:
            blind = self._chance.random() < BLIND_CHANCE
            return Asked(Kind.DELETE, key, expected=None if blind else seen)
        version = seen[0] + 1
        return Asked(Kind.CAS, key, lambda number: (version, self._content(number)), seen)

    def _content(self, number: int) -> int:
        return self._client * CLIENT_VALUES + number

    def learn(self, kind: Kind, key: str, value: Hashable, ok: bool, result: Hashable) -> None:
        seen = self._seen.get(key)
        if kind is Kind.READ:
            # Whoever was told that it exists, and then that it does not, knows that it is gone.
            after: object = GONE if result is None and seen is SOMEHOW else result
        elif not ok:
            after = SOMEHOW
        else:
            after = GONE if kind is Kind.DELETE else value
        if after is GONE:
            place, life = key.removeprefix("m").split(".")
            self._lives[int(place)] = max(self._lives.get(int(place), 0), int(life) + 1)
            self._seen.pop(key, None)
        elif f".{self._lives.get(int(key[1:].split('.')[0]), 0)}" == key[key.index(".") :]:
            self._seen[key] = after

    def forget(self, key: str) -> None:
        self._seen[key] = SOMEHOW
