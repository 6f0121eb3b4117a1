"""The blocking client: the asyncio one on a private event loop, in a thread of its own.

There is one copy of every rule (`core`) and one of the I/O (`aio`): a caller without an event
loop borrows both. Safe to use from many threads.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, TypeVar, Unpack

from agentmem_client import batches, calls
from agentmem_client.aio import DEFAULT_URL, AsyncClient
from agentmem_client.errors import AgentMemError, ClientClosed
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
from agentmem_client.topology import Topology

T = TypeVar("T")

_CLOSE_S_MAX = 5.0


class Client:
    """Talks to a cluster: `with Client("http://127.0.0.1:7700") as memory: ...`.

    The same calls, arguments and errors as `AsyncClient`, each blocking until its result.
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
        self._client = AsyncClient(
            urls, api_key=api_key, policy=policy, in_flight_max=in_flight_max, tls=tls
        )
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: Callable[[], object] | None = None
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread. Calls under way in other threads fail."""
        with self._lock:
            self._closed = True
            self._loop = None
            end = self._end
        if end is not None:
            end()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                raise ClientClosed("This client was closed.")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(
                    target=self._loop.run_forever, name="agentmem-client", daemon=True
                )
                thread.start()
                # Runs once: by `close`, when a forgotten client is collected, or at exit.
                self._end = weakref.finalize(self, _end_thread, self._client, self._loop, thread)
            return self._loop

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            loop = self._running_loop()
        except ClientClosed:
            work.close()
            raise
        future = asyncio.run_coroutine_threadsafe(work, loop)
        try:
            return future.result()
        except CancelledError:
            raise ClientClosed("The client was closed during the call.") from None
        except BaseException:
            # Ctrl-C in the caller's thread: nobody waits for the call any more.
            future.cancel()
            raise

    def run(self, call: calls.Call[T]) -> T:
        """Carry out one call of `agentmem_client.calls`, retries included."""
        return self._wait(self._client.run(call))

    # -- the calls: see AsyncClient -------------------------------------------------------

    def add(
        self,
        content: str | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        **options: Unpack[AddOptions],
    ) -> AddResult:
        """Store a text, or each of `messages` (`role`, `content`), under at least one scope id."""
        return self._wait(self._client.add(content, messages=messages, **options))

    def add_many(
        self,
        memories: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = batches.BATCH_ITEMS_MAX,
        progress: batches.Progress | None = None,
        **shared: Unpack[AddOptions],
    ) -> AddResult:
        """Store any number of memories in batches: see `AsyncClient.add_many`.

        `memories` is consumed and `progress` called in the caller's thread.
        """
        parts = batches.AddedParts(progress)
        for batch in batches.add_many(memories, shared, batch_size):
            try:
                parts.took(len(batch.items), self._wait(self._client.run_batch(batch)))
            except AgentMemError as error:
                raise parts.failed(error) from None
        return parts.result()

    def get(self, memory_id: str, **options: Unpack[ReadOptions]) -> Memory:
        """One memory. Raises NotFound."""
        return self._wait(self._client.get(memory_id, **options))

    def update(
        self, memory_id: str, content: str | None = None, **options: Unpack[UpdateOptions]
    ) -> Memory:
        """Change the given fields. Raises Conflict when `expected_version` is out of date."""
        return self._wait(self._client.update(memory_id, content, **options))

    def delete(
        self,
        memory_id: str,
        *,
        expected_version: int | None = None,
        **options: Unpack[WriteOptions],
    ) -> None:
        """Delete one memory. Raises NotFound, or Conflict when the version moved."""
        self._wait(self._client.delete(memory_id, expected_version=expected_version, **options))

    def delete_many(self, ids: Iterable[str], **options: Unpack[WriteOptions]) -> DeleteResult:
        """Delete memories; an id that is not there is named in its place of the results."""
        return self._wait(self._client.delete_many(ids, **options))

    def list_page(self, **options: Unpack[ListOptions]) -> Page:
        """One page of memories, newest first; `next_cursor` continues it."""
        return self._wait(self._client.list_page(**options))

    def list(self, **options: Unpack[ListOptions]) -> Iterator[Memory]:
        """Every memory of a scope, newest first, fetched page by page as it is consumed."""
        while True:
            page = self.list_page(**options)
            yield from page.results
            if page.next_cursor is None:
                return
            options["cursor"] = page.next_cursor

    def history(
        self, memory_id: str, *, deadline_s: float | None = None
    ) -> tuple[HistoryEntry, ...]:
        """Every version of a memory, oldest first, its deletion included."""
        return self._wait(self._client.history(memory_id, deadline_s=deadline_s))

    def search(self, query: str | None = None, **options: Unpack[SearchOptions]) -> SearchResult:
        """The best memories for a text and/or a `vector`, within a scope and `filters`."""
        return self._wait(self._client.search(query, **options))

    def search_many(
        self, searches: Iterable[Mapping[str, Any]], *, deadline_s: float | None = None
    ) -> tuple[SearchResult, ...]:
        """Many searches at once; each is the arguments of `search`, with `query`."""
        return self._wait(self._client.search_many(searches, deadline_s=deadline_s))

    def cluster(self, *, deadline_s: float | None = None) -> Topology:
        """The cluster as a node sees it now: nodes, shards, leaders; the whole view is `.raw`."""
        return self._wait(self._client.cluster(deadline_s=deadline_s))

    def health(self, url: str | None = None, *, deadline_s: float | None = None) -> Health:
        """Whether one node is ready: see `AsyncClient.health`."""
        return self._wait(self._client.health(url, deadline_s=deadline_s))


def _end_thread(
    client: AsyncClient, loop: asyncio.AbstractEventLoop, thread: threading.Thread
) -> None:
    if threading.current_thread() is thread:
        # The collector ran here, of all places: nobody may wait for this thread.
        loop.create_task(_cancel_all(client)).add_done_callback(lambda _: loop.stop())
        return
    asyncio.run_coroutine_threadsafe(_cancel_all(client), loop).result(timeout=_CLOSE_S_MAX)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(timeout=_CLOSE_S_MAX)
    loop.close()


async def _cancel_all(client: AsyncClient) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await client.close()
