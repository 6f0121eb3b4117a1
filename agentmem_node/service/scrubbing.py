"""Every row of every replica here is looked at: soon after it is served, and then now and then.

What flips on a disk is found by whoever reads it; what nobody reads for months is found by this,
while the other replicas are still whole (`agentmem_node.storage.sums`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.runtime import Clock
from agentmem_node.engine.shard import Shard
from agentmem_node.service.routing import LocalShard, Routing
from agentmem_node.storage.checkpoint import RecordDamaged

log = logging.getLogger("agentmem.scrub")

_LOOK_S: Final = 1.0
# Between two steps of a millisecond: who is served comes first. Before anybody is, 100,000
# memories take half a second.
_REST_S: Final = 0.002


class Scrubbing:
    def __init__(
        self,
        routing: Routing,
        clock: Clock,
        every_s: float,
        on_damaged: Callable[[str, Shard, RecordDamaged], None],
    ) -> None:
        """`every_s`: 0 for never, unless `again` asks. `on_damaged(shard, its state, error)` may be
        called again for a replica that is still there the next time."""
        self._routing = routing
        self._clock = clock
        self._every_s = every_s
        self._on_damaged = on_damaged
        self._seen_s: dict[tuple[str, int], float] = {}  # by shard and epoch
        self._once = asyncio.Event()
        self._rest_s = 0.0
        self._asked: set[str] = set()

    async def wait_once(self, seconds: float) -> None:
        """Until every replica that was here at the start was looked at, or for so long."""
        if self._every_s > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._once.wait()
        self._rest_s = _REST_S

    def again(self, shard: str) -> None:
        """Look at a shard soon: what was copied of it is damaged."""
        self._asked.add(shard)

    async def run(self) -> None:
        while True:
            here = {(local.info.id, local.info.epoch): local for local in self._local()}
            self._seen_s = {key: at_s for key, at_s in self._seen_s.items() if key in here}
            for key, local in here.items():
                at_s = self._seen_s.get(key)
                now_s = self._clock.monotonic()
                is_due = at_s is None or now_s - at_s >= self._every_s
                if (is_due and self._every_s > 0) or key[0] in self._asked:
                    self._asked.discard(key[0])
                    self._seen_s[key] = now_s
                    await self._look_at(local)
            self._once.set()
            await asyncio.sleep(_LOOK_S)

    def _local(self) -> list[LocalShard]:
        return list(self._routing.local.values())

    async def _look_at(self, local: LocalShard) -> None:
        shard, begun_s, rows = local.info.id, self._clock.monotonic(), 0
        try:
            snapshot = local.shard.open_snapshot()
        except (AgentMemError, OSError) as error:
            log.debug("cannot look at %s now: %s", shard, error)
            return
        try:
            steps = local.shard.scrub(snapshot)
            while (seen := await asyncio.to_thread(next, steps, None)) is not None:
                rows += seen
                await asyncio.sleep(self._rest_s)
        except RecordDamaged as error:
            self._on_damaged(shard, local.shard, error)
        except OSError as error:
            log.debug("%s has left this node: %s", shard, error)
        except Exception:
            log.exception("%s could not be looked at", shard)  # the others can, and tomorrow
        else:
            took_s = self._clock.monotonic() - begun_s
            log.debug("%s is whole: %s rows in %.1f s", shard, f"{rows:,}", took_s)
        finally:
            snapshot.close()
