"""Backups as the API speaks of them: what is asked, how work on them goes, what is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Destination = Annotated[
    str,
    Meta(
        max_length=2_000,
        description="Where backups are kept: `/path`, `file:///path` or "
        "`s3://bucket/prefix?endpoint=URL&region=NAME`. Every node must reach it. Default: the "
        "setting `backup.url`.",
    ),
]
BackupId = Annotated[str, Meta(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9._-]+$")]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]


class CreateBackup(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Back up all shards as of one moment."""

    url: Destination | None = None
    full: Annotated[
        bool, Meta(description="Upload every chunk again, also those that are there already.")
    ] = False


class RestoreBackup(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Write memories of a backup back: of one owner, of a tenant, or all."""

    url: Destination | None = None
    backup: Annotated[
        BackupId | None, Meta(description="Default: the newest, or the newest before `at`.")
    ] = None
    at: Annotated[
        str | None,
        Meta(description="The moment to go back to, RFC 3339; needs the archived log."),
    ] = None
    tenant: Annotated[
        _Name | None, Meta(description="Whose memories. Default: the tenant of the API key.")
    ] = None
    user_id: Annotated[_Name | None, Meta(description="Of this owner only; so the next three.")] = (
        None
    )
    agent_id: _Name | None = None
    app_id: _Name | None = None
    run_id: _Name | None = None
    everything: Annotated[
        bool,
        Meta(description="All tenants, with deleted memories' history: for an empty cluster."),
    ] = False
    exact: Annotated[
        bool, Meta(description="Also delete what the backup does not have; not for `everything`.")
    ] = False
    dry_run: Annotated[bool, Meta(description="Say what would change, and change nothing.")] = False


class BackupQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    url: Destination | None = None


class BackupSummary(msgspec.Struct, kw_only=True):
    """One backup in a store. `damaged` tells what is wrong with its manifest; all else is then 0.

    `content` is the digest of all memories, their vectors and their history, in whatever order
    and on whatever shards: equal digests mean equal contents.
    """

    id: str
    at: str | None = None
    cluster_id: str = ""
    cluster: str = ""
    shards: int = 0
    memories: int = 0
    size_bytes: int = 0
    uploaded_bytes: int = 0
    content: str = ""
    parent: str | None = None
    damaged: str | None = None


class WorkError(msgspec.Struct, kw_only=True):
    code: str
    detail: str


class BackupWork(msgspec.Struct, kw_only=True):
    """A backup that is being made, or a restore, as the node that was asked knows it.

    `moved_bytes` went over the wire; of a backup the rest was there already.
    """

    id: str
    kind: Literal["create", "restore"]
    state: Literal["running", "done", "failed"]
    node: str
    url: str
    phase: str
    started_at: str
    ended_at: str | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    moved_bytes: int = 0
    error: WorkError | None = None
    result: dict[str, Any] | None = None


class BackupList(msgspec.Struct, kw_only=True):
    """Backups, oldest first; work that this node began; and how the archived log does."""

    url: str
    results: list[BackupSummary]
    work: list[BackupWork]
    archive: dict[str, Any] | None
