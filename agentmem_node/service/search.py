"""Searches: from a request to one order of results, whatever number of shards holds them.

A search that names a user concerns one shard, which ranks by itself. Any other is asked of one
replica of every shard in two rounds: first the statistics that ranking needs (how many memories,
how many of them with a word), then each shard's candidates, scored with the statistics of all.
So one shard and sixteen give the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from agentmem_cluster.errors import InvalidField, TooLarge
from agentmem_cluster.runtime import Clock
from agentmem_node.config_keys import SearchSection
from agentmem_node.index.defaults import RankingDefaults
from agentmem_node.index.fusion import Fused, LegResults, fuse
from agentmem_node.index.scoring import TextStats, merge_stats
from agentmem_node.index.shard_index import active_legs
from agentmem_node.model import requests as rq
from agentmem_node.model.cursors import decode_search_cursor, encode_search_cursor, fingerprint
from agentmem_node.model.filters import parse_filter
from agentmem_node.model.limits import Limits
from agentmem_node.model.memory import Scope
from agentmem_node.model.search import LegName, SearchAnswer, SearchQuery
from agentmem_node.model.times import TIME_MS_MAX
from agentmem_node.providers.base import EmbeddingProvider
from agentmem_node.service.contract import Caller
from agentmem_node.service.deadlines import within
from agentmem_node.service.drafts import check_scope, normalised
from agentmem_node.service.fanout import Gathered
from agentmem_node.service.read import (
    Reads,
    filter_from_wire,
    filters_to_wire,
    promoted,
    session_tokens,
)
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.storage.checkpoint import RecordDamaged

_NO_STATISTICS = TextStats(0, 0, ())
_WEIGHT_MIN = 0.001
# Records that a shard sends along with its candidates; beyond it they are fetched for the page
# alone. Every shard proposes a whole page, and all of them are held in memory together.
_RECORDS_BYTES_MAX = 4 << 20
_json = msgspec.json.Encoder(order="deterministic")


@dataclass(slots=True)
class _Search:
    """One search under way: the checked query, and what of it travels to other nodes."""

    query: SearchQuery
    filters: dict[str, Any] | None

    def to_wire(self) -> dict[str, Any]:
        query = self.query
        scope = query.scope
        return {
            "tenant": query.tenant,
            "scope": [scope.user_id, scope.agent_id, scope.app_id, scope.run_id],
            "top_k": query.top_k,
            "now_ms": query.now_ms,
            "text": query.text,
            "vector": query.vector,
            "filters": filters_to_wire(self.filters),
            "legs": query.legs,
            "fusion": query.fusion,
            "threshold": query.threshold,
            "explain": query.explain,
            "after": query.after,
            "language": query.language,
        }


class Searches:
    def __init__(
        self,
        routing: Routing,
        reads: Reads,
        *,
        clock: Clock,
        limits: Limits,
        dim: int,
        embedder: EmbeddingProvider | None,
        settings: SearchSection,
    ) -> None:
        self._routing = routing
        self._reads = reads
        self._clock = clock
        self._limits = limits
        self._dim = dim
        self._embedder = embedder
        self._settings = settings
        self._defaults = RankingDefaults()
        self._default_legs: tuple[tuple[LegName, float], ...] = tuple(settings.legs.items())

    async def search(self, caller: Caller, request: rq.SearchRequest) -> SearchAnswer:
        """Raises InvalidField, InvalidFilter, InvalidCursor, NoQuorum, DeadlineExceeded."""
        begun = self._clock.monotonic()
        search = await self._prepare(caller, request)
        query = search.query
        tokens = session_tokens(request.consistency, request.token)
        shards = self._reads.shards_of(caller.tenant, query.scope)
        found = None
        if len(shards) == 1:
            found = await self._here(caller, request, query, shards[0], tokens)
        if found is None:
            found = await self._over_shards(caller, request, search, shards, tokens)
        answer, fused = found
        answer.next_after = fused.next_after
        if fused.next_after is not None:
            asked = query if request.vector is not None else replace(query, vector=None)
            cursor = encode_search_cursor(fused.next_after, _fingerprint(asked, request.filters))
            answer.details["next_cursor"] = f"{cursor}.{query.now_ms:x}"
        answer.took_ms = (self._clock.monotonic() - begun) * 1000
        return answer

    async def _here(
        self,
        caller: Caller,
        request: rq.SearchRequest,
        query: SearchQuery,
        shard: str,
        tokens: dict[str, int],
    ) -> tuple[SearchAnswer, Fused] | None:
        """The usual case, and the fastest: one shard, and this node has it. None: ask others."""
        local = self._routing.local.get(shard)
        if (
            local is None
            or local.is_asked_last
            or not await self._reads.settles_soon(
                local, request.consistency, tokens.get(shard, 0), caller.deadline
            )
        ):
            return None
        try:
            if local.shard.index.needs_build(query):
                await local.build(query)
            fused = local.shard.index.search_local(query)
        except RecordDamaged:
            return None
        return SearchAnswer(fused.hits, [], {shard: local.shard.applied_index}), fused

    @staticmethod
    def encode_cursor(_request: rq.SearchRequest, answer: SearchAnswer) -> str | None:
        cursor: str | None = answer.details.get("next_cursor")
        return cursor

    # -- the request ----------------------------------------------------------------------

    async def _prepare(self, caller: Caller, request: rq.SearchRequest) -> _Search:
        text = request.query
        if text is not None:
            text = text.strip() or None
        if text is None and request.vector is None:
            raise InvalidField(
                "A search needs a `query`, a `vector`, or both.",
                hint='Send {"query": "what does Ana drink?", "user_id": "ana"}.',
                field="query",
            )
        if text is not None and len(text.encode()) > self._limits.query_bytes_max:
            raise TooLarge(
                f"`query` has {len(text.encode()):,} bytes; the limit is "
                f"{self._limits.query_bytes_max:,} (limits.query_bytes_max).",
                field="query",
            )
        scope = Scope(
            user_id=request.user_id,
            agent_id=request.agent_id,
            app_id=request.app_id,
            run_id=request.run_id,
        )
        check_scope(scope, self._limits)
        filter_ = None
        if request.filters is not None:
            filter_ = parse_filter(request.filters, self._limits)
            scope = promoted(scope, filter_)
        vector = None if request.vector is None else normalised(request.vector, self._dim)
        now_ms = self._clock.wall_ms()
        cursor = None
        if request.cursor is not None:
            # Later pages rank as of the first page's time, or recency would shuffle them.
            cursor, now_ms = _split_cursor(request.cursor, now_ms)
        query = SearchQuery(
            tenant=caller.tenant,
            scope=scope,
            top_k=request.top_k,
            now_ms=now_ms,
            text=text,
            vector=vector,
            filter=filter_,
            legs=self._legs_of(request),
            fusion=request.fusion,
            threshold=request.threshold,
            explain=request.explain,
            language=self._settings.language,
        )
        after = None
        if cursor is not None:
            after = decode_search_cursor(cursor, _fingerprint(query, request.filters))
        asked_vector = vector
        if vector is None and text is not None and self._embedder is not None:
            wants_vector = any(
                name == "vector" and weight > 0
                for name, weight in query.legs or self._defaults.legs
            )
            if wants_vector:
                row = await within(
                    self._embedder.embed_query(text), self._routing.remaining(caller.deadline)
                )
                vector = row.tobytes()
        if after is not None or vector is not asked_vector:
            query = replace(query, after=after, vector=vector)
        if not active_legs(query, self._defaults):
            raise InvalidField(
                "None of the `legs` can work with this search: words need a `query`, "
                "vectors a `vector` or an embedding model.",
                hint="Leave `legs` out for the defaults.",
                field="legs",
            )
        return _Search(query, request.filters)

    def _legs_of(self, request: rq.SearchRequest) -> tuple[tuple[LegName, float], ...]:
        legs = request.legs
        if legs is None:
            return self._default_legs
        usual = dict(self._default_legs or self._defaults.legs)
        chosen = (
            legs if isinstance(legs, dict) else {name: usual.get(name, 1.0) or 1.0 for name in legs}
        )
        for name, weight in chosen.items():
            # Refuses NaN too, and what would be lost in the sum of weights.
            if weight != 0 and not _WEIGHT_MIN <= weight <= 100:
                raise InvalidField(
                    f"The weight of leg `{name}` is {weight}; it must be 0, or between "
                    f"{_WEIGHT_MIN} and 100.",
                    field="legs",
                )
        # In one order, so that equal requests are equal queries.
        return tuple(sorted(chosen.items()))

    # -- several shards -------------------------------------------------------------------

    async def _over_shards(
        self,
        caller: Caller,
        request: rq.SearchRequest,
        search: _Search,
        shards: Sequence[str],
        tokens: dict[str, int],
    ) -> tuple[SearchAnswer, Fused]:
        query = search.query
        wire = search.to_wire()
        first: Gathered[list[Any]] = await self._reads.ask_each(
            shards,
            "search.statistics",
            wire,
            lambda local: self._statistics_here(local, query),
            request.consistency,
            tokens,
            caller.deadline,
            prepare=lambda local: local.build(query),
        )
        if not first.answers:
            raise first.refusal()
        answered = [shard for shard in shards if shard in first.answers]
        stats = merge_stats([TextStats.from_wire(first.answers[s][0]) for s in answered])
        # The second round may meet other replicas: each must have seen what the first one saw.
        seen = {shard: int(first.answers[shard][1]) for shard in answered}
        second: Gathered[list[Any]] = await self._reads.ask_each(
            answered,
            "search.candidates",
            {**wire, "stats": stats.to_wire()},
            lambda local: self._candidates_here(local, query, stats),
            "session",
            seen,
            caller.deadline,
            prepare=lambda local: local.build(query),
        )
        if not second.answers:
            raise second.refusal()
        parts = [shard for shard in answered if shard in second.answers]
        fused = fuse(
            query,
            active_legs(query, self._defaults),
            [LegResults.from_wire(second.answers[shard]) for shard in parts],
            self._defaults,
        )
        lost = await self._fill(caller, fused, parts, seen)
        partial = [s for s in shards if s not in second.answers or s in lost]
        return SearchAnswer(fused.hits, partial, {s: seen[s] for s in parts}), fused

    async def _fill(
        self, caller: Caller, fused: Fused, parts: Sequence[str], seen: dict[str, int]
    ) -> Sequence[str]:
        """Fetch the records that the candidates came without. Shards that did not give theirs."""
        if not fused.missing:
            return ()
        docs: dict[str, list[int]] = {}
        for _, part, doc in fused.missing:
            docs.setdefault(parts[part], []).append(doc)
        found: Gathered[list[bytes]] = await self._reads.ask_each(
            list(docs),
            "search.records",
            {"docs": docs},
            lambda local: local.shard.index.records(docs[local.info.id]),
            "session",
            seen,
            caller.deadline,
        )
        records = {
            (shard, doc): record
            for shard, answer in found.answers.items()
            for doc, record in zip(docs[shard], answer, strict=True)
        }
        for position, part, doc in fused.missing:
            fused.hits[position].record = records.get((parts[part], doc), b"")
        # What was deleted between the rounds is no result any more.
        fused.hits = [hit for hit in fused.hits if hit.record]
        fused.missing = []
        return found.missing(list(docs))

    def _statistics_here(self, local: LocalShard, query: SearchQuery) -> list[Any]:
        stats = local.shard.index.text_stats(query) if query.text else _NO_STATISTICS
        return [stats.to_wire(), local.shard.applied_index]

    def _candidates_here(
        self, local: LocalShard, query: SearchQuery, stats: TextStats
    ) -> list[Any]:
        results = local.shard.index.legs(query, stats)
        size = 0
        for candidate in results.candidates:
            size += len(candidate.record)
            if size > _RECORDS_BYTES_MAX:
                candidate.record = b""
        return results.to_wire()

    # -- what peers ask -------------------------------------------------------------------

    async def on_statistics(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`search.statistics`: shard -> [statistics, applied index]."""
        query = self._query_of(body)
        return await self._reads.answer_each(
            body,
            lambda local: self._statistics_here(local, query),
            prepare=lambda local: local.build(query),
        )

    async def on_candidates(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`search.candidates`: shard -> its legs' results."""
        query = self._query_of(body)
        stats = TextStats.from_wire(body["stats"])
        return await self._reads.answer_each(
            body,
            lambda local: self._candidates_here(local, query, stats),
            prepare=lambda local: local.build(query),
        )

    async def on_records(self, _peer: str, body: dict[str, Any]) -> dict[str, Any]:
        """`search.records`: shard -> records."""
        docs = body["docs"]
        return await self._reads.answer_each(
            body, lambda local: local.shard.index.records(docs[local.info.id])
        )

    def _query_of(self, body: dict[str, Any]) -> SearchQuery:
        user_id, agent_id, app_id, run_id = body["scope"]
        after = body["after"]
        return SearchQuery(
            tenant=body["tenant"],
            scope=Scope(user_id=user_id, agent_id=agent_id, app_id=app_id, run_id=run_id),
            top_k=body["top_k"],
            now_ms=body["now_ms"],
            text=body["text"],
            vector=body["vector"],
            filter=filter_from_wire(body["filters"], self._limits),
            legs=tuple((name, weight) for name, weight in body["legs"]),
            fusion=body["fusion"],
            threshold=body["threshold"],
            explain=body["explain"],
            after=None if after is None else (after[0], after[1]),
            language=body["language"],
        )


def _split_cursor(text: str, now_ms: int) -> tuple[str, int]:
    """(cursor, the time of the first page). What is damaged is found by `decode_cursor`."""
    cursor, _, time_text = text.partition(".")
    try:
        first_ms = int(time_text[:16], 16)
    except ValueError:
        return cursor, now_ms
    return cursor, first_ms if 0 <= first_ms <= TIME_MS_MAX else now_ms


def _fingerprint(query: SearchQuery, filters: dict[str, Any] | None) -> bytes:
    """Of all that decides the order: a cursor fits the same search only.

    The vector counts as the caller sent it: one that was embedded here follows from the text.
    """
    scope = query.scope
    parts = [
        query.tenant,
        [scope.user_id, scope.agent_id, scope.app_id, scope.run_id],
        query.now_ms,
        query.text,
        filters,
        query.legs,
        query.fusion,
        query.threshold,
        query.language,
    ]
    return fingerprint(_json.encode(parts), query.vector or b"")
