"""Backups as operators ask for them: where to, what is under way on this node, what is kept."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from agentmem_cluster.errors import (
    AgentMemError,
    BadRequest,
    Conflict,
    DiskFull,
    InternalError,
    InvalidField,
)
from agentmem_cluster.runtime import Clock
from agentmem_node.backup import catalog
from agentmem_node.backup.errors import BackupDestination, BackupMissing
from agentmem_node.backup.manifest import Manifest
from agentmem_node.backup.objects import open_store
from agentmem_node.config import Config
from agentmem_node.model.backups import (
    BackupList,
    BackupSummary,
    BackupWork,
    CreateBackup,
    RestoreBackup,
    WorkError,
)
from agentmem_node.model.memory import Scope
from agentmem_node.model.times import format_ms, parse_time_ms
from agentmem_node.service import backups
from agentmem_node.service.archiver import Archiver
from agentmem_node.service.contract import Caller
from agentmem_node.service.restore import Restorer, Wanted
from agentmem_node.service.restore import Told as RestoreTold

log = logging.getLogger("agentmem.backup")

# Work that ended is remembered for whoever asks what became of it.
_KEPT_MAX = 100


@dataclass(slots=True)
class _Work:
    shown: BackupWork
    refresh: Callable[[BackupWork], None]
    task: asyncio.Task[None] | None = None


class Backups:
    """Implements `agentmem_node.service.contract.BackupService`."""

    def __init__(
        self,
        config: Config,
        maker: backups.BackupMaker,
        restorer: Restorer,
        archiver: Archiver | None,
        *,
        clock: Clock,
    ) -> None:
        self._config = config
        self._maker = maker
        self._restorer = restorer
        self._archiver = archiver
        self._clock = clock
        self._work: dict[str, _Work] = {}

    async def stop(self) -> None:
        """Call off what is under way: a backup is then not there, a restore can be run again."""
        tasks = [work.task for work in self._work.values() if work.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what is asked ----------------------------------------------------------------------

    async def create(self, caller: Caller, request: CreateBackup) -> BackupWork:
        """Begin a backup. Raises BackupDestination, Conflict (one is being made)."""
        url = self.place(request.url)
        if any(w.shown.kind == "create" and w.shown.state == "running" for w in self._all()):
            raise Conflict("This node is making a backup already.", hint="Wait until it is done.")
        told = backups.Told()
        backup_id = self._maker.new_id()

        def refresh(shown: BackupWork) -> None:
            shown.phase = told.phase
            shown.done_bytes = sum(told.done.values())
            shown.total_bytes = sum(told.total.values())
            shown.moved_bytes = sum(told.moved.values())

        async def make() -> dict[str, Any]:
            made = await self._maker.make(url, full=request.full, backup_id=backup_id, told=told)
            summary = summary_of(made)
            return {
                "backup": summary.id,
                "at": summary.at,
                "memories": summary.memories,
                "size_bytes": summary.size_bytes,
                "uploaded_bytes": summary.uploaded_bytes,
                "content": summary.content,
                "writes_waited_ms": made.took_ms,
                "parent": summary.parent,
            }

        return self._begin("create", backup_id, url, make, refresh)

    async def restore(self, caller: Caller, request: RestoreBackup) -> BackupWork:
        """Begin a restore. Raises BackupDestination, BadRequest, Conflict."""
        wanted = self._wanted(caller, request, self.place(request.url))
        running = [w for w in self._all() if w.shown.state == "running"]
        if any(w.shown.kind == "restore" for w in running):
            raise Conflict("This node is restoring already.", hint="Wait until it is done.")
        told = RestoreTold()
        work_id = f"restore-{self._maker.new_id()}"

        def refresh(shown: BackupWork) -> None:
            shown.phase = told.phase
            # A shard's bytes count until it is fetched, then the shard counts as a whole.
            part = told.progress.total_bytes
            shown.total_bytes = part * told.shards
            shown.done_bytes = part * told.done_shards + min(part, told.progress.done_bytes)
            shown.done_bytes = min(shown.done_bytes, shown.total_bytes)
            shown.moved_bytes = told.progress.moved_bytes

        async def run() -> dict[str, Any]:
            return await self._restorer.run(wanted, work_id, told)

        return self._begin("restore", work_id, wanted.url, run, refresh)

    async def list(self, caller: Caller, url: str | None) -> BackupList:
        """Raises BackupDestination, BackupUnreachable."""
        url = self.place(url)
        found = await asyncio.to_thread(lambda: catalog.listed(open_store(url)))
        return BackupList(
            url=url,
            results=[
                BackupSummary(id=item.id, damaged=item.fault)
                if item.manifest is None
                else summary_of(item.manifest)
                for item in found
            ],
            work=[self._shown(work) for work in self._all()],
            archive=None if self._archiver is None else self._archiver.status(),
        )

    async def get(self, caller: Caller, work_id: str) -> BackupWork:
        """Work that this node began. Raises BackupMissing."""
        work = self._work.get(work_id)
        if work is None:
            raise BackupMissing(
                f"This node knows of no work {work_id[:80]!r}.",
                hint="Ask the node that began it. Work is forgotten when that node starts anew: "
                "a backup is done if GET /backups lists it, and a restore can be run again.",
            )
        return self._shown(work)

    # -- within -----------------------------------------------------------------------------

    def _all(self) -> tuple[_Work, ...]:
        return tuple(self._work.values())

    def _shown(self, work: _Work) -> BackupWork:
        if work.shown.state == "running":
            work.refresh(work.shown)
        return work.shown

    def _begin(
        self,
        kind: Any,
        work_id: str,
        url: str,
        run: Callable[[], Awaitable[dict[str, Any]]],
        refresh: Callable[[BackupWork], None],
    ) -> BackupWork:
        shown = BackupWork(
            id=work_id,
            kind=kind,
            state="running",
            node=self._config.node.id,
            url=url,
            phase="beginning",
            started_at=format_ms(self._clock.wall_ms()),
        )
        work = _Work(shown, refresh)
        for old in [key for key, w in self._work.items() if w.shown.state != "running"][
            : max(0, len(self._work) - _KEPT_MAX)
        ]:
            del self._work[old]
        self._work[work_id] = work
        work.task = asyncio.create_task(self._run(work, run), name=work_id)
        return shown

    async def _run(self, work: _Work, run: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        shown = work.shown
        try:
            result = await run()
        except AgentMemError as error:
            log.warning("%s failed: %s", shown.id, error)
            self._failed(shown, error)
        except asyncio.CancelledError:
            shown.state, shown.phase = "failed", "called off"
            raise
        except OSError as error:
            log.warning("%s failed: %s", shown.id, error)
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            kind = DiskFull if is_full else InternalError
            self._failed(shown, kind(f"This node's disk failed the work: {error.strerror}."))
        except Exception as error:
            log.exception("%s failed", shown.id)
            self._failed(shown, InternalError(f"Something went wrong: {error}"))
        else:
            work.refresh(shown)
            shown.done_bytes = shown.total_bytes
            shown.state, shown.phase, shown.result = "done", "done", result
        finally:
            shown.ended_at = format_ms(self._clock.wall_ms())

    def _failed(self, shown: BackupWork, error: AgentMemError) -> None:
        text = f"{error.message} {error.hint}".strip()
        shown.state, shown.error = "failed", WorkError(code=error.code, detail=text)

    def place(self, given: str | None) -> str:
        """Where backups are, if they may be there. Raises BackupDestination."""
        settings = self._config.backup
        url = given or settings.url
        if url is None:
            raise BackupDestination(
                "It is not said where backups are kept.",
                hint="Give a URL, or set backup.url on the nodes.",
            )
        # A backup holds the memories of all tenants. Who administers a cluster has no right to
        # those, so where there are keys the configuration says where backups may go.
        allowed = [*settings.allow, *([] if settings.url is None else [settings.url])]
        is_free = not settings.allow and not self._config.keys_required
        if not is_free and not any(_is_below(url, place) for place in allowed):
            raise BackupDestination(
                f"Backups may not be kept at {url.partition('?')[0][:200]!r}.",
                hint="The settings backup.url and backup.allow name where they may: "
                f"{', '.join(allowed) or 'nowhere yet'}.",
            )
        open_store(url)  # a URL that is none is told at once
        return url

    def _wanted(self, caller: Caller, request: RestoreBackup, url: str) -> Wanted:
        scope = Scope(
            user_id=request.user_id,
            agent_id=request.agent_id,
            app_id=request.app_id,
            run_id=request.run_id,
        )
        given = [n for n in ("user_id", "agent_id", "app_id", "run_id") if getattr(scope, n)]
        if len(given) > 1:
            raise BadRequest(
                f"`{given[0]}` and `{given[1]}` are given: a restore is of one owner.",
                hint="A memory's owner is its user, else its agent, else its app, else its run.",
            )
        if request.everything and (request.tenant or given or request.exact):
            raise BadRequest(
                "`everything` goes with neither a tenant, an owner nor `exact`.",
                hint="Restore tenants one by one to delete what the backup does not have.",
            )
        until_ms = None if request.at is None else parse_time_ms(request.at, "at")
        if until_ms is not None and until_ms > self._clock.wall_ms():
            raise InvalidField("`at` is in the future.", field="at")
        return Wanted(
            url=url,
            backup_id=request.backup,
            until_ms=until_ms,
            tenant=None if request.everything else request.tenant or caller.tenant,
            owner=scope.owner or None,
            exact=request.exact,
            dry_run=request.dry_run,
        )


def summary_of(manifest: Manifest) -> BackupSummary:
    content = manifest.content
    return BackupSummary(
        id=manifest.id,
        at=format_ms(manifest.at_ms),
        cluster_id=manifest.cluster_id,
        cluster=manifest.cluster_name,
        shards=len(manifest.shards),
        memories=content.memories,
        size_bytes=manifest.size_bytes,
        uploaded_bytes=manifest.uploaded_bytes,
        content=content.digest.hex(),
        parent=manifest.parent,
    )


def _is_below(url: str, allowed: str) -> bool:
    """Whether a place is another, or within it; a way up leads nowhere."""
    place, _, query = url.removeprefix("file://").partition("?")
    base, _, base_query = allowed.removeprefix("file://").partition("?")
    # As the store will read it: %2e%2e is a way up too.
    place, base = unquote(place), unquote(base).rstrip("/")
    if ".." in place.split("/"):
        return False
    return (place == base or place.startswith(base + "/")) and query == base_query
