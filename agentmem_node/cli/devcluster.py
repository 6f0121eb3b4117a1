"""A cluster of child processes on this machine: `cluster dev`, the demo, tests and benchmarks.

    with DevCluster(path, nodes=3) as cluster:      # free ports, started, ready
        client = Client(cluster.urls)
        cluster.kill(2)                             # SIGKILL to node n2
        cluster.restart(2)

Children die with their parent, however it dies: each holds the reading end of a pipe whose
writing end only the parent has. They live in process groups of their own, so that Ctrl-C in a
terminal reaches the parent alone, which stops them in order. Every child is signalled by the
id of its own process, never by name.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from agentmem_node.cli.devlayout import (
    HOST,
    DevClusterError,
    Dialled,
    NodeFiles,
    free_port,
    is_free,
    layout,
    place_of_newcomer,
    ports_in_use,
    prepare,
)
from agentmem_node.cli.devprobe import is_ready, log_tail, peers_up

__all__ = ["Crash", "DevCluster", "is_ready"]

READY_S_MAX = 60.0
STOP_S_MAX = 10.0
_LINKS_S_MAX = 15.0
_POLL_S = 0.02

# What a node reads from its node.toml must not be overruled by what happens to be set outside.
_OWN_VARIABLES = ("AGENTMEM_NODE_", "AGENTMEM_CLUSTER_", "AGENTMEM_CONFIG")


@dataclass(frozen=True, slots=True)
class Crash:
    """A node that ended although nobody told it to."""

    node: str
    exit_code: int  # negative: the signal that killed it
    log_tail: str

    def __str__(self) -> str:
        why = (
            f"was killed by {signal.Signals(-self.exit_code).name}"
            if self.exit_code < 0
            else f"ended with exit code {self.exit_code}"
        )
        return f"node {self.node} {why}. The end of its log:\n{self.log_tail}".rstrip()


class DevCluster:
    """`nodes` processes with their data below `data`. `port` None: free ones are found.

    `settings` are configuration keys for every node, `{"raft.heartbeat_ms": 50}`; `environment`
    adds variables, `program` is what takes the commands of `agentmem`; `dialled` says where nodes
    reach each other. Node numbers start at 1. Not for use by several threads.
    """

    def __init__(
        self,
        data: Path,
        *,
        nodes: int = 3,
        port: int | None = None,
        name: str = "dev",
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = (sys.executable, "-m", "agentmem_node.cli.main"),
        dialled: Dialled | None = None,
    ) -> None:
        self.data = data
        self._dialled = dialled
        self._joined: set[str] = set()
        self.nodes = layout(data, nodes, free_port(nodes) if port is None else port)
        self._name = name
        self._settings = dict(settings or {})
        self._environment = dict(environment or {})
        self._given_program = program
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._expected_ends: set[str] = set()
        self._pipe: tuple[int, int] | None = None

    @property
    def urls(self) -> list[str]:
        """The URL of every node, whether it runs or not."""
        return [node.url for node in self.nodes]

    def __enter__(self) -> DevCluster:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # -- life -----------------------------------------------------------------------------

    def start(self) -> None:
        """Write the files and start every node. Raises DevClusterError before anything started."""
        if taken := ports_in_use(self.nodes):
            raise DevClusterError(
                f"Port {', '.join(map(str, taken))} on {HOST} is in use. Stop what uses it (is "
                "this cluster running already?), or choose others with --port."
            )
        try:
            self._write_files()
        except OSError as error:
            raise DevClusterError(
                f"Cannot write below {self.data}: {error.strerror}. Choose another directory "
                "with --data."
            ) from error
        self._pipe = os.pipe()
        for node in self.nodes:
            self._spawn(node)

    def _write_files(self) -> None:
        prepare(self.data, self.nodes, self._name, self._settings, self._dialled)

    def wait_ready(
        self,
        timeout_s: float = READY_S_MAX,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Return once every running node is ready; `progress` is told each one's id as it is.

        Raises DevClusterError when one ends before, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        waiting = {node.id: node for node in self.nodes if self.is_running(node.id)}
        while waiting:
            for crash in self.crashes():
                raise DevClusterError(str(crash))
            for node in list(waiting.values()):
                if is_ready(node):
                    del waiting[node.id]
                    if progress is not None:
                        progress(node.id)
            if waiting and time.monotonic() >= deadline:
                node = next(iter(waiting.values()))
                raise DevClusterError(
                    f"Node {node.id} was not ready within {timeout_s:g} s. The end of its log:\n"
                    + log_tail(node)
                )
            time.sleep(_POLL_S)

    def stop(self, timeout_s: float = STOP_S_MAX) -> list[str]:
        """End every node: SIGTERM, and SIGKILL to those that are left after `timeout_s`.

        Returns the ids of those that had to be killed.
        """
        self._expected_ends.update(self._processes)
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)  # a paused process would not hear the next
                process.terminate()
        deadline = time.monotonic() + timeout_s
        killed: list[str] = []
        for name, process in self._processes.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed.append(name)
        self._processes.clear()
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None
        return killed

    # -- one node -------------------------------------------------------------------------

    def node(self, number: int | str) -> NodeFiles:
        """A node by its number or id. Raises DevClusterError."""
        wanted = f"n{number}" if str(number).isdigit() else str(number)
        for node in self.nodes:
            if node.id == wanted:
                return node
        known = ", ".join(node.id for node in self.nodes)
        raise DevClusterError(f"There is no node {number}. Nodes: {known}.")

    def is_running(self, number: int | str) -> bool:
        process = self._processes.get(self.node(number).id)
        return process is not None and process.poll() is None

    def pid(self, number: int | str) -> int:
        """The process id of a running node. Raises DevClusterError."""
        return self._running(number).pid

    def kill(self, number: int | str) -> None:
        """SIGKILL: the process ends at once, with nothing flushed and nobody told."""
        process = self._running(number)
        self._expected_ends.add(self.node(number).id)
        process.kill()
        process.wait()

    def terminate(self, number: int | str, timeout_s: float = STOP_S_MAX) -> int:
        """SIGTERM, as an operator stops a node; returns its exit code."""
        process = self._running(number)
        self._expected_ends.add(self.node(number).id)
        process.terminate()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DevClusterError(
                f"Node {number} did not stop within {timeout_s:g} s and was killed."
            ) from None

    def pause(self, number: int | str) -> None:
        """SIGSTOP: the process hangs, its connections stay open."""
        self._running(number).send_signal(signal.SIGSTOP)

    def resume(self, number: int | str) -> None:
        self._running(number).send_signal(signal.SIGCONT)

    def restart(
        self,
        number: int | str,
        *,
        wait_s: float = READY_S_MAX,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a node that ended, on its own data, and wait until it is ready (0: do not wait).

        `environment`: further variables, this time only.
        """
        node = self.node(number)
        if self.is_running(number):
            raise DevClusterError(f"Node {node.id} is running.")
        if not is_free(node.port):
            raise DevClusterError(f"Port {node.port} on {HOST} is in use by something else now.")
        self._spawn(node, environment=environment)
        if wait_s:
            self._wait_for(node, wait_s)

    def place_newcomer(self) -> NodeFiles:
        """Where the node goes that `join` starts next: its id and its ports."""
        return place_of_newcomer(self.data, self.nodes)

    def join(
        self,
        node: NodeFiles,
        token: str,
        *,
        peer: str | None = None,
        wait_s: float = READY_S_MAX,
    ) -> None:
        """Start `agentmem serve --join` at a place of `place_newcomer`; it is ready and connected.

        `token`: of `agentmem cluster join-token`. `peer`: where the others are to dial it, if that
        is not where it listens. Raises DevClusterError; the node is then no part of this cluster
        of processes, and does not run.
        """
        node.directory.mkdir(parents=True, exist_ok=True)
        running = [one.url for one in self.nodes if self.is_running(one.id)]
        arguments = ["--join", token, "--at", ",".join(running), "--id", node.id]
        arguments += ["--listen", f"{HOST}:{node.port}", "--peer-listen", node.peer]
        arguments += [] if peer is None else ["--advertise-peer", peer]
        self.nodes = (*self.nodes, node)
        self._joined.add(node.id)
        try:
            self._spawn(node, arguments)
            self._wait_for(node, wait_s)
            self._wait_for_links(node)
        except DevClusterError:
            self.forget(node.id)
            raise

    def _wait_for_links(self, node: NodeFiles) -> None:
        """Until the others can give it shards: whoever plans leaves out whom it does not reach."""
        deadline = time.monotonic() + _LINKS_S_MAX
        others = {n.id for n in self.nodes if n is not node and self.is_running(n.id)}
        while missing := sorted(others - peers_up(node)):
            if time.monotonic() >= deadline:
                raise DevClusterError(
                    f"Node {node.id} is not connected to {', '.join(missing)} within "
                    f"{_LINKS_S_MAX:g} s. The end of its log:\n{log_tail(node)}"
                )
            time.sleep(_POLL_S)

    def forget(self, number: int | str) -> None:
        """Stop a node and leave it out from now on: one that the cluster removed."""
        node = self.node(number)
        if self.is_running(node.id):
            self.terminate(node.id)
        self._processes.pop(node.id, None)
        self.nodes = tuple(one for one in self.nodes if one is not node)

    def _wait_for(self, node: NodeFiles, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while not is_ready(node):
            for crash in self.crashes():
                if crash.node == node.id:
                    raise DevClusterError(str(crash))
            if time.monotonic() >= deadline:
                raise DevClusterError(
                    f"Node {node.id} was not ready within {wait_s:g} s. The end of its log:\n"
                    + log_tail(node)
                )
            time.sleep(_POLL_S)

    def crashes(self) -> list[Crash]:
        """The nodes that ended by themselves since this was asked last."""
        found = []
        for node in self.nodes:
            process = self._processes.get(node.id)
            if process is None or process.poll() is None or node.id in self._expected_ends:
                continue
            self._expected_ends.add(node.id)
            found.append(Crash(node.id, process.returncode, log_tail(node)))
        return found

    # -- processes ------------------------------------------------------------------------

    def _running(self, number: int | str) -> subprocess.Popen[bytes]:
        node = self.node(number)
        process = self._processes.get(node.id)
        if process is None or process.poll() is not None:
            raise DevClusterError(f"Node {node.id} is not running.")
        return process

    def _spawn(
        self,
        node: NodeFiles,
        joining: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if self._pipe is None:
            raise DevClusterError("The cluster is not started.")
        reading_end = self._pipe[0]
        command = [
            *(*self._program(node), "serve"),
            *("--parent-pipe", str(reading_end)),
        ]
        if node.id in self._joined:  # its settings are where joining wrote them
            command += ["--data", str((node.directory / "data").absolute()), *joining]
            command += [] if not joining else ["--set", "node.log_format=text"]
        else:
            command += ["--config", str(node.config)]
        with node.log.open("ab") as log:
            self._processes[node.id] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self._environment_of(node), **(environment or {})},
                pass_fds=(reading_end,),
                start_new_session=True,
            )
        self._expected_ends.discard(node.id)

    def _program(self, node: NodeFiles) -> list[str]:
        """The command that runs `node`; tests of upgrades run another version."""
        return list(self._given_program)

    def _environment_of(self, node: NodeFiles) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_OWN_VARIABLES)}
        return {**kept, **self._environment}
