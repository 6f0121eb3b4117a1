"""What of a node has to do with backups, put together, started and stopped."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agentmem_cluster.link.link import Link
from agentmem_cluster.runtime import Clock, Rng
from agentmem_node.config import Config
from agentmem_node.service.archiver import Archiver
from agentmem_node.service.backup_work import Backups
from agentmem_node.service.backups import BackupMaker
from agentmem_node.service.cuts import Cuts
from agentmem_node.service.membership import Membership
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.restore import Restorer
from agentmem_node.service.routing import Routing
from agentmem_node.service.write import Writes

CALLS = (
    "backup.probe",
    "backup.cut",
    "backup.release",
    "backup.upload",
    "backup.drop",
    "restore.look",
    "restore.ids",
)


class BackupParts:
    """Cuts and uploads for whoever asks, the archiver, and `backups` for the API."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        routing: Routing,
        writes: Writes,
        membership: Membership,
        replicas: Replicas,
        link: Link | None,
        *,
        clock: Clock,
        rng: Rng,
        version: str,
    ) -> None:
        """`folder`: for what a restore fetches; emptied when the node starts."""
        settings = config.backup
        self._link = link
        self._cuts = Cuts(routing, clock, settings.rate_bytes_per_s)
        self._restorer = Restorer(
            folder, routing, writes, clock=clock, view=membership.require_view
        )
        self._archiver: Archiver | None = None
        self._task: asyncio.Task[None] | None = None
        if settings.archive is not None:
            self._archiver = Archiver(
                routing,
                clock,
                url=settings.archive,
                period_s=settings.archive_ms / 1000,
                cluster_id=lambda: None if membership.view is None else membership.view.cluster_id,
            )
            replicas.on_leaving = self._archiver.leaving
        maker = BackupMaker(
            config.node.id,
            routing,
            self._cuts.calls,
            clock=clock,
            rng=rng,
            version=version,
            cluster_name=config.cluster.name,
            view=membership.require_view,
            hold_ms_max=settings.hold_ms_max,
        )
        self.backups = Backups(config, maker, self._restorer, self._archiver, clock=clock)

    def start(self) -> None:
        self._restorer.tidy_up()
        self._cuts.start()
        if self._link is not None:
            for method, handler in {**self._cuts.calls, **self._restorer.calls}.items():
                self._link.register(method, handler)
        if self._archiver is not None:
            self._task = asyncio.create_task(self._archiver.run(), name="archiver")

    async def stop(self) -> None:
        """Before the shards are closed."""
        await self.backups.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._cuts.stop()
