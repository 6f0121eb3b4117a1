"""Every bound that bad or heavy input can meet. All are settings (`[limits]` in node.toml)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request may ask and what one node takes on at once; over it: 413, 400 or 429."""

    body_bytes_max: Annotated[
        int,
        Meta(
            ge=1024,
            description="Largest request body. It is enforced while the body is read, so a "
            "client that lies about its length gains nothing.",
        ),
    ] = 32 * 1024 * 1024
    bodies_bytes_max: Annotated[
        int,
        Meta(
            ge=1024,
            description="All request bodies held at one moment, together. Beyond it new bodies "
            "are answered 429: many large requests at once must not exhaust memory.",
        ),
    ] = 256 * 1024 * 1024
    body_read_ms_max: Annotated[
        int,
        Meta(
            ge=10,
            description="Longest time a client may take to send its body. Slow senders hold a "
            "place that others wait for.",
        ),
    ] = 15_000
    batch_items_max: Annotated[
        int, Meta(ge=1, description="Items in one batch of adds or deletes.")
    ] = 1_000
    content_bytes_max: Annotated[
        int,
        Meta(
            ge=1,
            description="UTF-8 bytes of one memory's content. Longer text is better stored as "
            "several memories: an embedding represents a few hundred words.",
        ),
    ] = 64 * 1024
    scope_id_bytes_max: Annotated[
        int,
        Meta(ge=1, le=256, description="UTF-8 bytes of a user, agent, app or run id: it is a key."),
    ] = 256
    metadata_bytes_max: Annotated[
        int, Meta(ge=2, description="Bytes of one memory's metadata as compact JSON.")
    ] = 16 * 1024
    metadata_depth_max: Annotated[
        int, Meta(ge=1, le=64, description="Nesting of one memory's metadata.")
    ] = 8
    categories_max: Annotated[int, Meta(ge=0, description="Categories of one memory.")] = 32
    query_bytes_max: Annotated[int, Meta(ge=1, description="UTF-8 bytes of a search text.")] = (
        8 * 1024
    )
    filter_depth_max: Annotated[
        int, Meta(ge=1, le=64, description="Nesting of AND, OR and NOT in a filter.")
    ] = 16
    filter_terms_max: Annotated[
        int, Meta(ge=1, description="Comparisons in a filter, and values of one `in` list.")
    ] = 256
    top_k_max: Annotated[int, Meta(ge=1, description="Results that one search may ask for.")] = (
        1_000
    )
    search_batch_max: Annotated[
        int, Meta(ge=1, description="Searches in one POST /memories/search/batch.")
    ] = 50
    page_items_max: Annotated[int, Meta(ge=1, description="Memories in one page of a list.")] = (
        1_000
    )
    history_versions_max: Annotated[
        int, Meta(ge=1, description="Versions that one history answer holds: the newest.")
    ] = 1_000
    requests_in_flight_max: Annotated[
        int,
        Meta(
            ge=1,
            description="Requests a node works on at once; more are answered 429, because a "
            "queue that only grows makes every answer late.",
        ),
    ] = 2_048
    connections_max: Annotated[
        int,
        Meta(ge=1, description="Open HTTP connections; more are closed at once."),
    ] = 8_192
    writes_queued_max: Annotated[
        int, Meta(ge=1, description="Writes waiting for one shard's quorum; more are answered 429.")
    ] = 4_096
    deadline_ms_default: Annotated[
        int,
        Meta(ge=1, description="A request's deadline when it names none (X-AgentMem-Deadline-Ms)."),
    ] = 10_000
    deadline_ms_max: Annotated[
        int, Meta(ge=1, description="The longest deadline a request may name.")
    ] = 60_000
    disk_free_bytes_min: Annotated[
        int,
        Meta(
            ge=0,
            description="Below this much free disk, writes are refused with 503 and reads go "
            "on: the rest is needed to recover without a restart.",
        ),
    ] = 128 * 1024 * 1024
