"""Calls between simulated nodes, over the same sessions as Raft's frames.

What `agentmem_cluster.link` is on a real machine: an answer, an error of the peer, or the news
that the session broke or that the time is up. A call that was sent may have had its effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agentmem_cluster.errors import AgentMemError, DeadlineExceeded, Unavailable

ASK = "ask"  # number, method, body
TOLD = "told"  # number, whether it worked, answer or [code, message]

Outcome = Any | AgentMemError
Reply = Callable[[Outcome], None]
Handler = Callable[[str, Any, Reply], None]


class Refused(Unavailable):
    """The peer answered with an error; `reason` is its code."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class SimLink:
    """Of one life of a node's process."""

    def __init__(
        self,
        name: str,
        send: Callable[[str, list[Any]], bool],
        later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        """`send(peer, frames)`: False without a session. `later(seconds, action)`: in this life."""
        self.name = name
        self.handlers: dict[str, Handler] = {}
        self.peers: set[str] = set()
        self._send = send
        self._later = later
        self._number = 0
        self._waiting: dict[int, tuple[str, Reply]] = {}

    def is_connected(self, node: str) -> bool:
        return node == self.name or node in self.peers

    def call(self, peer: str, method: str, body: Any, answered: Reply, timeout_s: float) -> None:
        """`answered` is called once, never before this returns."""
        self._number += 1
        number = self._number
        self._waiting[number] = (peer, answered)
        if peer == self.name:
            self._later(0.0, lambda: self._handle(peer, method, body, self._ender(number)))
        elif not self._send(peer, [[ASK, number, method, body]]):
            self._later(0.0, lambda: self._end(number, Unavailable(f"{peer} is not connected")))
        self._later(
            timeout_s, lambda: self._end(number, DeadlineExceeded(f"{method}: no answer in time"))
        )

    def receive(self, peer: str, frame: list[Any]) -> None:
        if frame[0] == TOLD:
            _, number, ok, value = frame
            self._end(number, value if ok else Refused(*value))
            return
        _, number, method, body = frame

        def reply(outcome: Outcome) -> None:
            ok = not isinstance(outcome, Exception)
            value = outcome if ok else [getattr(outcome, "code", "internal"), str(outcome)]
            self._send(peer, [[TOLD, number, ok, value]])

        self._handle(peer, method, body, reply)

    def connected(self, peer: str) -> None:
        self.peers.add(peer)

    def disconnected(self, peer: str) -> None:
        self.peers.discard(peer)
        for number, (whom, _) in list(self._waiting.items()):
            if whom == peer:
                self._end(number, Unavailable(f"the session with {peer} broke"))

    def _handle(self, peer: str, method: str, body: Any, reply: Reply) -> None:
        try:
            self.handlers[method](peer, body, reply)
        except (AgentMemError, OSError) as error:
            reply(error)

    def _ender(self, number: int) -> Reply:
        return lambda outcome: self._end(number, outcome)

    def _end(self, number: int, outcome: Outcome) -> None:
        _, answered = self._waiting.pop(number, ("", None))
        if answered is not None:
            answered(outcome)
