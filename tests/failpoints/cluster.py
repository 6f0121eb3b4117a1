"""Real processes that end at a failpoint, and clients that remember what was acknowledged."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from agentmem_node.cli.devcluster import DevCluster
from tests.failpoints.commanded import DOOR

PROGRAM = (sys.executable, str(Path(__file__).with_name("commanded.py")))
SETTINGS = {
    "embedding.provider": "none",
    "embedding.dim": 0,
    "storage.checkpoint_ms": 300,
    "storage.journal_segment_bytes": 1 << 20,
}
# `make failpoints` sets it: every point, not only one of each kind.
IS_LONG = os.environ.get("AGENTMEM_TEST_FAILPOINTS") == "all"
REQUEST_S = 4.0
SOUND_S = 20.0
CRASH_S = 20.0
_T = TypeVar("_T")


def until(look: Callable[[], _T | None], seconds: float, what: Callable[[], str] | str) -> _T:
    """What `look` returns as soon as that is true. AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        if time.monotonic() >= deadline:
            said = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:g} s: {said}")
        time.sleep(0.02)
    return found


class FaultyCluster(DevCluster):
    """A cluster whose nodes have the door of `commanded`."""

    def __init__(
        self,
        data: Path,
        nodes: int,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            data,
            nodes=nodes,
            settings={**SETTINGS, **settings},
            environment=environment,
            program=PROGRAM,
        )

    @property
    def names(self) -> list[str]:
        return [node.id for node in self.nodes]

    def command(self, name: str, do: str, **fields: Any) -> dict[str, Any]:
        """Raises OSError when the node is not there, or ends over it."""
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(12.0)
            door.connect(str(self.node(name).directory / DOOR))
            door.sendall(json.dumps({"do": do, **fields}).encode() + b"\n")
            with door.makefile("rb") as answer:
                line = answer.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError(f"{name} ended before it answered")
        found: dict[str, Any] = json.loads(line)
        return found

    def views(self) -> dict[str, dict[str, Any]]:
        """What each node that can be asked believes."""
        found = {}
        for name in self.names:
            try:
                view = self.command(name, "look")
            except OSError:
                continue
            if view["is_founded"]:
                found[name] = view
        return found

    def leader_of(self, shard: str) -> str | None:
        return next((n for n, view in self.views().items() if shard in view["leads"]), None)

    def crashed(self, name: str, point: str) -> bool:
        """Whether the node ended, which it may have done only at `point`."""
        if self.is_running(name):
            return False
        said = self.node(name).log.read_text(errors="replace")
        assert f"failpoint {point}: crash" in said, f"{name} ended elsewhere: {said[-2_000:]}"
        for crash in self.crashes():
            assert crash.exit_code == -signal.SIGKILL, crash
        return True

    def disarm(self, name: str) -> None:
        """A node that ends over it was armed for too long: that is what it was armed for."""
        with suppress(OSError):
            self.command(name, "arm", plan="")

    def ends_at(self, name: str, point: str) -> None:
        until(lambda: self.crashed(name, point), CRASH_S, f"{name} passes {point}")

    def met(self, name: str, point: str) -> None:
        """Wait until the node came by a point that is armed with an error."""
        log = self.node(name).log
        until(
            lambda: f"failpoint {point}: an error" in log.read_text(errors="replace"),
            CRASH_S,
            f"{name} passes {point}",
        )

    def any_ends_at(self, point: str) -> str:
        """The first node that does."""
        return until(
            lambda: next((name for name in self.names if self.crashed(name, point)), None),
            CRASH_S,
            f"a node passes {point}",
        )

    def soundly(self) -> None:
        """Wait until everybody serves one map, nothing is going on, and every invariant holds.

        To be called when nothing is written: replicas are compared.
        """
        said: list[Any] = []

        def sound() -> bool:
            views = self.views()
            said[:] = [views]
            if set(views) != set(self.names):
                return False
            first = next(iter(views.values()))
            for name, view in views.items():
                if view["changes"] or view["map"] != first["map"]:
                    return False
                if "running" in view["operations"].values():
                    return False
                mine = {s: epoch for s, (epoch, nodes) in view["map"].items() if name in nodes}
                # Served, and on its disk: what only memory knows, the next crash would undo.
                if view["here"] != mine or view["held"] != mine:
                    return False
            for name in self.names:
                said.append(self.command(name, "check"))
                if said[-1].get("error") or said[-1]["wrong"]:
                    return False
            leaders = [shard for view in views.values() for shard in view["leads"]]
            return sorted(leaders) == sorted(first["map"])

        until(sound, SOUND_S, lambda: f"one serving epoch of each shard, all well: {said}")


class Load:
    """Clients that add and retry under one key, and remember what was acknowledged.

    Owners are named after `name`, so that each test finds its own.
    """

    def __init__(self, urls: list[str], name: str, *, clients: int = 3, pad: int = 600) -> None:
        self.acknowledged: dict[str, str] = {}
        self.owners = [f"{name}-{number}" for number in range(clients)]
        self._urls = urls
        self._pad = "x" * pad
        self._stop = threading.Event()
        self._errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(owner,), daemon=True) for owner in self.owners
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.acknowledged) >= 10, 20, "the first writes")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"
        if self._errors:
            raise self._errors[0]

    def more(self, count: int, seconds: float = 15.0) -> None:
        """Wait for that many further writes to be acknowledged: the cluster serves."""
        wanted = len(self.acknowledged) + count
        until(lambda: len(self.acknowledged) >= wanted, seconds, "writes go on")

    def _run(self, owner: str) -> None:
        try:
            self._write(owner)
        except BaseException as error:
            self._errors.append(error)

    def _write(self, owner: str) -> None:
        chance = random.Random(owner)
        number = 0
        while not self._stop.is_set():
            number += 1
            text = f"{owner} {number} {self._pad}"
            while not self._stop.is_set():
                try:
                    memory_id = self._add(chance.choice(self._urls), owner, text, number)
                except OSError as error:
                    if getattr(error, "code", 503) < 500:
                        raise
                    self._stop.wait(0.02)
                    continue
                self.acknowledged[memory_id] = text
                break

    def _add(self, url: str, owner: str, text: str, number: int) -> str:
        headers = {"Idempotency-Key": f"{owner}-{number}"}
        document = {"content": text, "user_id": owner}
        answer = ask("POST", f"{url}/api/v1/memories", document, headers)
        memory_id: str = answer["results"][0]["id"]
        return memory_id

    def nothing_is_lost(self, urls: list[str]) -> None:
        """Every node knows all that was acknowledged, and each memory once."""
        assert self.acknowledged
        for url in urls:
            for owner in self.owners:
                stored = list(contents(url, owner))
                wanted = {t for t in self.acknowledged.values() if t.startswith(owner + " ")}
                assert len(stored) == len(set(stored)), f"{url}: a retried write took effect twice"
                lost = sorted(text[:40] for text in wanted - set(stored))
                assert not lost, f"{url}: acknowledged and lost: {lost[:5]} of {len(lost)}"


def ask(
    method: str, url: str, document: object = None, headers: dict[str, str] | None = None
) -> Any:
    call = urllib.request.Request(
        url,
        data=None if document is None else json.dumps(document).encode(),
        method=method,
        headers={
            "Content-Type": "application/json",
            "X-AgentMem-Deadline-Ms": str(int(REQUEST_S * 1000)),
            **(headers or {}),
        },
    )
    with urllib.request.urlopen(call, timeout=REQUEST_S + 3.0) as answer:
        return json.loads(answer.read())


def contents(url: str, owner: str) -> Iterator[str]:
    cursor = ""
    while True:
        query = f"user_id={urllib.parse.quote(owner)}&limit=500{cursor}"
        page = ask("GET", f"{url}/api/v1/memories?{query}")
        yield from (memory["content"] for memory in page["results"])
        if page["next_cursor"] is None:
            return
        cursor = f"&cursor={page['next_cursor']}"


@contextmanager
def ended(cluster: FaultyCluster) -> Iterator[FaultyCluster]:
    """A cluster that was not started yet; it is stopped, whatever happens."""
    try:
        yield cluster
    finally:
        cluster.stop()
