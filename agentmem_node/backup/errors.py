"""What can go wrong with a backup.

BackupDestination  400  the URL is none that backups know
BackupMissing      404  no such backup, or an object of it is not there
BackupDamaged      422  an object is there, but is not what was written
BackupUnreachable  503  the directory or the bucket does not answer
RestoreImpossible  409  what was asked for cannot be made from what is kept
"""

from __future__ import annotations

from agentmem_cluster.errors import AgentMemError, BadRequest, Conflict, NotFound, Unavailable


class BackupDestination(BadRequest):
    code = "backup_destination"


class BackupMissing(NotFound):
    code = "backup_missing"


class BackupDamaged(AgentMemError):
    """Nothing is restored from it: half a memory store looks like a whole one."""

    code, status = "backup_damaged", 422


class BackupUnreachable(Unavailable):
    code = "backup_unreachable"
    retry_after_s = 5.0


class BackupBusy(Conflict):
    """A backup and a removal of old ones must not meet."""

    code = "backup_busy"


class RestoreImpossible(Conflict):
    code = "restore_impossible"


def damaged(name: str, what: str) -> BackupDamaged:
    return BackupDamaged(
        f"The backup's object {name} is damaged: {what}.",
        hint="`agentmem backup verify` lists everything that is damaged; `agentmem backup create "
        "--full` makes a new backup that uploads every chunk again.",
        object=name,
    )
