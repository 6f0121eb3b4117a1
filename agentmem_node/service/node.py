"""The node: everything that runs in one process, put together, started and stopped in order.

data directory (locked) -> journal (recovered) -> link -> Raft host -> membership -> shards
                               the embedding model loads meanwhile
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from agentmem_cluster.errors import (
    AgentMemError,
    ModelUnavailable,
    NotLeader,
    ShuttingDown,
    StateDamaged,
    Unavailable,
)
from agentmem_cluster.journal.journal import Journal
from agentmem_cluster.link.link import Link
from agentmem_cluster.meta import LEVEL, NodeInfo
from agentmem_cluster.raft.host import Host
from agentmem_cluster.raft.settings import RaftSettings
from agentmem_cluster.realtime import RealClock, RealDisk, RealRng
from agentmem_node.config import Config, ConfigError, split_address
from agentmem_node.engine.shard import Shard
from agentmem_node.index.blocks import BlockBudget
from agentmem_node.index.graph import GraphBuilder
from agentmem_node.index.shard_index import ShardIndex
from agentmem_node.index.text_engine import TextEngine
from agentmem_node.model import operations as ops
from agentmem_node.model import requests as rq
from agentmem_node.model.search import Consistency, SearchAnswer
from agentmem_node.observe.snapshot import NodeSnapshot
from agentmem_node.providers.base import EmbeddingProvider
from agentmem_node.providers.registry import identity_of, open_provider
from agentmem_node.security.keys import KeyOwner, KeyTable
from agentmem_node.service.admission import open_record
from agentmem_node.service.backup_parts import CALLS as BACKUP_CALLS
from agentmem_node.service.backup_parts import BackupParts
from agentmem_node.service.backup_work import Backups
from agentmem_node.service.balance import balance_leaders
from agentmem_node.service.certificates import load_authority, load_certificates
from agentmem_node.service.changes import Changes
from agentmem_node.service.contract import Caller
from agentmem_node.service.datadir import DataDir
from agentmem_node.service.fanout import FanOut
from agentmem_node.service.healing import Healing
from agentmem_node.service.join_messages import (
    JoinAnswer,
    JoinRequest,
    JoinTokenKept,
    JoinTokenMade,
    JoinTokenRequest,
)
from agentmem_node.service.join_server import Joins
from agentmem_node.service.membership import Membership
from agentmem_node.service.operations import Operations
from agentmem_node.service.read import Reads
from agentmem_node.service.replicas import Replicas
from agentmem_node.service.rewinding import fetch, origin_entry
from agentmem_node.service.routing import Routing
from agentmem_node.service.scrubbing import Scrubbing
from agentmem_node.service.search import Searches
from agentmem_node.service.status import Status
from agentmem_node.service.survey import Survey
from agentmem_node.service.write import Writes

log = logging.getLogger("agentmem.node")

list_ = list  # within the class, `list` is the method
_START_S_MAX = 60.0
_DISK_CHECK_S = 0.5
# What peers ask of a node; `Node._serve_peers` says by whom it is answered.
_CALLS = (
    "write.propose",
    "write.update",
    "read.get",
    "read.history",
    "read.list",
    "search.statistics",
    "search.candidates",
    "search.records",
    "shard.may_lead",
)


class Node:
    """Implements `agentmem_node.service.contract.NodeService`."""

    def __init__(self, config: Config, *, on_fatal: Callable[[BaseException], None]) -> None:
        self.config = config
        self.node_id = config.node.id
        self.limits = config.limits
        self.clock = RealClock()
        self._rng = RealRng()
        self._on_fatal = on_fatal
        self._keys = KeyTable.from_config(config.security.api_keys)
        self._tasks: list[asyncio.Task[None]] = []
        self._disk_is_full = False
        self._is_leaving = False
        self._data: DataDir | None = None
        self._host: Host | None = None
        self._link: Link | None = None
        self._journal: Journal | None = None
        self._membership: Membership | None = None
        self._replicas: Replicas | None = None
        self._backup_parts: BackupParts | None = None
        self._embedder: EmbeddingProvider | None = None
        self._text: TextEngine | None = None
        # All shards of the node share them: memory for blocks, and the thread that builds graphs.
        self._blocks = BlockBudget(config.search.index_bytes_max)
        self._graphs = GraphBuilder()
        self._may_found = asyncio.Event()

    # -- start ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready to serve on return. Raises DataDirError, ConfigError, WrongModel, AgentMemError."""
        config = self.config
        loading = asyncio.create_task(self._open_provider(), name="embedding-model")
        loading.add_done_callback(self._model_loaded)
        try:
            await self._start_cluster(config)
            await self._wait_for(loading)
        except BaseException:
            loading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await loading
            raise
        self._embedder = loading.result()
        model = identity_of(config.embedding.provider, config.embedding.dim)
        self._writes = Writes(
            self._routing,
            clock=self.clock,
            rng=self._rng,
            limits=self.limits,
            dim=model.dim,
            embedder=self._embedder,
            is_disk_full=lambda: self._disk_is_full,
        )
        fan_out = FanOut(self._routing, self.clock, config.search.hedge_ms / 1000)
        self._reads = Reads(self._routing, fan_out, clock=self.clock, limits=self.limits)
        self._searches = Searches(
            self._routing,
            self._reads,
            clock=self.clock,
            limits=self.limits,
            dim=model.dim,
            embedder=self._embedder,
            settings=config.search,
        )
        self._serve_peers()
        assert self._data is not None and self._membership is not None
        assert self._replicas is not None
        self._backup_parts = BackupParts(
            config,
            self._data.path / "restore",
            self._routing,
            self._writes,
            self._membership,
            self._replicas,
            self._link,
            clock=self.clock,
            rng=self._rng,
            version=Status.VERSION,
        )
        self._backup_parts.start()
        self._operations.backups_at = self._backup_parts.backups.place
        await self._wait_until_ready()

    def _model_loaded(self, loading: asyncio.Task[EmbeddingProvider | None]) -> None:
        if not loading.cancelled() and loading.exception() is None:
            self._may_found.set()

    def _serve_peers(self) -> None:
        if self._link is None:
            return
        writes, reads, searches = self._writes, self._reads, self._searches
        handlers = (
            writes.on_propose,
            writes.on_update,
            reads.on_get,
            reads.on_history,
            reads.on_list,
            searches.on_statistics,
            searches.on_candidates,
            searches.on_records,
            self._on_may_lead,
        )
        for method, handler in zip(_CALLS, handlers, strict=True):
            self._link.register(method, handler)

    async def _not_yet(self, _peer: str, _body: dict[str, Any]) -> None:
        """Until the model is loaded: this node's replicas may lead already, but serve nobody."""
        raise NotLeader(f"Node {self.node_id} is still starting.")

    async def _start_cluster(self, config: Config) -> None:
        path = Path(config.node.data_dir)
        self._data = DataDir.open(path, self.node_id, config.cluster.name)
        disk = RealDisk(path)
        # Recovery reads the whole journal: off the loop, so that Ctrl-C is answered.
        self._journal = await asyncio.to_thread(
            Journal.open,
            disk,
            "journal",
            segment_bytes=config.storage.journal_segment_bytes,
            clock=self.clock,
        )
        if self._journal.recovered.cut_reason:
            log.warning("journal: %s", self._journal.recovered.cut_reason)
        self._link = self._make_link(config)
        if self._link is not None:
            for method in (*_CALLS, *BACKUP_CALLS):
                self._link.register(method, self._not_yet)
        self._routing = Routing(self.node_id, self._link, self.clock)
        self._text = TextEngine(path / "text")
        self._host = Host(
            self.node_id,
            self._journal,
            self._link,
            self.clock,
            self._rng,
            RaftSettings(
                heartbeat_s=config.raft.heartbeat_ms / 1000,
                election_s_min=config.raft.election_ms_min / 1000,
                election_s_max=config.raft.election_ms_max / 1000,
                checkpoint_s=config.storage.checkpoint_ms / 1000,
                queue_commands_max=config.limits.writes_queued_max,
            ),
            on_fatal=self._fatal,
        )
        own = config.cluster.nodes.get(self.node_id)
        record = open_record(disk, self._journal.groups(), self._rng)
        for group, epoch in self._journal.groups():
            held = record.held.get(group)
            if held is None or held.epoch != epoch:
                self._host.core.drop_log(group, epoch)  # a crash came before it was dropped
        model = identity_of(config.embedding.provider, config.embedding.dim)
        self._replicas = Replicas(
            self.node_id,
            path / "shards",
            disk,
            record,
            host=self._host,
            link=self._link,
            routing=self._routing,
            clock=self.clock,
            open_shard=partial(self._open_shard, model.dim),
            copy_bytes_per_s=config.storage.copy_bytes_per_s,
            on_fatal=self._fatal,
        )
        self._replicas.copies.fetch = fetch
        self._replicas.origin_entry = origin_entry
        await self._replicas.find_broken()
        self._membership = Membership(
            config,
            disk=disk,
            record=record,
            host=self._host,
            link=self._link,
            clock=self.clock,
            rng=self._rng,
            routing=self._routing,
            own=NodeInfo(
                peer="" if own is None else own.peer,
                http=(own.http if own is not None else "") or f"http://{config.node.listen}",
                version=Status.VERSION,
                incarnation=record.incarnation,
                zone=config.node.zone,
                level=LEVEL,
            ),
            replicas=self._replicas,
            may_found=self._may_found,
            on_fatal=self._fatal,
        )
        self._membership.require_level = self._require_level
        self._joins = Joins(
            config,
            membership=self._membership,
            link=self._link,
            clock=self.clock,
            rng=self._rng,
            authority=load_authority(config.cluster),
        )
        self._joins.serve()
        self._status = Status(
            config,
            self._routing,
            self._membership,
            self._replicas,
            self._host,
            self._journal,
            self._link,
        )
        self._check_disk(disk)
        self._tasks.append(asyncio.create_task(self._watch_disk(disk), name="disk-watch"))
        # The journal's groups must exist before frames arrive for them.
        self._replicas.start()
        await self._membership.start(model)
        self.changes = Changes(
            self.node_id,
            self._membership,
            self._replicas,
            self._routing,
            self._link,
            self.clock,
        )
        survey = Survey(self.node_id, self._link, self._routing, self._replicas)
        self._operations = Operations(
            self.node_id,
            self._membership,
            self.changes,
            survey,
            self._link,
            self.clock,
            self._rng,
            config.replicas,
        )
        healing = Healing(
            self._membership,
            self._operations,
            survey,
            self.clock,
            config.replicas,
            config.cluster.lost_after_ms / 1000,
        )
        self._scrubbing = Scrubbing(
            self._routing, self.clock, config.storage.scrub_s, self._replicas.found_damaged
        )
        self._replicas.on_suspect = self._scrubbing.again
        for name, work in (
            ("scrubbing", self._scrubbing.run()),
            ("changes", self.changes.run()),
            ("operations", self._operations.run()),
            ("healing", healing.run()),
        ):
            self._tasks.append(asyncio.create_task(work, name=name))
        self._tasks.append(
            asyncio.create_task(
                balance_leaders(self.node_id, self._membership, self._routing, self.clock),
                name="leader-balance",
            )
        )
        await self._host.start()
        if self._link is not None:
            try:
                await self._link.start()
            except OSError as error:
                raise ConfigError(
                    f"Cannot listen for other nodes on {config.peer_listen}: {error}. Stop what "
                    "uses the port, or choose another with --set node.peer_listen=HOST:PORT."
                ) from error

    def _make_link(self, config: Config) -> Link | None:
        if not config.has_link:
            return None
        cluster = config.cluster
        tls = load_certificates(cluster, self.node_id)
        listen = config.peer_listen
        assert listen is not None
        peers = {name: peer.peer for name, peer in cluster.nodes.items() if name != self.node_id}
        return Link(
            self.node_id,
            split_address(listen, "node.peer_listen"),
            peers,
            tls,
            self.clock,
            cluster_id=cluster.name,
            level=LEVEL,
        )

    def _require_level(self, level: int) -> None:
        """An older version must neither run on this data from now on nor be a peer. OSError."""
        if self._data is not None:
            self._data.require(level)
        if self._link is not None:
            self._link.require_level(level)

    async def _open_provider(self) -> EmbeddingProvider | None:
        embedding = self.config.embedding
        try:
            return await open_provider(
                embedding.provider,
                threads=embedding.threads or 1,
                cache=None if embedding.model_dir is None else Path(embedding.model_dir),
            )
        except ModelUnavailable as error:
            raise ModelUnavailable(
                error.message,
                hint=f"{error.hint} Or run with `--set embedding.provider=none`: searches by "
                "words only, and vectors that clients bring.".strip(),
            ) from error

    async def _wait_for(self, loading: asyncio.Task[Any]) -> None:
        """The model and the first view of the cluster, whichever takes longer."""
        assert self._membership is not None
        viewing = asyncio.create_task(self._membership.wait_view(_START_S_MAX))
        try:
            # A missing model must be said at once, not after a minute without a quorum.
            await asyncio.wait({loading, viewing}, return_when=asyncio.FIRST_EXCEPTION)
            if loading.done():
                loading.result()
            await viewing
            await loading
        except TimeoutError:
            raise Unavailable(
                f"No majority of the cluster was reached within {_START_S_MAX:.0f} s.",
                hint="Start the other nodes, and check their addresses under [cluster.nodes].",
            ) from None
        finally:
            viewing.cancel()

    async def _wait_until_ready(self) -> None:
        """Serve only once the local replicas have caught up, but not for ever: a shard whose other
        replicas are down must not keep this node's other shards from being served."""
        deadline = self.clock.monotonic() + 5.0
        while self.clock.monotonic() < deadline and not self._status.ready()[0]:
            await asyncio.sleep(0.02)
        # What rotted while the node was down is found before anybody is answered by it; of shards
        # that take longer, soon after.
        await self._scrubbing.wait_once(deadline - self.clock.monotonic())

    # -- shards ---------------------------------------------------------------------------

    def _open_shard(self, dim: int, shard_id: str, folder: Path) -> Shard:
        return Shard.open(
            folder,
            shard_id,
            dim=dim,
            map_size=self.config.storage.map_bytes,
            index_factory=partial(
                ShardIndex,
                shard_id=shard_id,
                text_engine=self._text,
                dim=dim,
                budget=self._blocks,
                graphs=self._graphs,
            ),
        )

    # -- the disk -------------------------------------------------------------------------

    def _check_disk(self, disk: RealDisk) -> None:
        free = disk.free_bytes()
        is_full = free < self.limits.disk_free_bytes_min
        if is_full != self._disk_is_full:
            log.warning(
                "%s bytes free on the disk: %s",
                f"{free:,}",
                "writes are refused" if is_full else "writes are accepted again",
            )
        self._disk_is_full = is_full
        self._status.disk_free_bytes = free
        self._status.disk_is_full = is_full

    async def _watch_disk(self, disk: RealDisk) -> None:
        while True:
            await asyncio.sleep(_DISK_CHECK_S)
            try:
                self._check_disk(disk)
            except OSError as error:
                # What was known last stands; the journal notices by itself when writing fails.
                log.warning("cannot ask how much of the disk is free: %s", error)

    def _fatal(self, error: BaseException) -> None:
        log.critical("this node cannot go on: %s", error)
        self._on_fatal(error)

    # -- stop -----------------------------------------------------------------------------

    async def _on_may_lead(self, _peer: str, body: dict[str, Any]) -> None:
        """`shard.may_lead`: a peer is about to give this node a leadership."""
        if self._replicas is not None and body.get("shard") in self._replicas.damaged:
            raise StateDamaged(f"The replica of {body['shard']} on {self.node_id} is damaged.")
        if self._is_leaving:
            raise ShuttingDown(f"Node {self.node_id} is shutting down.")

    async def hand_over(self) -> None:
        """Give leaderships away, so that writes go on elsewhere without an election.

        From now on peers give none back.
        """
        self._is_leaving = True
        if self._host is not None:
            await self._host.hand_over()

    async def stop(self, *, clean: bool) -> None:
        """Stop everything that was started. `clean`: also make the shards durable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._backup_parts is not None:
            await self._backup_parts.stop()
        if self._membership is not None:
            await self._membership.stop()
        if self._replicas is not None:
            await self._replicas.stop()
        if self._host is not None:
            await self._host.stop(transfer=False)
        if self._link is not None:
            await self._link.close()
        if self._replicas is not None:
            self._replicas.close()
        self._graphs.close()
        if self._text is not None:
            self._text.close()
        if self._journal is not None:
            self._journal.close()
        if self._embedder is not None:
            await self._embedder.close()
        if self._data is not None:
            self._data.close()

    def _once(self, caller: Caller) -> Caller:
        """With a request id, so that a write that is begun again takes effect once."""
        if caller.request_id is not None:
            return caller
        return replace(caller, request_id=self._rng.token(16))

    # -- NodeService ----------------------------------------------------------------------

    @property
    def backups(self) -> Backups:
        assert self._backup_parts is not None
        return self._backup_parts.backups

    async def add(
        self, caller: Caller, items: Sequence[rq.AddRequest | AgentMemError]
    ) -> rq.AddAnswer:
        caller = self._once(caller)
        return await self._routing.through_moves(
            caller.deadline, lambda: self._writes.add(caller, items)
        )

    async def get(
        self, caller: Caller, memory_id: str, consistency: Consistency, token: str | None
    ) -> rq.MemoryAnswer:
        return await self._routing.through_moves(
            caller.deadline, lambda: self._reads.get(caller, memory_id, consistency, token)
        )

    async def update(
        self, caller: Caller, memory_id: str, change: rq.UpdateRequest
    ) -> rq.MemoryAnswer:
        caller = self._once(caller)
        return await self._routing.through_moves(
            caller.deadline, lambda: self._writes.update(caller, memory_id, change)
        )

    async def delete(
        self, caller: Caller, memory_id: str, expected_version: int | None
    ) -> rq.DeleteAnswer:
        caller = self._once(caller)
        return await self._routing.through_moves(
            caller.deadline, lambda: self._writes.delete(caller, memory_id, expected_version)
        )

    async def delete_many(self, caller: Caller, ids: list[str]) -> rq.DeleteAnswer:
        caller = self._once(caller)
        return await self._routing.through_moves(
            caller.deadline, lambda: self._writes.delete_many(caller, ids)
        )

    async def list(self, caller: Caller, query: rq.ListQuery) -> rq.ListAnswer:
        return await self._routing.through_moves(
            caller.deadline, lambda: self._reads.list_page(caller, query)
        )

    async def history(self, caller: Caller, memory_id: str) -> rq.HistoryAnswer:
        return await self._routing.through_moves(
            caller.deadline, lambda: self._reads.history(caller, memory_id)
        )

    async def search(self, caller: Caller, request: rq.SearchRequest) -> SearchAnswer:
        return await self._routing.through_moves(
            caller.deadline, lambda: self._searches.search(caller, request)
        )

    def encode_cursor(self, request: rq.SearchRequest, answer: SearchAnswer) -> str | None:
        return self._searches.encode_cursor(request, answer)

    async def plan(self, caller: Caller, wish: ops.OperationWish) -> ops.OperationPlan:
        return await self._operations.plan(wish)

    async def begin_operation(self, caller: Caller, wish: ops.OperationWish) -> ops.Operation:
        return await self._operations.begin(caller, wish)

    async def operations(self, caller: Caller) -> list_[ops.Operation]:
        return await self._operations.listed()

    async def operation(self, caller: Caller, operation_id: str) -> ops.Operation:
        return await self._operations.get(operation_id)

    async def control_operation(
        self, caller: Caller, operation_id: str, action: str
    ) -> ops.Operation:
        return await self._operations.control(operation_id, action)

    async def check_cluster(self, caller: Caller) -> list_[ops.Finding]:
        return await self._operations.check()

    async def make_join_token(self, caller: Caller, wish: JoinTokenRequest) -> JoinTokenMade:
        return await self._joins.make_token(wish)

    async def join_tokens(self, caller: Caller) -> list_[JoinTokenKept]:
        return await self._joins.tokens()

    async def revoke_join_token(self, caller: Caller, token_id: str) -> JoinTokenKept:
        return await self._joins.revoke_token(token_id)

    async def join(self, request: JoinRequest) -> JoinAnswer:
        return await self._joins.join(request)

    def cluster_view(self) -> dict[str, Any]:
        return self._status.cluster_view()

    def metrics_snapshot(self) -> NodeSnapshot:
        return self._status.snapshot(self._embedder)

    def ready(self) -> tuple[bool, dict[str, Any]]:
        return self._status.ready()

    def owner_of_key(self, key_hash: bytes) -> KeyOwner | None:
        return self._keys.find(key_hash)

    def has_keys(self) -> bool:
        return len(self._keys) > 0

    def keys_required(self) -> bool:
        return self.config.keys_required
