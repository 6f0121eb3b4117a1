"""Whole nodes, with their links, journals and shards, on one event loop: everything but HTTP."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.link.ca import create_ca, issue
from agentmem_cluster.meta import LEVEL, NodeInfo, put_node
from agentmem_cluster.realtime import RealDisk, RealRng
from agentmem_node.config import Config, load
from agentmem_node.model import requests as rq
from agentmem_node.service.admission import open_record
from agentmem_node.service.contract import Caller
from agentmem_node.service.node import Node

WAIT_S = 20.0


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Cluster:
    """`founders` found it; the others of `names` have no replica until they are given some."""

    def __init__(
        self, folder: Path, names: list[str], *, founders: int = 3, shards: int = 2
    ) -> None:
        self.folder = folder
        self.names = names
        self.founders = names[:founders]
        self.shards = shards
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.nodes: dict[str, Node] = {}
        self.failures: list[BaseException] = []
        self.overrides: dict[str, Any] = {}
        create_ca(folder / "certs", "agentmem")
        for name in names:
            issue(folder / "certs", name)

    def config(self, name: str) -> Config:
        known = self.founders if name in self.founders else [*self.founders, name]
        certs = self.folder / "certs"
        return load(
            environment={},
            overrides={
                "node.id": name,
                "node.data_dir": str(self.folder / name),
                "node.listen": "127.0.0.1:7700",
                "cluster.nodes": {one: {"peer": f"127.0.0.1:{self.ports[one]}"} for one in known},
                "cluster.join": name not in self.founders,
                "cluster.shards": self.shards,
                "cluster.ca_cert": str(certs / "ca.crt"),
                "cluster.cert": str(certs / f"{name}.crt"),
                "cluster.key": str(certs / f"{name}.key"),
                "embedding.provider": "none",
                "embedding.dim": 0,
                **self.overrides,
            },
        ).config

    async def admit(self, name: str) -> None:
        """What `agentmem serve --join` has the cluster do before the new node starts."""
        (self.folder / name).mkdir(exist_ok=True)
        record = open_record(RealDisk(self.folder / name), [], RealRng())
        info = NodeInfo(
            f"127.0.0.1:{self.ports[name]}", "", "", incarnation=record.incarnation, level=LEVEL
        )
        member = self.any_node()._membership
        assert member is not None
        assert (await member.propose(put_node(name, info))).ok
        await member.tell_all()

    async def start(self, *names: str) -> None:
        made = {name: Node(self.config(name), on_fatal=self.failures.append) for name in names}
        self.nodes |= made
        await asyncio.gather(*(node.start() for node in made.values()))
        await self.until(
            lambda: all(
                node._routing.is_connected(name)
                for node in self.nodes.values()
                for name in self.nodes
            ),
            "every node is connected to every other",
        )

    async def stop(self, *names: str) -> None:
        for name in names or tuple(self.nodes):
            node = self.nodes.pop(name)
            await node.hand_over()
            await node.stop(clean=True)

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while not condition():
            if self.failures:
                raise self.failures[0]
            assert asyncio.get_running_loop().time() < deadline, f"timed out: {what}"
            await asyncio.sleep(0.005)

    def any_node(self) -> Node:
        return next(iter(self.nodes.values()))

    def meta_leader(self) -> Node | None:
        return next((n for n in self.nodes.values() if n._membership and n._membership.leads), None)

    def caller(self, node: Node, request_id: bytes | None = None) -> Caller:
        return Caller("default", "k", node.clock.monotonic() + 10.0, request_id, b"\0" * 8)

    async def add(self, user: str, text: str, *, through: Node | None = None) -> str:
        node = through or self.any_node()
        request_id = os.urandom(16)
        items = [rq.AddRequest(content=text, user_id=user)]
        answer = await self._as_a_client(lambda: node.add(self.caller(node, request_id), items))
        memory_id = answer.results[0].id
        assert memory_id is not None, answer
        return str(memory_id)

    async def read(self, memory_id: str, *, through: Node | None = None) -> Any:
        node = through or self.any_node()
        return await self._as_a_client(
            lambda: node.get(self.caller(node), memory_id, "linearizable", None)
        )

    async def delete(self, memory_id: str) -> None:
        node, request_id = self.any_node(), os.urandom(16)
        await self._as_a_client(lambda: node.delete(self.caller(node, request_id), memory_id, None))

    async def _as_a_client(self, attempt: Callable[[], Awaitable[Any]]) -> Any:
        """Again, while the answer is that it may work in a moment: this machine may be busy."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while True:
            try:
                return await attempt()
            except AgentMemError as error:
                if not error.retryable or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)


def run(scenario: Callable[[], Any], seconds: float = 60.0) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await scenario()

    asyncio.run(bounded())
