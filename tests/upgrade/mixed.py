"""A cluster whose nodes run the previous release or the working tree, each as it is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from agentmem_node.cli.devcluster import DevCluster, log_tail
from agentmem_node.cli.devlayout import NodeFiles
from tests.upgrade.previous import Release

WAIT_S = 60.0

# The files are those of the older release: an upgrade finds its settings and its certificates.
_PREPARE = """
import json, sys
from pathlib import Path
from agentmem_node.cli.devlayout import layout, prepare
data, count, port, name, settings = sys.argv[1:]
prepare(Path(data), layout(Path(data), int(count), int(port)), name, json.loads(settings))
"""


class MixedCluster(DevCluster):
    """`old`: the numbers of the nodes that run the previous release at first."""

    def __init__(
        self,
        data: Path,
        release: Release,
        *,
        nodes: int,
        old: set[int],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__(data, nodes=nodes, settings=settings)
        self._release = release
        self.old = {self.node(number).id for number in old}

    def change(self, number: int | str, *, to_old: bool, wait_s: float = WAIT_S) -> None:
        """Stop a node as an operator does, and start the other version on its data."""
        node = self.node(number)
        code = self.terminate(node.id)
        assert code == 0, f"{node.id} ended with {code}: {log_tail(node)}"
        self.begin(node.id, old=to_old, wait_s=wait_s)

    def begin(self, number: int | str, *, old: bool, wait_s: float = WAIT_S) -> None:
        """Start a version of a node that does not run."""
        node = self.node(number)
        (self.old.add if old else self.old.discard)(node.id)
        self.restart(node.id, wait_s=wait_s)

    def wait_for_end(self, number: int | str, within_s: float) -> tuple[int, str]:
        """(exit code, the end of its log) of a node that ends by itself."""
        node = self.node(number)
        until(lambda: not self.is_running(node.id), f"the end of {node.id}", within_s)
        (crash,) = [crash for crash in self.crashes() if crash.node == node.id]
        return crash.exit_code, crash.log_tail

    # -- what they say ----------------------------------------------------------------------

    def view(self, node: NodeFiles) -> dict[str, Any]:
        """GET /cluster of one node; {} while it does not answer."""
        try:
            with urlopen(f"{node.url}/api/v1/cluster", timeout=5.0) as answer:
                told: dict[str, Any] = json.load(answer)
                return told
        except (URLError, OSError, ValueError):
            return {}

    def post(self, node: NodeFiles, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """(status, answer) of one POST to one node: nothing is tried again."""
        request = Request(
            f"{node.url}/api/v1{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urlopen(request, timeout=10.0) as answer:
                return answer.status, json.load(answer)
        except HTTPError as refused:
            return refused.code, json.load(refused)

    def check_digests(self) -> None:
        """Returns once all members of each shard had the same digest at the same index.

        Writes go on meanwhile. The digest is of everything that was ever applied: replicas that
        differ once are never equal again.
        """
        seen: dict[tuple[str, int, int], dict[str, str]] = {}
        equal: dict[str, bool] = {}

        def agreed() -> bool:
            for node in self.nodes:
                for shard, told in self.view(node).get("shards", {}).items():
                    equal.setdefault(shard, False)
                    if "digest" in told:
                        index = told.get("digest_index", told["applied"][node.id])
                        here = seen.setdefault((shard, told["epoch"], index), {})
                        here[node.id] = told["digest"]
                        equal[shard] |= set(here) == set(told["members"]) and one_of(here)
            return bool(equal) and all(equal.values())

        until(agreed, f"equal digests of all members of all shards: {equal}")

    # -- as DevCluster is built ----------------------------------------------------------------

    def _write_files(self) -> None:
        self._release.run(
            _PREPARE,
            str(self.data),
            str(len(self.nodes)),
            str(self.nodes[0].port),
            self._name,
            json.dumps(self._settings),
        )

    def _program(self, node: NodeFiles) -> list[str]:
        if node.id not in self.old:
            return super()._program(node)
        return [*self._release.python, "-m", "agentmem_node.cli.main"]

    def _environment_of(self, node: NodeFiles) -> dict[str, str]:
        kept = super()._environment_of(node)
        if node.id in self.old:
            kept["PYTHONPATH"] = self._release.environment["PYTHONPATH"]
        return kept


def until(condition: Callable[[], bool], what: str, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


def one_of(digests: Mapping[str, str]) -> bool:
    return len(set(digests.values())) == 1
