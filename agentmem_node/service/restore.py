"""Writing memories of a backup back into the running cluster, through ordinary commands.

The backup's shards are fetched one after the other into this node's data directory, read, and
removed. What each memory needs is decided by `agentmem_node.backup.merge` on what the leader of
its shard has now, so the cluster may have any number of shards, and a restore that was
interrupted is simply run again: it finds what is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agentmem_cluster.errors import AgentMemError, MapMoved
from agentmem_cluster.meta import LEVEL_OF_RESTORES
from agentmem_cluster.ring import slot_of
from agentmem_cluster.runtime import Clock
from agentmem_cluster.shardmap import ShardInfo
from agentmem_node.backup.content import ContentDigest, Row
from agentmem_node.backup.errors import RestoreImpossible
from agentmem_node.backup.fetch import Plan, fetch_shard, plan
from agentmem_node.backup.merge import (
    Seen,
    Step,
    did,
    next_step,
    record_hash,
    vector_hash,
)
from agentmem_node.backup.objects import open_store
from agentmem_node.backup.rows import FetchedShard
from agentmem_node.backup.upload import Progress
from agentmem_node.model.commands import Delete, Write, encode_write
from agentmem_node.model.ids import format_id, slot_of_id
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.service.view import View
from agentmem_node.service.write import Writes

T = TypeVar("T")

_ROWS_AT_ONCE = 512
_COMMAND_OPS_MAX = 128
_COMMAND_BYTES_MAX = 1 << 20
_WRITES_AT_ONCE = 16
# A memory that users keep changing while it is restored is theirs.
_RACES_MAX = 4
_TRIES_MAX = 6
_TRY_S = 10.0
_AGAIN_S = 0.5
_IDS_AT_ONCE = 2_000
_SHOWN_MAX = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be restored. `tenant` None: everything; `owner` as in `Scope.owner`."""

    url: str
    backup_id: str | None
    until_ms: int | None
    tenant: str | None
    owner: str | None
    exact: bool
    dry_run: bool


@dataclass(slots=True)
class Told:
    """How far a restore is."""

    phase: str = "beginning"
    progress: Progress = field(default_factory=Progress)
    done_shards: int = 0
    shards: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    shown: list[dict[str, str]] = field(default_factory=list)


class Restorer:
    def __init__(
        self,
        folder: Path,
        routing: Routing,
        writes: Writes,
        *,
        clock: Clock,
        view: Callable[[], View],
    ) -> None:
        self._folder = folder
        self._routing = routing
        self._writes = writes
        self._clock = clock
        self._view = view
        self.calls: dict[str, Callable[[str, dict[str, Any]], Awaitable[Any]]] = {
            "restore.look": self.on_look,
            "restore.ids": self.on_ids,
        }

    def tidy_up(self) -> None:
        """At the start of the node: nothing of an interrupted restore is needed."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def run(self, wanted: Wanted, work_id: str, told: Told) -> dict[str, Any]:
        """Restore, and say what was done.

        Raises BackupMissing, BackupDamaged, RestoreImpossible, BackupUnreachable, DiskFull,
        NoQuorum; what was written until then stays, and running it again does the rest.
        """
        folder = self._folder / work_id
        # LMDB wants to be used on one thread, and fetching blocks.
        with ThreadPoolExecutor(1, thread_name_prefix="restore") as thread:
            try:
                return await self._run(wanted, folder, told, thread)
            finally:
                await _on(thread, partial(shutil.rmtree, folder, ignore_errors=True))

    async def _run(
        self, wanted: Wanted, folder: Path, told: Told, thread: ThreadPoolExecutor
    ) -> dict[str, Any]:
        store = await _on(thread, partial(open_store, wanted.url))
        found = await _on(
            thread,
            partial(plan, store, backup_id=wanted.backup_id, until_ms=wanted.until_ms),
        )
        self._check(found)
        manifest = found.manifest
        shards = found.shards
        if wanted.tenant is not None and wanted.owner is not None:
            slot = slot_of(wanted.tenant, wanted.owner)
            shards = [one for one in shards if one.slots[0] <= slot < one.slots[1]]
        told.shards = len(shards)
        content = ContentDigest()
        live: set[bytes] = set()
        for shard in shards:
            name = shard.id
            told.phase = f"fetching {name}"
            told.progress.done_bytes = 0
            await _on(
                thread,
                partial(
                    fetch_shard,
                    store,
                    manifest,
                    shard.in_backup,
                    folder / name,
                    until_ms=wanted.until_ms,
                    lineage=shard.lineage,
                    progress=told.progress,
                ),
                told.progress,
            )
            told.phase = f"restoring {name}"
            opened = await _on(thread, partial(FetchedShard, folder / name, manifest.model.dim))
            try:
                rows = opened.rows(wanted.tenant, wanted.owner)
                while batch := await _on(thread, partial(_take, rows, content)):
                    if wanted.exact:
                        live.update(row.id for row in batch if row.live is not None)
                    await self._merge(batch, wanted, told)
            finally:
                await _on(thread, opened.close)
            await _on(thread, partial(shutil.rmtree, folder / name, ignore_errors=True))
            told.done_shards += 1
        if wanted.exact and wanted.tenant is not None:
            told.phase = "deleting what the backup does not have"
            await self._delete_others(wanted.tenant, wanted.owner, live, wanted, told)
        counts = {
            name: told.counts[name]
            for name in ("added", "updated", "revived", "deleted", "unchanged", "contested")
        }
        return {
            "backup": manifest.id,
            "dry_run": wanted.dry_run,
            **counts,
            "content": content.result().digest.hex(),
            "examples": told.shown,
        }

    def _check(self, found: Plan) -> None:
        if found.faults:
            raise RestoreImpossible(
                f"That moment cannot be restored: {'; '.join(found.faults[:3])}.",
                hint="Choose a moment that the backups and the archived log cover.",
            )
        view = self._view()
        old = [n for n, info in view.nodes.items() if info.level < LEVEL_OF_RESTORES]
        if old:
            raise RestoreImpossible(
                f"Nodes of an older version cannot follow a restore: {', '.join(sorted(old))}.",
                hint="Upgrade them first.",
            )
        theirs, ours = found.manifest.model, view.model
        if (theirs.name, theirs.dim, theirs.model_hash) != (ours.name, ours.dim, ours.model_hash):
            raise RestoreImpossible(
                f"Backup {found.manifest.id} has vectors of {theirs.name} ({theirs.dim} values), "
                f"this cluster of {ours.name} ({ours.dim}): they cannot be compared.",
                hint="Restore into a cluster with the same [embedding].",
            )

    # -- merging ----------------------------------------------------------------------------

    async def _merge(self, batch: list[Row], wanted: Wanted, told: Told) -> None:
        """Make the memories of some rows what the backup has: step by step, many at once."""
        seen = await self._look_all(batch)
        how = {"exact": wanted.exact, "keep_deleted": wanted.tenant is None}
        pending: list[Row] = []
        for row in batch:
            step = next_step(row, seen[row.tenant, row.id], **how)
            done = did(seen[row.tenant, row.id], row, step)
            told.counts[done] += 1
            if step is not None:
                pending.append(row)
                if len(told.shown) < _SHOWN_MAX:
                    told.shown.append({"id": format_id(row.id), "event": done})
        if wanted.dry_run:
            return
        races: Counter[bytes] = Counter()
        while pending:
            steps = []
            for row in pending:
                step = next_step(row, seen[row.tenant, row.id], **how)
                if step is not None:
                    steps.append((row, step))
            lost = await self._write(steps, seen)
            pending = [row for row, _ in steps]
            if lost:
                # Somebody was faster: look again, and decide on what is there now.
                races.update(row.id for row in lost)
                given_up = {row.id for row in lost if races[row.id] >= _RACES_MAX}
                told.counts["contested"] += len(given_up)
                pending = [row for row in pending if row.id not in given_up]
                seen |= await self._look_all([row for row in lost if row.id not in given_up])

    async def _write(
        self, steps: list[tuple[Row, Step]], seen: dict[tuple[str, bytes], Seen]
    ) -> list[Row]:
        """Do one step of each row. Returns the rows whose step came too late."""
        now_ms = self._clock.wall_ms()
        groups: dict[tuple[str, str, int], list[tuple[Row, Step]]] = {}
        for row, step in steps:
            shard = self._routing.shard_of_slot(slot_of_id(row.id))
            at_ms = now_ms if step.at_ms is None else step.at_ms
            groups.setdefault((shard, row.tenant, at_ms), []).append((row, step))
        slots = asyncio.Semaphore(_WRITES_AT_ONCE)
        lost: list[Row] = []

        async def write(tenant: str, at_ms: int, part: list[tuple[Row, Step]]) -> None:
            async with slots:
                try:
                    statuses = await self._propose(tenant, at_ms, [step for _, step in part])
                except MapMoved:  # the shard was split: its rows are grouped anew
                    lost.extend(row for row, _ in part)
                    return
            for (row, step), status in zip(part, statuses, strict=True):
                if status == "ok":
                    seen[row.tenant, row.id] = step.after
                else:
                    lost.append(row)

        writing = [
            asyncio.ensure_future(write(tenant, at_ms, part))
            for (_, tenant, at_ms), whole in groups.items()
            for part in _parts(whole)
        ]
        try:
            await asyncio.gather(*writing)
        finally:
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
        return lost

    async def _propose(self, tenant: str, at_ms: int, steps: list[Step]) -> list[str]:
        """The outcome of each operation. The request id comes from the operations, which name the
        versions that they were decided on: the same command twice takes effect once."""
        bare = Write(bytes(16), b"", tenant, at_ms, tuple(step.op for step in steps))
        digest = hashlib.blake2b(encode_write(bare), digest_size=24).digest()
        write = bare._replace(request_id=digest[:16], fingerprint=digest[16:])
        shard = self._routing.shard_of_slot(slot_of_id(steps[0].op.id))
        written = await self._again(lambda deadline: self._writes.propose(shard, write, deadline))
        return [outcome.status for outcome in written.outcomes]

    # -- looking ----------------------------------------------------------------------------

    async def _look_all(self, rows: list[Row]) -> dict[tuple[str, bytes], Seen]:
        groups: dict[tuple[str, str], list[bytes]] = {}
        for row in rows:
            shard = self._routing.shard_of_slot(slot_of_id(row.id))
            groups.setdefault((shard, row.tenant), []).append(row.id)
        found: dict[tuple[str, bytes], Seen] = {}

        async def look(shard: str, tenant: str, ids: list[bytes]) -> None:
            body = {"shard": shard, "tenant": tenant, "ids": ids}
            answers = await self._at_leader(shard, "restore.look", body)
            for key, answer in zip(ids, answers, strict=True):
                found[tenant, key] = Seen(*answer)

        await asyncio.gather(*(look(*place, ids) for place, ids in groups.items()))
        return found

    async def on_look(self, _peer: str, body: dict[str, Any]) -> list[list[Any]]:
        """`restore.look`: [version, is live, hash of the record, hash of the vector] of ids."""
        local = self._routing.check_epoch(body["shard"], body["epoch"])
        await local.group.read_index(deadline=self._clock.monotonic() + body["left_ms"] / 1000)
        answers: list[list[Any]] = []
        for key in body["ids"]:
            version, record, vector = local.shard.inspect(body["tenant"], key)
            hashed = b"" if record is None else record_hash(record)
            answers.append([version, record is not None, hashed, vector_hash(vector)])
        return answers

    async def _delete_others(
        self, tenant: str, owner: str | None, live: set[bytes], wanted: Wanted, told: Told
    ) -> None:
        shard_map = self._routing.current_map()
        shards = list(shard_map.shards) if owner is None else [shard_map.shard_of(tenant, owner).id]
        for shard in shards:
            after: list[Any] | None = None
            while True:
                body = {"shard": shard, "tenant": tenant, "owner": owner, "after": after}
                ids, after = await self._at_leader(shard, "restore.ids", body)
                steps = [
                    Step(Delete(key, version), None, Seen(version + 1, False))
                    for key, version in ids
                    if key not in live
                ]
                told.counts["deleted"] += len(steps)
                for step in steps[: max(0, _SHOWN_MAX - len(told.shown))]:
                    told.shown.append({"id": format_id(step.op.id), "event": "deleted"})
                if not wanted.dry_run:
                    for at in range(0, len(steps), _COMMAND_OPS_MAX):
                        part = steps[at : at + _COMMAND_OPS_MAX]
                        statuses = await self._propose(tenant, self._clock.wall_ms(), part)
                        # Changed since, or gone already: the next run decides anew.
                        told.counts["contested"] += sum(s == "conflict" for s in statuses)
                if after is None:
                    break

    async def on_ids(self, _peer: str, body: dict[str, Any]) -> list[Any]:
        """`restore.ids`: [[id, version], ...] of live memories, and where to go on."""
        local = self._routing.check_epoch(body["shard"], body["epoch"])
        await local.group.read_index(deadline=self._clock.monotonic() + body["left_ms"] / 1000)
        after = body["after"]
        page = local.shard.page(
            body["tenant"],
            body["owner"],
            accept=None,
            after=None if after is None else (after[0], after[1]),
            limit=_IDS_AT_ONCE,
            # Expired ones too: they are kept until they are deleted.
            now_ms=-(1 << 62),
            scan_max=_IDS_AT_ONCE,
        )
        ids = [[stored.id, stored.version] for stored in page.items]
        return [ids, None if page.after is None else list(page.after)]

    async def _at_leader(self, shard: str, method: str, body: dict[str, Any]) -> Any:
        call = self.calls[method]

        def ask(deadline: float) -> Awaitable[Any]:
            async def here(local: LocalShard) -> Any:
                left_ms = int(self._routing.remaining(deadline) * 1000)
                return await call("", {**body, "epoch": local.info.epoch, "left_ms": left_ms})

            async def there(leader: str, info: ShardInfo) -> Any:
                return await self._routing.call(
                    leader, method, {**body, "epoch": info.epoch}, deadline
                )

            return self._routing.at_leader(shard, deadline, here, there)

        return await self._again(ask)

    async def _again(self, ask: Callable[[float], Awaitable[T]]) -> T:
        """A restore takes long enough to see an election, or a moment of too much load."""
        for attempt in range(_TRIES_MAX):
            try:
                return await ask(self._clock.monotonic() + _TRY_S)
            except AgentMemError as error:
                is_final = isinstance(error, MapMoved) or not error.retryable
                if is_final or attempt + 1 == _TRIES_MAX:
                    raise
                await asyncio.sleep(error.retry_after_s or _AGAIN_S)
        raise AssertionError("the last attempt raises")


def _take(rows: Iterator[Row], content: ContentDigest) -> list[Row]:
    batch = []
    for row in rows:
        content.add(row)
        batch.append(row)
        if len(batch) >= _ROWS_AT_ONCE:
            break
    return batch


def _parts(whole: list[tuple[Row, Step]]) -> Iterator[list[tuple[Row, Step]]]:
    part: list[tuple[Row, Step]] = []
    size = 0
    for row, step in whole:
        op = step.op
        cost = 0 if isinstance(op, Delete) else len(op.record) + len(op.vector or b"")
        if part and (len(part) >= _COMMAND_OPS_MAX or size + cost > _COMMAND_BYTES_MAX):
            yield part
            part, size = [], 0
        part.append((row, step))
        size += cost
    if part:
        yield part


async def _on(
    thread: ThreadPoolExecutor, work: Callable[[], T], progress: Progress | None = None
) -> T:
    """Run on the restore's own thread, which is waited for whatever happens."""
    running = asyncio.get_running_loop().run_in_executor(thread, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if progress is not None:
            progress.is_cancelled = True
        await asyncio.gather(running, return_exceptions=True)
        raise
