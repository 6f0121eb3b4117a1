"""The routes for operators who make and restore backups."""

from __future__ import annotations

from typing import Any

from agentmem_cluster.errors import BadRequest, Conflict, InvalidField
from agentmem_node.api import backups
from agentmem_node.api.route import BASE, Errors, Route, make_route
from agentmem_node.backup.errors import BackupDestination, BackupMissing, BackupUnreachable
from agentmem_node.model import backups as bk

_WISH: Errors = (BackupDestination, BadRequest, InvalidField, Conflict)
_SHARED: dict[str, Any] = {"needs_admin": True, "tag": "backups"}

BACKUP_ROUTES: tuple[Route, ...] = (
    make_route(
        "POST",
        f"{BASE}/backups",
        backups.create_backup,
        "admin",
        "Begin a backup of all shards",
        description="One moment for all shards: a write that was sent after another was "
        "acknowledged is never in a backup without it. The answer is work to be asked for with "
        "GET /backups/{id}, on the same node.",
        body=bk.CreateBackup,
        answer=bk.BackupWork,
        status=202,
        errors=_WISH,
        example={"url": "/var/backups/agentmem"},
        **_SHARED,
    ),
    make_route(
        "GET",
        f"{BASE}/backups",
        backups.list_backups,
        "admin",
        "List backups",
        description="What is kept at a place, oldest first, and the work that this node began.",
        query=bk.BackupQuery,
        answer=bk.BackupList,
        errors=(BackupDestination, InvalidField, BackupUnreachable),
        **_SHARED,
    ),
    make_route(
        "GET",
        f"{BASE}/backups/{{id}}",
        backups.backup_work,
        "admin",
        "How a backup or a restore goes",
        description="Of work that was begun on this node. `state` is running, done or failed.",
        answer=bk.BackupWork,
        id_meaning="The id that the answer to the request had.",
        errors=(BackupMissing,),
        **_SHARED,
    ),
    make_route(
        "POST",
        f"{BASE}/backups/restore",
        backups.restore_backup,
        "admin",
        "Begin a restore of one owner, a tenant or everything",
        description="Memories are written back under their own ids: those that are missing are "
        "added with their versions and history, those that were changed get the backup's state "
        "as their next version. Run again after an interruption, it does the rest.",
        body=bk.RestoreBackup,
        answer=bk.BackupWork,
        status=202,
        errors=_WISH,
        example={"user_id": "ana", "at": "2026-01-31T09:30:00Z", "dry_run": True},
        **_SHARED,
    ),
)
