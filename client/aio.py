"""The asyncio client: aiohttp does what `core.Exchange` says."""

from __future__ import annotations

import asyncio
import math
import os
import random
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, Unpack

import aiohttp

from agentmem_client import batches, calls
from agentmem_client.core import Exchange
from agentmem_client.errors import AgentMemError, ClientClosed, ProtocolError
from agentmem_client.instructions import Done, Fail, Failure, Instruction, Send
from agentmem_client.options import (
    AddOptions,
    ListOptions,
    ReadOptions,
    SearchOptions,
    UpdateOptions,
    WriteOptions,
)
from agentmem_client.policy import Policy
from agentmem_client.results import (
    AddResult,
    DeleteResult,
    Health,
    HistoryEntry,
    Memory,
    Page,
    SearchResult,
)
from agentmem_client.router import Router
from agentmem_client.topology import Topology

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:7700"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class _NoAnswer:
    why: Failure
    text: str


_Outcome = _Answer | _NoAnswer
_Event = tuple[int, _Outcome | Exception]  # the number of the attempt, and what came of it


def seed_urls(urls: str | Sequence[str]) -> list[str]:
    """Seed URLs from one, several separated by commas, or a sequence; `http://` may be left out."""
    given = urls.split(",") if isinstance(urls, str) else list(urls)
    cleaned = [url.strip().rstrip("/") for url in given if url.strip()]
    if not cleaned:
        raise ValueError("At least one URL of a node is needed.")
    return [url if "://" in url else f"http://{url}" for url in cleaned]


class AsyncClient:
    """Talks to a cluster: `async with AsyncClient("http://127.0.0.1:7700") as memory: ...`.

    `urls`: one or more nodes; the others are learnt from them. Safe to share by many tasks;
    at most `in_flight_max` requests are on the wire to one node at once, the rest wait their turn.
    Every method raises errors of `agentmem_client.errors` only.
    """

    def __init__(
        self,
        urls: str | Sequence[str] = DEFAULT_URL,
        *,
        api_key: str | None = None,
        policy: Policy | None = None,
        in_flight_max: int = 256,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._router = Router(seed_urls(urls), random.random, policy or Policy(), api_key=api_key)
        self._in_flight_max = in_flight_max
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._probes: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        self._closed = True
        probes = list(self._probes)
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            self._session = None

    # -- the driver ---------------------------------------------------------------------

    def _open_session(self) -> aiohttp.ClientSession:
        if self._closed:
            raise ClientClosed("This client was closed.")
        if self._session is None:
            # A bound for each node: one that stands still must not hold the places that the
            # others need to answer in its stead.
            connector = aiohttp.TCPConnector(
                limit=0,
                limit_per_host=self._in_flight_max,
                ssl=self._tls if self._tls is not None else True,
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=True,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
            )
        return self._session

    async def run(self, call: calls.Call[T]) -> T:
        """Carry out one call, retries and hedges included."""
        session = self._open_session()
        loop = asyncio.get_running_loop()
        exchange = Exchange(call, self._router, loop.time())
        step = exchange.start(loop.time())
        inbox = _Inbox(loop)
        on_the_wire: list[asyncio.Task[None]] = []
        try:
            while True:
                if isinstance(step, Done):
                    return step.value
                if isinstance(step, Fail):
                    raise step.error
                if isinstance(step, Send):
                    on_the_wire.append(loop.create_task(self._attempt(session, step, inbox)))
                    pause_s = step.patience_s
                else:
                    pause_s = step.seconds
                if self._router.has_ill:
                    self._probe_the_ill(session)
                step = _told(exchange, await inbox.next(pause_s), loop.time())
        finally:
            for task in on_the_wire:
                task.cancel()

    async def _attempt(self, session: aiohttp.ClientSession, request: Send, inbox: _Inbox) -> None:
        try:
            inbox.put((request.attempt, await self._send(session, request)))
        except Exception as error:  # a bug of ours, or of a library: the call raises it
            inbox.put((request.attempt, error))

    async def _send(self, session: aiohttp.ClientSession, request: Send) -> _Outcome:
        """What came of one request."""
        try:
            async with asyncio.timeout(request.timeout_s):
                async with session.request(
                    request.method,
                    request.url,
                    data=request.body,
                    headers=request.headers,
                    allow_redirects=False,
                ) as answer:
                    body = await _read(answer, self._router.policy.answer_bytes_max)
            return _Answer(answer.status, answer.headers, body)
        except TimeoutError:
            return _NoAnswer(Failure.TIMED_OUT, "no answer in time")
        except aiohttp.ClientConnectorError as error:
            return _NoAnswer(Failure.REFUSED, _reason(error))
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            if not request.url.startswith(tuple(self._router.seeds)):
                # The map names it: the other nodes need not suffer.
                return _NoAnswer(Failure.REFUSED, "its address is no URL")
            raise ProtocolError(f"{request.url!r} is not a URL of a node.") from None
        except (aiohttp.ClientError, OSError) as error:
            return _NoAnswer(Failure.BROKEN, _reason(error))

    def _probe_the_ill(self, session: aiohttp.ClientSession) -> None:
        """Ask nodes whose breaker is open whether they are well again, beside the calls."""
        for url in self._router.probes_due(asyncio.get_running_loop().time()):
            task = asyncio.get_running_loop().create_task(self._probe(session, url))
            self._probes.add(task)
            task.add_done_callback(self._probes.discard)

    async def _probe(self, session: aiohttp.ClientSession, url: str) -> None:
        status = None
        try:
            async with asyncio.timeout(self._router.policy.probe_s_max):
                async with session.get(f"{url}/health/ready", allow_redirects=False) as answer:
                    status = answer.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass
        self._router.probed(url, asyncio.get_running_loop().time(), status)

    async def run_batch(self, batch: batches.Batch[T]) -> T:
        """Carry out a batch: one call for each leader, side by side."""
        if self._router.topology is None and not batch.is_whole:
            await self.cluster()
        parts = batch.split(self._router.topology)
        # All are awaited even when one fails: a write that was cancelled has an unknown outcome.
        answers = await asyncio.gather(
            *(self.run(call) for _, call in parts), return_exceptions=True
        )
        done: list[tuple[tuple[int, ...], T]] = []
        failure: BaseException | None = None
        for (positions, _), answer in zip(parts, answers, strict=True):
            if isinstance(answer, BaseException):
                failure = failure or answer
            else:
                done.append((positions, answer))
        if failure is None:
            return batch.merge(done)
        if isinstance(failure, AgentMemError) and done:
            failure.stored = batch.merge(done)
        raise failure

    # -- the calls ----------------------------------------------------------------------

    async def add(
        self,
        content: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        **options: Unpack[AddOptions],
    ) -> AddResult:
        """Store a text, or each of `messages` (`role`, `content`), under at least one scope id."""
        return await self.run(calls.add(content, messages, options))

    async def add_many(
        self,
        memories: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = batches.BATCH_ITEMS_MAX,
        progress: batches.Progress | None = None,
        **shared: Unpack[AddOptions],
    ) -> AddResult:
        """Store any number of memories, each the fields of an `add`, in batches.

        A bad one is refused alone, in its place of the results. `progress(done, part)` is
        called after each batch. When a batch fails altogether the error is raised, and its
        `stored` holds what was stored before.
        """
        parts = batches.AddedParts(progress)
        for batch in batches.add_many(memories, shared, batch_size):
            try:
                parts.took(len(batch.items), await self.run_batch(batch))
            except AgentMemError as error:
                raise parts.failed(error) from None
        return parts.result()

    async def get(self, memory_id: str, **options: Unpack[ReadOptions]) -> Memory:
        """One memory. Raises NotFound."""
        return await self.run(calls.get(memory_id, options))

    async def update(
        self, memory_id: str, content: str | None = None, **options: Unpack[UpdateOptions]
    ) -> Memory:
        """Change the given fields. Raises Conflict when `expected_version` is out of date."""
        return await self.run(calls.update(memory_id, content, options))

    async def delete(
        self,
        memory_id: str,
        *,
        expected_version: int | None = None,
        **options: Unpack[WriteOptions],
    ) -> None:
        """Delete one memory. Raises NotFound, or Conflict when the version moved."""
        await self.run(calls.delete(memory_id, expected_version, options))

    async def delete_many(
        self, ids: Iterable[str], **options: Unpack[WriteOptions]
    ) -> DeleteResult:
        """Delete memories; an id that is not there is named in its place of the results."""
        return batches.joined_deleted(
            [await self.run_batch(batch) for batch in batches.delete_many(ids, options)]
        )

    async def list_page(self, **options: Unpack[ListOptions]) -> Page:
        """One page of memories, newest first; `next_cursor` continues it."""
        return await self.run(calls.list_page(options))

    async def list(self, **options: Unpack[ListOptions]) -> AsyncIterator[Memory]:
        """Every memory of a scope, newest first, fetched page by page as it is consumed."""
        while True:
            page = await self.list_page(**options)
            for memory in page.results:
                yield memory
            if page.next_cursor is None:
                return
            options["cursor"] = page.next_cursor

    async def history(
        self, memory_id: str, *, deadline_s: float | None = None
    ) -> tuple[HistoryEntry, ...]:
        """Every version of a memory, oldest first, its deletion included."""
        return await self.run(calls.history(memory_id, {"deadline_s": deadline_s}))

    async def search(
        self, query: str | None = None, **options: Unpack[SearchOptions]
    ) -> SearchResult:
        """The best memories for a text and/or a `vector`, within a scope and `filters`."""
        return await self.run(calls.search(query, options))

    async def search_many(
        self, searches: Iterable[Mapping[str, Any]], *, deadline_s: float | None = None
    ) -> tuple[SearchResult, ...]:
        """Many searches at once; each is the arguments of `search`, with `query`."""
        parts = [await self.run_batch(batch) for batch in batches.search_many(searches, deadline_s)]
        return tuple(answer for part in parts for answer in part.results)

    async def cluster(self, *, deadline_s: float | None = None) -> Topology:
        """The cluster as a node sees it now: nodes, shards, leaders; the whole view is `.raw`."""
        return await self.run(calls.cluster(deadline_s))

    async def health(self, url: str | None = None, *, deadline_s: float | None = None) -> Health:
        """Whether one node is ready. `url` None: the first that this client was given.

        Asked once, of that node only. Raises ConnectionFailed when it cannot be reached.
        """
        return await self.run(calls.health(url or self._router.seeds[0], deadline_s))


def _told(exchange: Exchange[T], event: _Event | None, now: float) -> Instruction[T]:
    """Tell the exchange what happened; None: nothing did in time."""
    if event is None:
        return exchange.woke(now)
    attempt, outcome = event
    if isinstance(outcome, _Answer):
        return exchange.answered(attempt, outcome.status, outcome.headers, outcome.body, now)
    if isinstance(outcome, _NoAnswer):
        return exchange.failed(attempt, outcome.why, outcome.text, now)
    raise outcome


class _Inbox:
    """What came of the requests of one call, in the order in which it came.

    Does for one waiting task what `asyncio.wait` does for any, in a third of its time.
    """

    __slots__ = ("_events", "_loop", "_waiter")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[_Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: _Event) -> None:
        self._events.append(event)
        self._wake()

    async def next(self, timeout_s: float) -> _Event | None:
        """The next event; None when there is none within `timeout_s`."""
        if not self._events:
            self._waiter = self._loop.create_future()
            timer = None
            if timeout_s != math.inf:
                timer = self._loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        return self._events.popleft() if self._events else None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def _read(answer: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    if answer.content_length is not None and 0 <= answer.content_length <= bytes_max:
        return await answer.read()
    body = bytearray()
    async for part in answer.content.iter_chunked(1 << 16):
        body += part
        if len(body) > bytes_max:
            raise ProtocolError(f"The answer has more than {bytes_max:,} bytes.")
    return bytes(body)


def _reason(error: BaseException) -> str:
    """`Connection refused` rather than what layers of libraries made of it."""
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER":
        return "it does not speak TLS (write http:// instead of https://)"
    if isinstance(cause, ssl.SSLError):  # an OSError, but with a number of its own counting
        return str(cause)
    number = getattr(cause, "errno", None)
    text = os.strerror(number) if isinstance(number, int) and number > 0 else str(cause)
    return text or type(cause).__name__
