"""Calls over many items: cut to what a server takes, split by leader, put back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from agentmem_client.calls import (
    ADD_FIELDS,
    API,
    SEARCH_FIELDS,
    Anywhere,
    Call,
    Route,
    ToMemory,
    check_names,
    drop_none,
    encode,
    key_or_new,
    owner_route,
    query_route,
)
from agentmem_client.errors import AgentMemError, ProtocolError
from agentmem_client.options import AddOptions, WriteOptions
from agentmem_client.results import AddResult, DeleteResult, SearchResult
from agentmem_client.topology import Topology

T = TypeVar("T")

# The server's default limits are 1,000 items, 50 searches and 32 MiB; a smaller body keeps one
# request from holding up the others on its connection.
BATCH_ITEMS_MAX = 1_000
BATCH_BYTES_MAX = 8 * 1024 * 1024
SEARCHES_MAX = 50

Progress = Callable[[int, AddResult], None]
"""Called after each part that was stored: how many items are done, and that part's results."""


@dataclass(frozen=True, slots=True)
class Item:
    """One item as JSON, and the node it belongs to."""

    body: bytes
    route: Route


@dataclass(frozen=True, slots=True)
class Batch(Generic[T]):
    """Items that belong to several leaders: one call for each."""

    name: str
    items: tuple[Item, ...]
    call: Callable[[bytes, Route], Call[T]]  # from the JSON list of the items
    merge: Callable[[Sequence[tuple[tuple[int, ...], T]]], T]
    is_whole: bool = False

    def split(self, topology: Topology | None) -> list[tuple[tuple[int, ...], Call[T]]]:
        """(positions of the items, call) for each leader; one call when the map is not known."""
        groups: dict[str | None, list[int]] = {}
        for at, item in enumerate(self.items):
            leader = None
            if topology is not None and not self.is_whole and not isinstance(item.route, Anywhere):
                shard = item.route.shard(topology)
                leader = shard.leader if shard else None
            groups.setdefault(leader, []).append(at)
        return [
            (
                tuple(at),
                self.call(
                    b"[" + b",".join(self.items[i].body for i in at) + b"]",
                    self.items[at[0]].route,
                ),
            )
            for at in groups.values()
        ]


def chunks(items: Iterable[Item], items_max: int = BATCH_ITEMS_MAX) -> Iterator[tuple[Item, ...]]:
    """Cut a stream into parts that one request may carry. An item is never cut."""
    part: list[Item] = []
    size = 0
    for item in items:
        if part and (len(part) >= items_max or size + len(item.body) > BATCH_BYTES_MAX):
            yield tuple(part)
            part, size = [], 0
        part.append(item)
        size += len(item.body)
    if part:
        yield tuple(part)


def add_many(
    memories: Iterable[Mapping[str, Any]], shared: AddOptions, batch_size: int = BATCH_ITEMS_MAX
) -> Iterator[Batch[AddResult]]:
    """Items are the fields of an add each; `shared` fills what an item leaves out."""
    check_names(shared, AddOptions.__annotations__, "add_many")
    if not 1 <= batch_size <= BATCH_ITEMS_MAX:
        raise ValueError(f"batch_size must be 1 to {BATCH_ITEMS_MAX}, not {batch_size}.")
    defaults = drop_none({name: value for name, value in shared.items() if name in ADD_FIELDS})
    given_key = shared.get("idempotency_key")
    has_messages = False

    def items() -> Iterator[Item]:
        nonlocal has_messages
        for memory in memories:
            fields = {**defaults, **memory}
            has_messages = has_messages or "messages" in fields
            yield Item(encode(fields), owner_route(fields))

    for number, part in enumerate(chunks(items(), batch_size)):
        # Each part under a key of its own, made from the caller's: a repeat sends the same ones.
        key = None if given_key is None else f"{given_key}-{number}"

        def call(body: bytes, route: Route, key: str | None = key) -> Call[AddResult]:
            return Call(
                name="add_many",
                method="POST",
                path=f"{API}/memories/batch",
                read=AddResult.read,
                route=route,
                body=b'{"memories":' + body + b"}",
                idempotency_key=key_or_new(key),
                deadline_s=shared.get("deadline_s"),
            )

        yield Batch(
            name="add_many",
            items=part,
            call=call,
            merge=merge_added,
            # Who leads decides how a batch is split. Under a key that the caller chose, it must
            # be the same bytes whenever it is repeated; and an item of several messages has
            # several results, which could not be put back in order.
            is_whole=given_key is not None or has_messages,
        )


def delete_many(ids: Iterable[str], options: WriteOptions) -> Iterator[Batch[DeleteResult]]:
    check_names(options, WriteOptions.__annotations__, "delete_many")
    given_key = options.get("idempotency_key")
    items = (Item(encode(memory_id), ToMemory(memory_id)) for memory_id in ids)
    for number, part in enumerate(chunks(items)):
        key = None if given_key is None else f"{given_key}-{number}"

        def call(body: bytes, route: Route, key: str | None = key) -> Call[DeleteResult]:
            return Call(
                name="delete_many",
                method="POST",
                path=f"{API}/memories/batch/delete",
                read=DeleteResult.read,
                route=route,
                body=b'{"ids":' + body + b"}",
                idempotency_key=key_or_new(key),
                deadline_s=options.get("deadline_s"),
            )

        yield Batch("delete_many", part, call, merge_deleted, is_whole=given_key is not None)


@dataclass(frozen=True, slots=True)
class SearchResults:
    """The answers to `search_many`, in the order of the searches."""

    results: tuple[SearchResult, ...]

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> SearchResults:
        return cls(tuple(SearchResult.read(answer) for answer in body["results"]))


def search_many(
    searches: Iterable[Mapping[str, Any]], deadline_s: float | None
) -> Iterator[Batch[SearchResults]]:
    def items() -> Iterator[Item]:
        for one in searches:
            check_names(one, SEARCH_FIELDS | {"query"}, "search_many")
            yield Item(encode(drop_none(one)), query_route(one))

    def call(body: bytes, route: Route) -> Call[SearchResults]:
        return Call(
            name="search_many",
            method="POST",
            path=f"{API}/memories/search/batch",
            read=SearchResults.read,
            route=route,
            body=b'{"searches":' + body + b"}",
            deadline_s=deadline_s,
        )

    for part in chunks(items(), SEARCHES_MAX):
        yield Batch("search_many", part, call, lambda parts: SearchResults(_in_order(parts)))


def _in_order(parts: Sequence[tuple[tuple[int, ...], Any]]) -> tuple[Any, ...]:
    if len(parts) == 1:
        return tuple(parts[0][1].results)
    placed: list[tuple[int, Any]] = []
    for positions, answer in parts:
        if len(positions) != len(answer.results):
            raise ProtocolError(
                f"The server answered {len(answer.results)} results for {len(positions)} items."
            )
        placed += zip(positions, answer.results, strict=True)
    return tuple(result for _, result in sorted(placed, key=lambda pair: pair[0]))


def merge_tokens(tokens: Iterable[str]) -> str:
    """One token that is at least as late as each. Tokens look like `s03:118,s07:42`."""
    latest: dict[str, int] = {}
    for part in ",".join(tokens).split(","):
        shard, found, applied = part.partition(":")
        if found and applied.isdigit():
            latest[shard] = max(int(applied), latest.get(shard, 0))
    return ",".join(f"{shard}:{applied}" for shard, applied in sorted(latest.items()))


def merge_added(parts: Sequence[tuple[tuple[int, ...], AddResult]]) -> AddResult:
    """One result of several parts, in the order of the items."""
    return AddResult(
        results=_in_order(parts), token=merge_tokens(answer.token for _, answer in parts)
    )


def merge_deleted(parts: Sequence[tuple[tuple[int, ...], DeleteResult]]) -> DeleteResult:
    return DeleteResult(
        results=_in_order(parts), token=merge_tokens(answer.token for _, answer in parts)
    )


class AddedParts:
    """Gathers the results of consecutive batches for the drivers."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._parts: list[AddResult] = []
        self._items_done = 0

    def took(self, items: int, part: AddResult) -> None:
        self._parts.append(part)
        self._items_done += items
        if self._progress is not None:
            self._progress(self._items_done, part)

    def failed(self, error: AgentMemError) -> AgentMemError:
        """The error, told what was stored before it."""
        here = [error.stored] if isinstance(error.stored, AddResult) else []
        error.stored = joined_added([*self._parts, *here])
        return error

    def result(self) -> AddResult:
        return joined_added(self._parts)


def joined_added(parts: Iterable[AddResult]) -> AddResult:
    """The results of consecutive parts, one after the other."""
    answers = list(parts)
    return AddResult(
        results=tuple(item for answer in answers for item in answer.results),
        token=merge_tokens(answer.token for answer in answers),
    )


def joined_deleted(parts: Iterable[DeleteResult]) -> DeleteResult:
    answers = list(parts)
    return DeleteResult(
        results=tuple(item for answer in answers for item in answer.results),
        token=merge_tokens(answer.token for answer in answers),
    )
