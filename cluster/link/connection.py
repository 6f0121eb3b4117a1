"""One connection to a peer: TLS, the greeting, frames in and out, and noticing that it is dead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.frames import BadFrame, FrameDecoder, encode_frame
from agentmem_cluster.link import wire
from agentmem_cluster.link.identity import Identity, identity_of

log = logging.getLogger("agentmem.link")

_HELLO_BYTES_MAX = 4_096
# Frames of one turn of the loop are written together; this much is not held back for more.
_WRITE_AT_ONCE_BYTES = 256 * 1024
_SESSION_MAX = 1 << 62


@dataclass(frozen=True, slots=True)
class LinkLimits:
    frame_bytes_max: int = 64 << 20
    # What may wait to be sent to one peer. Above: Raft frames are dropped (Raft sends again)
    # and calls refused; far above, the peer does not read and the connection goes.
    buffer_bytes_max: int = 64 << 20
    # Calls of one peer that this node works on at a time, and what their bodies may weigh.
    calls_max: int = 1_024
    calls_bytes_max: int = 128 << 20
    # Connections that have not said who they are yet.
    strangers_max: int = 64
    greeting_s_max: float = 3.0
    # A peer that is silent for so long is gone, whatever TCP believes: a half-open connection
    # (power loss, a cut cable) would otherwise swallow frames for minutes.
    silence_s_max: float = 1.5
    ping_s: float = 0.4
    reconnect_s_min: float = 0.05
    # A node that comes back is dialled within this; being refused costs next to nothing.
    reconnect_s_max: float = 0.3


class Owner(Protocol):
    """What a connection asks of its link."""

    cluster_id: str
    node_id: str
    limits: LinkLimits
    level: int
    level_min: int

    @property
    def identity(self) -> Identity: ...

    def admits(self, connection: Connection, peer: str) -> str | None:
        """Why this peer is refused; None when it is welcome."""
        ...

    def next_session(self, peer: str) -> int: ...

    def connection_up(self, connection: Connection) -> None: ...

    def connection_frames(self, connection: Connection, frames: list[tuple[Any, int]]) -> None: ...

    def connection_lost(self, connection: Connection, reason: str) -> None: ...


class Connection(asyncio.Protocol):
    """`expected`: the peer that was dialled; None for one that dialled us."""

    def __init__(self, owner: Owner, expected: str | None) -> None:
        self._owner = owner
        self.expected = expected
        self.peer: str | None = None  # set once the greeting was exchanged
        self.session = 0
        self.level = 1  # what the peer's version understands
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = FrameDecoder(_HELLO_BYTES_MAX)
        self._certified: str | None = None
        self._offered_session = 0
        self._reason = ""
        self._out: list[bytes] = []
        self._out_bytes = 0
        self.sent_bytes = 0
        self.received_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._heard_at = 0.0
        self.closed: asyncio.Future[None] = self._loop.create_future()

    # -- what asyncio calls -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._heard_at = self._loop.time()
        self._schedule(self._owner.limits.greeting_s_max, self._greeting_overdue)
        tls = transport.get_extra_info("ssl_object")
        identity = identity_of(tls.getpeercert() if tls is not None else None)
        if identity is None:
            self.abort("its certificate names no node")
        elif identity.cluster != self._owner.identity.cluster:
            self.abort(f"its certificate is of cluster {identity.cluster!r}")
        elif self.expected not in (None, identity.node_id):
            self.abort(f"{self.expected!r} was dialled, {identity.node_id!r} answered")
        else:
            refusal = self._owner.admits(self, identity.node_id)
            if refusal is not None:
                self.abort(refusal)
                return
            self._certified = identity.node_id
            self._offered_session = self._owner.next_session(identity.node_id)
            self._send_now(
                [
                    wire.HELLO,
                    wire.PROTOCOL,
                    self._owner.cluster_id,
                    self._owner.node_id,
                    self._offered_session,
                    self._owner.level,
                ]
            )

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        self.received_bytes += len(data)
        if self._reason:
            return
        try:
            frames = self._decoder.feed_sized(data)
            if frames and self.peer is None:
                self._greeted(frames.pop(0)[0])
            if frames and not self._reason:
                self._owner.connection_frames(self, frames)
        except BadFrame as wrong:
            self.abort(str(wrong))
        except Exception:
            # A bug of ours that some bytes found: this connection pays for it, not the node.
            log.exception("link: frames of %s could not be handled", self.peer)
            self.abort("its frames could not be handled")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._out.clear()
        if not self.closed.done():
            self.closed.set_result(None)
        reason = self._reason or (str(exc) if exc else "closed by the peer")
        self._owner.connection_lost(self, reason)

    # -- sending ------------------------------------------------------------------------

    @property
    def buffered_bytes(self) -> int:
        transport = self._transport
        waiting = transport.get_write_buffer_size() if transport is not None else 0
        return self._out_bytes + waiting

    def send(self, value: Any) -> None:
        """Queue a frame. Raises ValueError when it is too large or cannot be encoded."""
        frame = encode_frame(value, self._owner.limits.frame_bytes_max)
        if self._reason:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)
        self._out_bytes += len(frame)
        if self._out_bytes > _WRITE_AT_ONCE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._out or self._transport is None:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out = []
        self._out_bytes = 0
        self.sent_bytes += len(data)
        if not self._transport.is_closing():
            failpoint("link.before_send")
            self._transport.write(data)

    def _send_now(self, value: Any) -> None:
        self.send(value)
        self._flush()

    def abort(self, reason: str) -> None:
        """Close without waiting for anything."""
        if self._reason:
            return
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    # -- greeting and silence -----------------------------------------------------------

    def _greeted(self, hello: Any) -> None:
        if not isinstance(hello, list) or len(hello) < 5 or hello[0] != wire.HELLO:
            self.abort("it did not greet")
            return
        _, protocol, cluster_id, node_id, session = hello[:5]
        level = hello[5] if len(hello) > 5 else 1
        if protocol != wire.PROTOCOL:
            self.abort(f"it speaks protocol {protocol!r}, this node {wire.PROTOCOL}")
        elif cluster_id != self._owner.cluster_id:
            self.abort(f"it is of cluster {cluster_id!r}, this node of {self._owner.cluster_id!r}")
        elif node_id != self._certified:
            self.abort(f"it says it is {node_id!r}, its certificate {self._certified!r}")
        elif type(session) is not int or not 0 < session < _SESSION_MAX:
            self.abort("its session is no number")
        elif type(level) is not int or level < self._owner.level_min:
            self.abort(
                f"it runs an older version (level {level!r}), and this cluster's shards have been "
                f"moved since by one of level {self._owner.level_min}: upgrade it"
            )
        else:
            self.level = level
            self.peer = self._certified
            # Both sides take the higher offer, so that both know the session by one number.
            self.session = max(session, self._offered_session)
            self._decoder.frame_bytes_max = self._owner.limits.frame_bytes_max
            self._schedule(self._owner.limits.ping_s, self._check_silence)
            self._owner.connection_up(self)

    def _greeting_overdue(self) -> None:
        self.abort("it did not greet in time")

    def _schedule(self, delay_s: float, action: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = self._loop.time() + delay_s
        self._timer = self._loop.call_later(delay_s, action)

    def _check_silence(self) -> None:
        limits = self._owner.limits
        now = self._loop.time()
        if now - self._timer_due > limits.ping_s:
            # This process stood still: what the peer sent meanwhile is still to be read.
            self._heard_at = max(self._heard_at, now - limits.ping_s)
        if now - self._heard_at > limits.silence_s_max:
            self.abort(f"it was silent for {limits.silence_s_max} s")
            return
        if now - self._heard_at >= limits.ping_s / 2:
            self._send_now([wire.PING])
        if self.buffered_bytes > 2 * limits.buffer_bytes_max:
            self.abort("it does not read what is sent to it")
            return
        self._schedule(limits.ping_s, self._check_silence)
