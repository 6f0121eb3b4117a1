"""The network between simulated nodes: sessions that keep order, delay, stall and break.

It behaves as TCP does. Frames of a session arrive in the order they were sent or not at all. A
cut does not lose frames: it stalls them, and if it lasts the session breaks and what was in
flight is gone. A one-way cut lets the other direction through until the session breaks. Frames
are packed and unpacked on the way, so no two nodes ever share an object.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack

from agentmem_chaos.sim.link import ASK, TOLD
from agentmem_chaos.sim.schedule import Schedule, stream

Pair = tuple[str, str]
STALLED_BURSTS_MAX = 200


class Endpoint(Protocol):
    """What the network sees of a node."""

    @property
    def alive(self) -> bool: ...

    @property
    def paused(self) -> bool: ...

    def arrive(self, peer: str, frames: list[Any]) -> None: ...

    def connected(self, peer: str, session: int) -> None: ...

    def disconnected(self, peer: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Session:
    number: int
    pair: Pair
    open_at: dict[str, bool]
    boots: dict[str, int]
    last_arrival_s: dict[str, float] = field(default_factory=dict)
    stalled: dict[str, list[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NetPlan:
    delay_s: tuple[float, float]
    spike_chance: float
    spike_s: float
    break_after_s: tuple[float, float]
    reconnect_s: tuple[float, float]


class SimNet:
    def __init__(
        self,
        schedule: Schedule,
        seed: int,
        plan: NetPlan,
        boot_of: Callable[[str], int],
        trace: Callable[[bytes], None],
    ) -> None:
        self._schedule = schedule
        self._plan = plan
        self._seed = seed
        self._boot_of = boot_of
        self._endpoints: dict[str, Endpoint] = {}
        self._sessions: dict[Pair, _Session] = {}
        self._numbers: dict[Pair, int] = {}
        self._chance: dict[Pair, random.Random] = {}
        self.cuts: set[Pair] = set()  # directed
        self.bursts = 0
        self._trace: Callable[[bytes], None] = trace

    def attach(self, name: str, endpoint: Endpoint) -> None:
        for other in self._endpoints:
            for pair in ((name, other), (other, name)):
                self._chance[pair] = stream(self._seed, f"net/{pair[0]}/{pair[1]}")
        self._endpoints[name] = endpoint

    # -- frames --

    def send(self, sender: str, receiver: str, frames: list[Any]) -> bool:
        session = self._sessions.get(_pair(sender, receiver))
        if session is None or not session.open_at[sender]:
            return False
        burst: bytes = msgpack.packb(frames)
        head = frames[0][:1] if frames and isinstance(frames[0], list) else []
        is_call = bool(head) and head[0] in (ASK, TOLD)
        # Of calls only what they are: pages of real files hold bytes that nobody has set.
        shown = (
            b"%s %d %d" % (frames[0][0].encode(), frames[0][1], len(burst)) if is_call else burst
        )
        self._trace(f"{self._schedule.now_s:.9f} {sender}>{receiver} ".encode() + shown)
        direction = (sender, receiver)
        if direction in self.cuts or session.stalled.get(receiver):
            stalled = session.stalled.setdefault(receiver, [])
            if len(stalled) >= STALLED_BURSTS_MAX:
                return False
            stalled.append(burst)
            return True
        self._carry(session, sender, receiver, burst)
        return True

    def _carry(self, session: _Session, sender: str, receiver: str, burst: bytes) -> None:
        chance = self._chance[sender, receiver]
        delay_s = chance.uniform(*self._plan.delay_s)
        if chance.random() < self._plan.spike_chance:
            delay_s += chance.uniform(0.0, self._plan.spike_s)
        arrival_s = max(self._schedule.now_s + delay_s, session.last_arrival_s.get(receiver, 0.0))
        session.last_arrival_s[receiver] = arrival_s
        self._schedule.after(
            arrival_s - self._schedule.now_s,
            lambda: self._deliver(session, sender, receiver, burst),
        )

    def _deliver(self, session: _Session, sender: str, receiver: str, burst: bytes) -> None:
        if not session.open_at[receiver]:
            return
        if (sender, receiver) in self.cuts:
            session.stalled.setdefault(receiver, []).append(burst)
            return
        self.bursts += 1
        self._endpoints[receiver].arrive(sender, msgpack.unpackb(burst))

    # -- sessions --

    def join(self, name: str) -> None:
        """A node started or woke: it dials everybody, soon."""
        for other in self._endpoints:
            if other != name:
                self._dial_later(_pair(name, other))

    def leave(self, name: str, *, silent: bool) -> None:
        """A process died. Its peers notice at once (reset), or late when the machine is gone."""
        for other in self._endpoints:
            session = self._sessions.get(_pair(name, other)) if other != name else None
            if session is None:
                continue
            session.open_at[name] = False
            chance = self._chance[name, other]
            delay_s = chance.uniform(*self._plan.break_after_s) if silent else 0.001
            self._schedule.after(delay_s, lambda session=session: self._break(session))  # type: ignore[misc]

    def break_session(self, a: str, b: str) -> None:
        session = self._sessions.get(_pair(a, b))
        if session is not None:
            self._break(session)

    def cut(self, pairs: set[Pair]) -> None:
        """Cut directed pairs. Sessions over them break when the cut outlasts their patience."""
        self.cuts |= pairs
        for pair in sorted({_pair(*p) for p in pairs}):
            session = self._sessions.get(pair)
            if session is not None:
                delay_s = self._chance[pair].uniform(*self._plan.break_after_s)
                self._schedule.after(delay_s, lambda s=session: self._break_if_cut(s))  # type: ignore[misc]

    def heal(self) -> None:
        self.cuts.clear()
        for pair in sorted(_pair(a, b) for a in self._endpoints for b in self._endpoints if a < b):
            session = self._sessions.get(pair)
            if session is None:
                self._dial_later(pair)
                continue
            for receiver in pair:
                sender = pair[0] if receiver == pair[1] else pair[1]
                for burst in session.stalled.pop(receiver, []):
                    self._carry(session, sender, receiver, burst)

    def connected_pairs(self) -> int:
        return len(self._sessions)

    def _break_if_cut(self, session: _Session) -> None:
        a, b = session.pair
        if (a, b) in self.cuts or (b, a) in self.cuts:
            self._break(session)

    def _break(self, session: _Session) -> None:
        if self._sessions.get(session.pair) is not session:
            return
        del self._sessions[session.pair]
        for name in session.pair:
            other = session.pair[0] if name == session.pair[1] else session.pair[1]
            if session.open_at[name] and self._boot_of(name) == session.boots[name]:
                self._endpoints[name].disconnected(other)
            session.open_at[name] = False
        self._dial_later(session.pair)

    def _dial_later(self, pair: Pair) -> None:
        delay_s = self._chance[pair].uniform(*self._plan.reconnect_s)
        self._schedule.after(delay_s, lambda: self._dial(pair))

    def _dial(self, pair: Pair) -> None:
        a, b = pair
        if pair in self._sessions or (a, b) in self.cuts or (b, a) in self.cuts:
            return
        ends = [self._endpoints[a], self._endpoints[b]]
        if not all(end.alive and not end.paused for end in ends):
            return
        number = self._numbers[pair] = self._numbers.get(pair, 0) + 1
        self._sessions[pair] = _Session(
            number, pair, {a: True, b: True}, {a: self._boot_of(a), b: self._boot_of(b)}
        )
        ends[0].connected(b, number)
        ends[1].connected(a, number)


def _pair(a: str, b: str) -> Pair:
    return (a, b) if a < b else (b, a)
