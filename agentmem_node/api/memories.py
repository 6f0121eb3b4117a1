"""Handlers of /memories: check a request's bounds, ask the service, put the answer together."""

from __future__ import annotations

import asyncio

from agentmem_cluster.errors import AgentMemError, InvalidField, TooLarge
from agentmem_node.api import splice
from agentmem_node.api.context import Api
from agentmem_node.api.exchange import Exchange, expected_version, is_unchanged
from agentmem_node.api.reply import Reply, json_reply, token_line
from agentmem_node.api.shapes import DeleteQuery, GetQuery
from agentmem_node.model import requests as rq
from agentmem_node.service.contract import Caller
from agentmem_node.service.tokens import encode_token

# Of one batch: enough to keep every shard busy, few enough to leave room for other requests.
_SEARCHES_AT_ONCE = 8


async def add(api: Api, exchange: Exchange, body: rq.AddRequest) -> Reply:
    answer = await api.service.add(exchange.caller, [body])
    return _added(api, exchange, answer, status=201)


async def add_batch(
    api: Api, exchange: Exchange, items: list[rq.AddRequest | AgentMemError]
) -> Reply:
    _check_batch("memories", len(items), api.limits.batch_items_max, "batch_items_max")
    answer = await api.service.add(exchange.caller, items)
    return _added(api, exchange, answer, status=200)


def _added(api: Api, exchange: Exchange, answer: rq.AddAnswer, status: int) -> Reply:
    stored = sum(item.event == "ADD" for item in answer.results)
    if stored:
        api.metrics.added(exchange.caller.tenant, stored)
    return json_reply(answer, status, token_line(answer.token))


async def get(api: Api, exchange: Exchange, query: GetQuery) -> Reply:
    token = query.token if query.token is not None else exchange.token
    answer = await api.service.get(exchange.caller, exchange.memory_id, query.consistency, token)
    if is_unchanged(exchange.request, answer.version):
        return Reply(304, b"", headers_raw=_memory_lines(answer))
    return json_reply(answer, headers_raw=_memory_lines(answer))


async def update(api: Api, exchange: Exchange, body: rq.UpdateRequest) -> Reply:
    body.expected_version = expected_version(exchange.request, body.expected_version)
    answer = await api.service.update(exchange.caller, exchange.memory_id, body)
    return json_reply(answer, headers_raw=_memory_lines(answer))


def _memory_lines(answer: rq.MemoryAnswer) -> bytes:
    return b'ETag: "%d"\r\n%b' % (answer.version, token_line(answer.token))


async def delete(api: Api, exchange: Exchange, query: DeleteQuery) -> Reply:
    version = expected_version(exchange.request, query.expected_version)
    answer = await api.service.delete(exchange.caller, exchange.memory_id, version)
    return json_reply(answer, headers_raw=token_line(answer.token))


async def delete_batch(api: Api, exchange: Exchange, body: rq.BatchDeleteRequest) -> Reply:
    _check_batch("ids", len(body.ids), api.limits.batch_items_max, "batch_items_max")
    answer = await api.service.delete_many(exchange.caller, body.ids)
    return json_reply(answer, headers_raw=token_line(answer.token))


async def list_page(api: Api, exchange: Exchange, query: rq.ListQuery) -> Reply:
    if query.limit > api.limits.page_items_max:
        raise InvalidField(
            f"`limit` is {query.limit}; the largest page is {api.limits.page_items_max} "
            "(limits.page_items_max).",
            hint="Follow `next_cursor` for more.",
            field="limit",
        )
    if query.token is None and exchange.token is not None:
        query.token = exchange.token
    answer = await api.service.list(exchange.caller, query)
    return Reply(200, splice.list_body(answer), headers_raw=token_line(answer.token))


async def history(api: Api, exchange: Exchange, query: object) -> Reply:
    answer = await api.service.history(exchange.caller, exchange.memory_id)
    return json_reply(answer, headers_raw=token_line(answer.token))


async def search(api: Api, exchange: Exchange, body: rq.SearchRequest) -> Reply:
    content, token = await _search(api, exchange, body)
    return Reply(200, content, headers_raw=token_line(token))


async def search_batch(api: Api, exchange: Exchange, body: rq.SearchBatchRequest) -> Reply:
    """All searches answer, or the first that cannot fails the request and is named."""
    searches = body.searches
    _check_batch("searches", len(searches), api.limits.search_batch_max, "search_batch_max")
    free = asyncio.Semaphore(_SEARCHES_AT_ONCE)

    async def one(position: int) -> bytes:
        async with free:
            try:
                return (await _search(api, exchange, searches[position]))[0]
            except AgentMemError as error:
                error.message = f"searches[{position}]: {error.message}"
                raise

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(position)) for position in range(len(searches))]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return Reply(200, splice.search_batch_body(task.result() for task in tasks))


async def _search(api: Api, exchange: Exchange, request: rq.SearchRequest) -> tuple[bytes, str]:
    """(body, token) of one search."""
    limits = api.limits
    if request.top_k > limits.top_k_max:
        raise InvalidField(
            f"`top_k` is {request.top_k}; at most {limits.top_k_max} (limits.top_k_max).",
            hint="Follow `next_cursor` for more.",
            field="top_k",
        )
    if request.query is not None and len(request.query) * 4 > limits.query_bytes_max:
        size = len(request.query.encode())
        if size > limits.query_bytes_max:
            raise TooLarge(
                f"`query` has {size:,} bytes; the limit is {limits.query_bytes_max:,} "
                "(limits.query_bytes_max).",
                hint="Search by a shorter text.",
                field="query",
            )
    if request.token is None and exchange.token is not None:
        request.token = exchange.token
    caller: Caller = exchange.caller
    started = api.clock()
    answer = await api.service.search(caller, request)
    api.metrics.searched(caller.tenant, api.clock() - started)
    token = encode_token(answer.tokens)
    content = splice.search_body(
        answer,
        token=token,
        next_cursor=api.service.encode_cursor(request, answer),
        explain=request.explain,
    )
    return content, token


def _check_batch(name: str, size: int, size_max: int, limit: str) -> None:
    if size == 0:
        raise InvalidField(f"`{name}` is empty.", hint="Give at least one.", field=name)
    if size > size_max:
        raise TooLarge(
            f"`{name}` has {size:,} items; the limit is {size_max:,} (limits.{limit}).",
            hint="Send several batches.",
            field=name,
        )
