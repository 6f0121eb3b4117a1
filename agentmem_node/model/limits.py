"""Every bound that bad or heavy input can meet. All are settings (`[limits]` in node.toml)."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    body_bytes_max: int = 32 * 1024 * 1024
    batch_items_max: int = 1_000
    content_bytes_max: int = 64 * 1024
    scope_id_bytes_max: int = 256
    metadata_bytes_max: int = 16 * 1024
    metadata_depth_max: int = 8
    categories_max: int = 32
    query_bytes_max: int = 8 * 1024
    filter_depth_max: int = 16
    filter_terms_max: int = 256
    top_k_max: int = 1_000
    search_batch_max: int = 50
    page_items_max: int = 1_000
    history_versions_max: int = 1_000
    requests_in_flight_max: int = 2_048
    writes_queued_max: int = 4_096
    deadline_ms_default: int = 10_000
    deadline_ms_max: int = 60_000
    ledger_entries_max: int = 200_000  # per shard: how long a retried request id is remembered
    ledger_age_ms_max: int = 24 * 3_600_000
    disk_free_bytes_min: int = 128 * 1024 * 1024
