"""The wires between the demo's nodes, so that one can be cut: TCP relays in a thread.

Of two nodes the one whose id sorts first dials. Nodes that start together are told different
addresses of the same node, one relay for each pair. A node that joins later has one address for
everybody, so its relay asks the system which process a connection came from.

A cut is a black hole: connections stay open, nothing passes, new ones are accepted and go nowhere.
When it is healed, connections that were stuck are reset, and the nodes dial anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

HOST = "127.0.0.1"
_CHUNK_BYTES = 1 << 16
_CALL_S_MAX = 5.0

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Connection:
    """One that was accepted. `dialler` None: nobody can say whose it is."""

    dialler: str | None
    target: str
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    is_stuck: bool = False

    def touches(self, nodes: set[str]) -> bool:
        return self.target in nodes or self.dialler in nodes

    def reset(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Wires:
    """`pids`: the process ids of the running nodes, by node. Its methods are for one thread.

    Every method raises TimeoutError when the relays do not answer, and OSError when no port can
    be listened on.
    """

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids
        self._addresses: dict[tuple[str | None, str], str] = {}
        self._servers: list[asyncio.Server] = []
        self._open: set[_Connection] = set()
        self._cut: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()

    @property
    def cut_nodes(self) -> frozenset[str]:
        """Nodes that no other one reaches."""
        return frozenset(self._cut)

    def address(self, dialler: str | None, target: str, listens_at: str) -> str:
        """HOST:PORT at which `dialler` is to reach `target`. None: whoever dials."""
        key = (dialler, target)
        if key not in self._addresses:
            self._addresses[key] = self._call(self._listen(dialler, target, listens_at))
        return self._addresses[key]

    def cut(self, node: str) -> None:
        """From now on nothing passes from or to `node`."""
        self._call(self._do_cut(node))

    def heal(self, node: str) -> None:
        self._call(self._do_heal(node))

    def strangers(self) -> int:
        """Open connections of which nobody can say who dialled: a cut would not be whole."""
        return sum(connection.dialler is None for connection in list(self._open))

    def close(self) -> None:
        """Close all relays and end the thread. A second time does nothing."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self._call(self._do_close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S_MAX)
        if not self._thread.is_alive():
            self._loop.close()

    def _call(self, what: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(_CALL_S_MAX)

    # -- in the thread ----------------------------------------------------------------------

    async def _listen(self, dialler: str | None, target: str, listens_at: str) -> str:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            whose = dialler
            if whose is None:
                port = writer.get_extra_info("peername")[1]
                whose = await asyncio.to_thread(who_dials, port, dict(self._pids()))
            await self._relay(_Connection(whose, target), reader, writer, listens_at)

        server = await asyncio.start_server(accepted, HOST, 0)
        self._servers.append(server)
        return f"{HOST}:{server.sockets[0].getsockname()[1]}"

    async def _relay(
        self,
        connection: _Connection,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        listens_at: str,
    ) -> None:
        connection.writers.append(writer)
        self._open.add(connection)
        pumps: list[asyncio.Task[None]] = []
        try:
            if connection.touches(self._cut):
                connection.is_stuck = True
                await writer.wait_closed()
                return
            host, _, port = listens_at.rpartition(":")
            onward_reader, onward = await asyncio.open_connection(host, int(port))
            connection.writers.append(onward)
            pumps = [
                asyncio.create_task(self._pump(connection, reader, onward)),
                asyncio.create_task(self._pump(connection, onward_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if connection.is_stuck:  # one end gave up; the other must not learn of it
                await asyncio.wait(pumps)
        except OSError:
            pass  # the node behind it does not listen: the dialler sees a closed connection
        finally:
            for pump in pumps:
                pump.cancel()
            connection.reset()
            self._open.discard(connection)

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if connection.is_stuck:
                    continue  # lost, as on a cut cable
                writer.write(data)
                await writer.drain()

    async def _do_cut(self, node: str) -> None:
        self._cut.add(node)
        for connection in self._open:
            connection.is_stuck = connection.is_stuck or connection.touches(self._cut)

    async def _do_heal(self, node: str) -> None:
        self._cut.discard(node)
        for connection in list(self._open):
            if connection.is_stuck and not connection.touches(self._cut):
                connection.reset()

    async def _do_close(self) -> None:
        for server in self._servers:
            server.close()
        for connection in list(self._open):
            connection.reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


def who_dials(port: int, pids: Mapping[str, int]) -> str | None:
    """The node whose process has the socket with this local port; None when it cannot be told."""
    for node, pid in pids.items():
        with contextlib.suppress(OSError, ValueError):
            if (inode := _inode(pid, port)) is not None and _has_socket(pid, inode):
                return node
    return None


def _inode(pid: int, port: int) -> str | None:
    """The inode of a TCP socket at a local port, as Linux lists them."""
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        columns = line.split()
        if int(columns[1].rpartition(":")[2], 16) == port and columns[9] != "0":
            return columns[9]
    return None


def _has_socket(pid: int, inode: str) -> bool:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()) == f"socket:[{inode}]":
                return True
    return False
