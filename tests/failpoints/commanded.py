"""The command `agentmem`, with one more door: tests arm failpoints and begin operations by it.

The node is the real one. The door is a Unix socket beside its data directory that takes one JSON
object a connection and answers one.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import agentmem_node.run
from agentmem_cluster.epochs.record import LocalRecord
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.failpoints import arm
from agentmem_cluster.raft.api import GROUP_META
from agentmem_cluster.realtime import RealDisk, RealFaults
from agentmem_node.cli.main import main
from agentmem_node.model.operations import OperationWish
from agentmem_node.service.contract import Caller
from agentmem_node.service.node import Node

DOOR = "door"


class CommandedNode(Node):
    async def start(self) -> None:
        door = Path(self.config.node.data_dir).parent / DOOR
        door.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve_one, door)
        self._tasks.append(asyncio.create_task(server.serve_forever(), name="door"))
        await super().start()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._command(json.loads(await reader.readline()))
        except AgentMemError as error:
            answer = {"error": str(error)}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
        writer.close()

    async def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        caller = Caller("default", "k", self.clock.monotonic() + 10.0, None, b"\0" * 8)
        match command["do"]:
            case "arm":
                arm(command["plan"], RealFaults())
                return {}
            case "begin":
                wish = OperationWish(**command["wish"])
                return {"id": (await self.begin_operation(caller, wish)).id}
            case "check":
                findings = await self.check_cluster(caller)
                return {"wrong": [f"{f.name}: {f.message}" for f in findings if not f.ok]}
            case "look":
                return self._look()
            case other:
                raise ValueError(other)

    def _look(self) -> dict[str, Any]:
        """What this node believes: of the map, of what is going on, and of its own part in it."""
        assert self._membership is not None
        view = self._membership.view
        record = LocalRecord.load(RealDisk(self.config.node.data_dir))
        held = {} if record is None else record.held
        if view is None:
            return {"is_founded": False}
        return {
            "is_founded": True,
            "leads_meta": self._membership.leads,
            "map": {s.id: [s.epoch, sorted(s.members)] for s in view.map.shards.values()},
            "changes": sorted(view.changes),
            "operations": {o.id: o.state for o in self._operations.stored(view)},
            "here": {shard: local.info.epoch for shard, local in self._routing.local.items()},
            "held": {shard: one.epoch for shard, one in held.items() if shard != GROUP_META},
            "leads": sorted(s for s, local in self._routing.local.items() if local.group.is_leader),
        }


if __name__ == "__main__":
    agentmem_node.run.Node = CommandedNode  # type: ignore[misc]
    main()
