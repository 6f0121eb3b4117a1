"""Answers of searches and lists, put together from stored JSON without decoding it."""

from __future__ import annotations

from collections.abc import Iterable

from agentmem_node.api.reply import encode
from agentmem_node.model.requests import ListAnswer
from agentmem_node.model.search import Hit, SearchAnswer


def found_memory(hit: Hit, *, explain: bool) -> bytes:
    """The stored object with `score`, and `legs` when explained, as further members."""
    record = hit.record
    if not explain:
        return b'%b,"score":%b}' % (record[:-1], encode(hit.score))
    return b'%b,"score":%b,"legs":%b}' % (record[:-1], encode(hit.score), encode(hit.legs))


def search_body(
    answer: SearchAnswer, *, token: str, next_cursor: str | None, explain: bool
) -> bytes:
    details = b""
    if explain and answer.details:
        details = b',"details":' + encode(answer.details)
    return b'{"results":[%b],"partial":%b,"token":%b,"next_cursor":%b,"took_ms":%b%b}' % (
        b",".join([found_memory(hit, explain=explain) for hit in answer.hits]),
        encode(answer.partial) if answer.partial else b"[]",
        encode(token),
        encode(next_cursor),
        encode(round(answer.took_ms, 3)),
        details,
    )


def search_batch_body(bodies: Iterable[bytes]) -> bytes:
    return b'{"results":[%b]}' % b",".join(bodies)


def list_body(answer: ListAnswer) -> bytes:
    return b'{"results":[%b],"next_cursor":%b,"partial":%b,"token":%b}' % (
        b",".join([bytes(record) for record in answer.results]),
        encode(answer.next_cursor),
        encode(answer.partial),
        encode(answer.token),
    )
