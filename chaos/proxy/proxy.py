"""One proxy: it listens, dials its upstream for each connection, and lets toxics befall them."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import struct
from typing import Any

from agentmem_chaos.proxy.changes import Changes
from agentmem_chaos.proxy.errors import ApiError, no_toxic, toxic_exists
from agentmem_chaos.proxy.stream import Cut, Stream
from agentmem_chaos.proxy.toxics import Direction, Toxic, changed_toxic, read_toxic

DIAL_S_MAX = 10.0
# Close with a RST instead of a FIN, and forget what was not sent.
_LINGER_NOTHING = struct.pack("ii", 1, 0)
_serials = itertools.count(1)


class Proxy:
    """Use on one event loop only."""

    def __init__(self, name: str, listen: str, upstream: str, chance: random.Random) -> None:
        self.name = name
        self.listen = listen
        self.upstream = upstream
        self.toxics: dict[str, Toxic] = {}
        self.changes = Changes()
        self._chance = chance
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], _Connection] = {}

    @property
    def enabled(self) -> bool:
        return self._server is not None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "listen": self.listen,
            "upstream": self.upstream,
            "enabled": self.enabled,
            "toxics": [toxic.as_json() for toxic in self.toxics.values()],
        }

    async def start(self) -> None:
        """Listen; port 0 becomes the one that was given. Raises ApiError when it is taken."""
        if self._server is not None:
            return
        host, _, port = self.listen.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._accept, host.strip("[]") or None, int(port)
            )
        except (OSError, ValueError, OverflowError) as error:
            raise ApiError(f"listen tcp {self.listen}: {error}", 500) from error
        bound_host, bound_port = self._server.sockets[0].getsockname()[:2]
        shown = f"[{bound_host}]" if ":" in bound_host else bound_host
        self.listen = f"{shown}:{bound_port}"

    async def stop(self) -> None:
        """Stop listening and drop every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections.values():
            connection.abort()
        if self._connections:
            await asyncio.wait(list(self._connections), timeout=5.0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(self, reader, writer, self._chance)
        self._connections[task] = connection
        try:
            await connection.run()
        finally:
            self._connections.pop(task, None)

    # -- toxics ---------------------------------------------------------------------------

    async def add_toxic(self, body: Any) -> Toxic:
        """Raises ApiError."""
        toxic = read_toxic(body, next(_serials))
        if toxic.name in self.toxics:
            raise toxic_exists()
        self.toxics[toxic.name] = toxic
        await self.changes.note()
        return toxic

    async def change_toxic(self, name: str, body: Any) -> Toxic:
        toxic = changed_toxic(self.toxic(name), body)
        self.toxics[name] = toxic
        await self.changes.note()
        return toxic

    async def remove_toxic(self, name: str) -> None:
        del self.toxics[self.toxic(name).name]
        await self.changes.note()

    async def clear_toxics(self) -> None:
        self.toxics.clear()
        await self.changes.note()

    def toxic(self, name: str) -> Toxic:
        """Raises ApiError."""
        try:
            return self.toxics[name]
        except KeyError:
            raise no_toxic() from None


class _Connection:
    """A client's connection, the one to the upstream, and a stream in each direction."""

    def __init__(
        self,
        proxy: Proxy,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        chance: random.Random,
    ) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._chance = chance
        self._writers = [writer]
        self._aborted = False
        # Whether each toxic befell this connection, drawn once; and since when.
        self._befell: dict[int, bool] = {}
        self._since_s: dict[int, float] = {}
        self._holes: set[int] = set()  # black holes that swallowed a part of a stream
        self._loop = asyncio.get_running_loop()

    def active(self, direction: Direction | None = None) -> list[Toxic]:
        found = []
        for toxic in self._proxy.toxics.values():
            if toxic.serial not in self._befell:
                self._befell[toxic.serial] = self._chance.random() < toxic.toxicity
                self._since_s[toxic.serial] = self._loop.time()
            if self._befell[toxic.serial] and direction in (None, toxic.stream):
                found.append(toxic)
        return found

    async def run(self) -> None:
        host, _, port = self._proxy.upstream.rpartition(":")
        try:
            async with asyncio.timeout(DIAL_S_MAX):
                reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except (OSError, ValueError, TimeoutError):
            self.abort()
            return
        self._writers.append(writer)
        if self._aborted:
            self.abort()
            return
        up = Stream(
            self._reader,
            writer,
            lambda: self.active("upstream"),
            self._proxy.changes,
            self._chance,
        )
        down = Stream(
            reader,
            self._writer,
            lambda: self.active("downstream"),
            self._proxy.changes,
            self._chance,
        )
        streams = [asyncio.create_task(stream.run()) for stream in (up, down)]
        cutter = asyncio.create_task(self._cut_in_time())
        try:
            await self._until_over(streams, cutter)
        finally:
            for task in (*streams, cutter):
                task.cancel()
            await asyncio.gather(*streams, cutter, return_exceptions=True)
            for one in self._writers:
                one.close()

    async def _until_over(
        self, streams: list[asyncio.Task[None]], cutter: asyncio.Task[None]
    ) -> None:
        left = {*streams, cutter}
        while left - {cutter}:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            if cutter in done:
                return
            for task in done:
                error = task.exception()
                if isinstance(error, Cut):
                    return  # closed in order: what passed before is delivered
                if error is not None:
                    self.abort()
                    return

    async def _cut_in_time(self) -> None:
        """Return when a toxic says that the connection ends now."""
        while True:
            now, seen = self._loop.time(), self._proxy.changes.count
            wait_s: float | None = None
            holes = set()
            for toxic in self.active():
                if toxic.type not in ("timeout", "reset_peer"):
                    continue
                if toxic.type == "timeout" and toxic["timeout"] == 0:
                    holes.add(toxic.serial)
                    continue
                left_s = self._since_s[toxic.serial] + toxic["timeout"] / 1e3 - now
                if left_s <= 0:
                    self.abort(reset=toxic.type == "reset_peer")
                    return
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
            if self._holes - holes:
                self.abort()  # bytes were lost: what comes now would be noise
                return
            self._holes = holes
            await self._proxy.changes.after(seen, wait_s)

    def abort(self, *, reset: bool = False) -> None:
        """Close at once; with `reset` both sides see a RST."""
        self._aborted = True
        for writer in self._writers:
            if reset:
                sock = writer.get_extra_info("socket")
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOTHING)
                except OSError:
                    pass  # closed already
            writer.transport.abort()
