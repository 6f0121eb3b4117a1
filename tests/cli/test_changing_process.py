"""Operators' commands on a real cluster: shards change hands under load and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import agentmem_client as client
from agentmem_node.cli.devcluster import DevCluster
from agentmem_node.cli.exits import Exit

pytestmark = pytest.mark.process

LEXICAL = {"embedding.provider": "none", "embedding.dim": 0, "cluster.shards": 4}
AGENTMEM = [sys.executable, "-m", "agentmem_node.cli.main"]
COMMAND_S_MAX = 120.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    with DevCluster(tmp_path_factory.mktemp("dev"), nodes=4, settings=LEXICAL) as made:
        yield made


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def agentmem(cluster: DevCluster) -> Callable[..., Ran]:
    """`agentmem cluster ARGUMENTS`, as a process, through node n2."""

    def call(*arguments: str) -> Ran:
        done = subprocess.run(
            [*AGENTMEM, "cluster", *arguments, "--url", cluster.urls[1]],
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)

    return call


def holders(agentmem: Callable[..., Ran]) -> dict[str, list[str]]:
    return {shard["id"]: shard["members"] for shard in agentmem("status").json["shards"]}


def sound(agentmem: Callable[..., Ran]) -> None:
    """Waits until every invariant holds: leaders go home, replicas catch up."""
    deadline = time.monotonic() + 30.0
    while (found := agentmem("check")).code != Exit.OK:
        assert time.monotonic() < deadline, found.out
    assert len(found.json["findings"]) >= 5


class Writer:
    """Adds memories, one after the other, until it is told to stop."""

    def __init__(self, urls: list[str]) -> None:
        self.stored: dict[str, str] = {}
        self.failure: BaseException | None = None
        self._urls = urls
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 30.0
        while len(self.stored) <= 20 and self.failure is None and time.monotonic() < deadline:
            time.sleep(0.05)  # what was to be done was quick: some more, to be judged
        self._stop.set()
        self._thread.join(30.0)

    def _write(self) -> None:
        try:
            with client.Client(self._urls) as memory:
                number = 0
                while not self._stop.wait(0.05):
                    number += 1
                    text = f"Parcel {number} is on shelf {number % 7}"
                    (stored,) = memory.add(text, user_id=f"user{number % 40}").memories
                    self.stored[stored.id] = text
        except BaseException as error:
            self.failure = error


def all_there(cluster: DevCluster, writer: Writer) -> None:
    assert writer.failure is None
    assert len(writer.stored) > 20
    for url in cluster.urls:
        with client.Client(url) as memory:
            for memory_id, text in writer.stored.items():
                assert memory.get(memory_id).content == text


def test_a_node_is_emptied_and_filled_again_while_memories_are_written(
    cluster: DevCluster, agentmem: Callable[..., Ran]
) -> None:
    before = holders(agentmem)
    moved = [shard for shard, members in before.items() if "n4" in members]
    assert moved
    with Writer(cluster.urls) as writer:
        drained = agentmem("drain", "n4", "--yes")
        assert drained.code == Exit.OK, drained.err
        told = drained.json
        assert sorted(step["shard"] for step in told["plan"]["steps"]) == sorted(moved)
        assert {step["state"] for step in told["operation"]["steps"]} == {"done"}
        assert not any("n4" in members for members in holders(agentmem).values())
        state = {node["id"]: node for node in agentmem("status").json["nodes"]}
        assert state["n4"]["state"] == "draining" and state["n4"]["up"]
        assert agentmem("drain", "n4", "--undo", "--yes").code == Exit.OK
        spread = agentmem("rebalance", "--yes")
        assert spread.code == Exit.OK, spread.err
        assert any("n4" in members for members in holders(agentmem).values())
    all_there(cluster, writer)
    sound(agentmem)


def test_a_shard_is_moved_while_memories_are_written(
    cluster: DevCluster, agentmem: Callable[..., Ran]
) -> None:
    before = holders(agentmem)
    shard, members = next((s, m) for s, m in before.items() if len(m) == 3)
    (newcomer,) = {"n1", "n2", "n3", "n4"} - set(members)
    leaves = members[0]
    with Writer(cluster.urls) as writer:
        moved = agentmem("move", shard, newcomer, "--away-from", leaves, "--yes")
        assert moved.code == Exit.OK, moved.err
        assert set(holders(agentmem)[shard]) == {*members, newcomer} - {leaves}
        again = agentmem("move", shard, newcomer, "--yes")
        assert again.code == Exit.USAGE and "already" in again.err
    all_there(cluster, writer)
    sound(agentmem)


def test_a_shard_is_split_while_memories_are_written_and_each_is_in_one_half(
    cluster: DevCluster, agentmem: Callable[..., Ran]
) -> None:
    before = holders(agentmem)
    with Writer(cluster.urls) as writer:
        cut = agentmem("split", "s01", "--yes")
        assert cut.code == Exit.OK, cut.err
        after = holders(agentmem)
        (fresh,) = set(after) - set(before)
        assert sorted(after[fresh]) == sorted(after["s01"])
    all_there(cluster, writer)
    with client.Client(cluster.urls) as memory:
        listed = [found.id for found in memory.list()]
        assert len(listed) == len(set(listed))
        found = [hit.id for hit in memory.search("parcel", top_k=500)]
        assert len(found) == len(set(found))
    sound(agentmem)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("move", "s0", "n4", "--yes"), Exit.NOT_FOUND, "Did you mean 's0"),
        (("drain", "n44", "--yes"), Exit.NOT_FOUND, "Did you mean 'n4'?"),
        (("split", "s00", "--at", "16383", "--yes"), Exit.USAGE, "cannot be split at"),
        (("stop", "drain-00000000"), Exit.NOT_FOUND, "no operation"),
        (("drain", "n4"), Exit.USAGE, "--yes"),
    ],
)
def test_bad_input_changes_nothing(
    agentmem: Callable[..., Ran], arguments: tuple[str, ...], code: Exit, said: str
) -> None:
    def seen() -> list[tuple[str, str]]:
        listed = agentmem("operations").json["operations"]
        return [(operation["id"], operation["state"]) for operation in listed]

    before = seen()
    refused = agentmem(*arguments)
    assert refused.code == code, refused.err
    assert said in refused.err
    assert seen() == before
