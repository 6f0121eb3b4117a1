"""The link of a node: at most one connection per peer, kept up, for Raft frames and calls alike.

Of two nodes, the one whose id sorts first dials. A connection counts as up once both sides have
shown a certificate of the cluster that names the node, and have greeted each other.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agentmem_cluster.errors import Unavailable
from agentmem_cluster.failpoints import failpoint
from agentmem_cluster.link import wire
from agentmem_cluster.link.calls import Calls, Handler
from agentmem_cluster.link.connection import Connection, LinkLimits
from agentmem_cluster.link.identity import Identity
from agentmem_cluster.link.tls import LinkTls
from agentmem_cluster.realtime import RealRng
from agentmem_cluster.runtime import Clock, Rng

__all__ = ["Link", "LinkLimits", "LinkTls", "PeerStats"]

log = logging.getLogger("agentmem.link")


@dataclass(slots=True)
class PeerStats:
    """The link to one peer; bytes since this node started, before encryption."""

    name: str
    connected: bool = False
    sent_bytes: int = 0
    received_bytes: int = 0
    queued_bytes: int = 0


class Link:
    """Use on one event loop only."""

    def __init__(
        self,
        node_id: str,
        listen: tuple[str, int],
        peers: Mapping[str, str],
        tls: LinkTls,
        clock: Clock,
        *,
        cluster_id: str,
        limits: LinkLimits | None = None,
        rng: Rng | None = None,
        level: int = 1,
    ) -> None:
        """`peers`: node id to HOST:PORT; this node's own entry is ignored. `level`: what this
        node's version understands, as peers are told.

        Raises ValueError when the certificate names another node.
        """
        if tls.identity.node_id != node_id:
            raise ValueError(f"the certificate names {tls.identity.node_id}, not {node_id}")
        self.node_id = node_id
        self.cluster_id = cluster_id
        self.limits = limits or LinkLimits()
        self.level = level
        self.level_min = 1
        self.on_raft: Callable[[str, list[Any]], None] = _ignore
        self.on_up: Callable[[str, int], None] = _ignore
        self.on_down: Callable[[str], None] = _ignore
        self._listen = listen
        self._tls = tls
        self._clock = clock
        self._rng = rng or RealRng()
        self._peers: dict[str, str] = {}
        self._handlers: dict[str, Handler] = {}
        self._up: dict[str, tuple[Connection, Calls]] = {}
        self._strangers: set[Connection] = set()
        self._sessions: dict[str, int] = {}
        self._dialing: dict[str, asyncio.Task[None]] = {}
        self._server: asyncio.Server | None = None
        self._started = False
        self._refusals: dict[str, str] = {}  # what was logged last of a peer that is not up
        self._failed_greetings: dict[str, str] = {}
        self._traffic: dict[str, tuple[int, int]] = {}  # of connections that ended
        self._set_peers(peers)

    # -- life ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen and dial. Raises OSError when the address cannot be bound."""
        host, port = self._listen
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self, None),
            host,
            port,
            ssl=self._tls.server,
            ssl_handshake_timeout=self.limits.greeting_s_max,
            ssl_shutdown_timeout=1.0,
        )
        self._started = True
        self._dial_missing()

    @property
    def port(self) -> int:
        """The port that is listened on (when 0 was asked for, the one that was given)."""
        if self._server is None:
            raise RuntimeError("the link was not started")
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._started = False
        tasks = list(self._dialing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._dialing.clear()
        if self._server is not None:
            self._server.close()
        open_now = [connection for connection, _ in self._up.values()] + list(self._strangers)
        for connection in open_now:
            connection.abort("this node is stopping")
        if open_now:
            await asyncio.wait([connection.closed for connection in open_now], timeout=1.0)

    def set_peers(self, peers: Mapping[str, str]) -> None:
        """Replace the peers. Connections to those that are no longer among them go."""
        self._set_peers(peers)
        for peer, (connection, _) in list(self._up.items()):
            if peer not in self._peers:
                connection.abort("it is not of the cluster any more")
        for peer in [p for p in self._dialing if p not in self._peers]:
            self._dialing.pop(peer).cancel()
        if self._started:
            self._dial_missing()

    def require_level(self, level: int) -> None:
        """From now on, peers of lower levels are refused: they would misread what is said."""
        self.level_min = max(self.level_min, level)
        for connection, _ in list(self._up.values()):
            if connection.level < self.level_min:
                connection.abort("it runs an older version, which this cluster has left behind")

    def _set_peers(self, peers: Mapping[str, str]) -> None:
        self._peers = {p: address for p, address in peers.items() if p != self.node_id}

    # -- sending ------------------------------------------------------------------------

    def is_up(self, peer: str) -> bool:
        return peer in self._up

    def peers_up(self) -> list[str]:
        return sorted(self._up)

    def send_raft(self, peer: str, frames: list[Any]) -> bool:
        """False: the peer is not connected, or too much waits for it already."""
        up = self._up.get(peer)
        if up is None or up[0].buffered_bytes > self.limits.buffer_bytes_max:
            return False
        try:
            up[0].send([wire.RAFT, frames])
        except ValueError as wrong:
            log.error("link: Raft frames to %s were dropped: %s", peer, wrong)
            return False
        return True

    def register(self, method: str, handler: Handler) -> None:
        """Serve a call. The handler raises errors of `agentmem_cluster.errors` only."""
        self._handlers[method] = handler

    async def call(self, peer: str, method: str, body: dict[str, Any], *, timeout: float) -> Any:
        """Ask a peer. Raises the error that it raised, Unavailable or DeadlineExceeded."""
        up = self._up.get(peer)
        if up is None:
            raise Unavailable(f"Node {peer} is not connected to node {self.node_id}.", peer=peer)
        return await up[1].call(method, body, timeout)

    def stats(self) -> list[PeerStats]:
        """One a peer, by name."""
        found = []
        for name in sorted(self._peers):
            sent, received = self._traffic.get(name, (0, 0))
            stats = PeerStats(name, name in self._up, sent, received)
            if stats.connected:
                connection = self._up[name][0]
                stats.sent_bytes += connection.sent_bytes
                stats.received_bytes += connection.received_bytes
                stats.queued_bytes = connection.buffered_bytes
            found.append(stats)
        return found

    # -- dialling -----------------------------------------------------------------------

    def _dial_missing(self) -> None:
        for peer in self._peers:
            if self.node_id < peer and peer not in self._dialing:
                self._dialing[peer] = asyncio.get_running_loop().create_task(self._keep_up(peer))

    async def _keep_up(self, peer: str) -> None:
        """Dial until connected, and again when the connection is lost."""
        limits = self.limits
        wait_s = limits.reconnect_s_min
        while True:
            reason = await self._dial(peer)
            if not reason:  # it was up: begin again quickly
                wait_s = limits.reconnect_s_min
            elif self._refusals.get(peer) != reason:
                log.warning("link: node %s cannot be reached: %s", peer, reason)
                self._refusals[peer] = reason
            # Jitter: nodes that lost each other at once must not dial in step for ever.
            await asyncio.sleep(wait_s * (0.5 + self._rng.random()))
            wait_s = min(wait_s * 2, limits.reconnect_s_max)

    async def _dial(self, peer: str) -> str:
        """Connect, and wait for the end of it. Why it never came up; empty when it did."""
        address = self._peers.get(peer, "")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            return f"its address {address!r} is not HOST:PORT"
        loop = asyncio.get_running_loop()
        try:
            # The name is resolved anew at each dial, off the loop: pods move.
            async with asyncio.timeout(2 * self.limits.greeting_s_max):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, peer),
                    host.strip("[]"),
                    int(port),
                    ssl=self._tls.client,
                    server_hostname="",
                    ssl_handshake_timeout=self.limits.greeting_s_max,
                    ssl_shutdown_timeout=1.0,
                )
        except (OSError, ssl.SSLError, TimeoutError, UnicodeError, OverflowError) as failed:
            return f"{address}: {failed or type(failed).__name__}"
        try:
            await asyncio.shield(connection.closed)
        finally:
            connection.abort("this node no longer dials it")
        return "" if connection.peer is not None else self._failed_greetings.get(peer, "it refused")

    # -- what connections ask -----------------------------------------------------------

    @property
    def identity(self) -> Identity:
        return self._tls.identity

    def admits(self, connection: Connection, peer: str) -> str | None:
        if not self._started:
            return "this node is stopping"
        if peer not in self._peers:
            return f"{peer!r} is not a node of this cluster"
        if connection.expected is None and not peer < self.node_id:
            return f"of {peer!r} and {self.node_id!r} it is the latter that dials"
        if len(self._strangers) >= self.limits.strangers_max:
            return "too many connections have not greeted yet"
        self._strangers.add(connection)
        return None

    def next_session(self, peer: str) -> int:
        self._sessions[peer] = self._sessions.get(peer, 0) + 1
        return self._sessions[peer]

    def connection_up(self, connection: Connection) -> None:
        peer = connection.peer
        assert peer is not None
        self._strangers.discard(connection)
        old = self._up.pop(peer, None)
        if old is not None:  # half open: the peer has dialled again, so it knows
            old[1].lost("the peer has connected anew")
            old[0].abort("the peer has connected anew")
            self.on_down(peer)
        self._sessions[peer] = max(connection.session, self._sessions.get(peer, 0))
        self._up[peer] = (connection, Calls(connection, self._handlers, self.limits))
        self._refusals.pop(peer, None)
        failpoint("link.after_accept")
        log.info("link: node %s is connected (session %d)", peer, connection.session)
        self.on_up(peer, connection.session)

    def connection_frames(self, connection: Connection, frames: list[tuple[Any, int]]) -> None:
        peer = connection.peer
        assert peer is not None
        up = self._up.get(peer)
        if up is None or up[0] is not connection:
            return
        raft: list[Any] = []
        for frame, size_bytes in frames:
            if not isinstance(frame, list) or not frame:
                connection.abort("it sent a frame without a kind")
                break
            kind = frame[0]
            if kind == wire.RAFT and len(frame) == 2 and isinstance(frame[1], list):
                raft += frame[1]
            elif kind == wire.PING:
                connection.send([wire.PONG])
            elif kind == wire.PONG:
                pass
            elif kind not in (wire.CALL, wire.REPLY, wire.ERROR, wire.CANCEL) or not up[1].received(
                frame, size_bytes
            ):
                connection.abort("it sent a malformed frame")
                break
        if raft:
            self.on_raft(peer, raft)

    def connection_lost(self, connection: Connection, reason: str) -> None:
        self._strangers.discard(connection)
        peer = connection.peer
        if peer is None:
            if connection.expected is not None:
                self._failed_greetings[connection.expected] = reason
            else:
                log.info("link: a connection was not accepted: %s", reason)
            return
        sent, received = self._traffic.get(peer, (0, 0))
        self._traffic[peer] = (sent + connection.sent_bytes, received + connection.received_bytes)
        up = self._up.get(peer)
        if up is not None and up[0] is connection:
            del self._up[peer]
            up[1].lost(reason)
            log.info("link: node %s is disconnected: %s", peer, reason)
            self.on_down(peer)


def _ignore(*_: Any) -> None:
    """Until the host says what to do."""
