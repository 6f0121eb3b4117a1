"""The cluster of docker-compose.cluster.yml: containers, and the real Toxiproxy between them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts import shell
from agentmem_chaos.hosts.base import Need, Pair
from agentmem_chaos.hosts.links import Links, link_names
from agentmem_chaos.hosts.proxies import Proxies

FILE = "docker-compose.cluster.yml"
NODES = 3
HTTP_PORT = 7700  # of n1 it is this and 1, and so on
CLIENT_PORT = 7710
TOXIPROXY = ("127.0.0.1", 8474)
UP_S_MAX = 900.0  # the first time, images are fetched and built
COMMAND_S_MAX = 60.0
LOG_S_MAX = 10.0
_HAVE = frozenset({Need.SIGNALS, Need.PARTITION, Need.PEER_PROXY, Need.CLIENT_PROXY})
_LOG_TAIL_LINES = "60"


class ComposeHosts:
    """`folder` is for the containers' logs. The compose file is the working directory's."""

    kind = "compose"

    def __init__(self, folder: Path, count: int) -> None:
        if count != NODES:
            raise ChaosError(f"{FILE} has {NODES} nodes: use --nodes {NODES}, or loopback hosts.")
        self.folder = folder
        self.nodes = tuple(f"n{number}" for number in range(1, count + 1))
        self.api_key = f"am_{secrets.token_hex(24)}"
        self._project = f"agentmem-chaos-{secrets.token_hex(3)}"
        self._links = Links()
        self._proxies: Proxies | None = None
        self._began = False
        # Containers that this object ended; others are taken to run.
        self._ended: set[str] = set()

    # -- docker -----------------------------------------------------------------------------

    def _command(self, *arguments: str) -> list[str]:
        return ["docker", "compose", "-f", FILE, "-p", self._project, *arguments]

    async def _compose(self, *arguments: str, seconds: float = COMMAND_S_MAX) -> None:
        await shell.run(self._command(*arguments), seconds=seconds)

    async def _check_docker(self) -> None:
        if not Path(FILE).is_file():
            raise ChaosError(f"There is no {FILE} here: run from the root of the repository.")
        if shutil.which("docker") is None:
            raise ChaosError(
                "Compose hosts need Docker with its compose plugin, and there is no `docker` "
                "here. Install it, or use --hosts loopback."
            )
        for command, what in (
            (["docker", "compose", "version"], "has no compose plugin"),
            (["docker", "info"], "cannot reach its engine"),
        ):
            done = await shell.run(command, check=False)
            if done.returncode != 0:
                why = (done.stderr or done.stdout).strip().splitlines()[-1:] or [""]
                raise ChaosError(
                    f"Docker is here, but {what} ({why[0]}). Start it, or use --hosts loopback."
                )

    # -- life -------------------------------------------------------------------------------

    def why_not(self, need: Need) -> str | None:
        return None if need in _HAVE else "not inside of containers; use --hosts loopback"

    async def open(self, equip: frozenset[Need], seconds: float = 60.0) -> None:
        await self._check_docker()
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ["AGENTMEM_KEY_MAIN"] = self.api_key
        self._began = True
        await self._compose("up", "--build", "--detach", seconds=UP_S_MAX)
        self._proxies = Proxies(*TOXIPROXY)
        await self._proxies.adopt([*link_names(self.nodes), *(f"http-{n}" for n in self.nodes)])
        await self.clear_toxics()

    async def close(self) -> None:
        if not self._began:
            return
        for node in self.nodes:
            (self.folder / f"{node}.log").write_text(self.log(node))
        await shell.run(
            self._command("down", "--volumes", "--timeout", "5"),
            seconds=COMMAND_S_MAX,
            check=False,
        )
        self._began = False

    @property
    def _toxiproxy(self) -> Proxies:
        if self._proxies is None:
            raise ChaosError("The hosts are not open.")
        return self._proxies

    def url(self, node: str) -> str:
        return f"http://127.0.0.1:{HTTP_PORT + int(node[1:])}"

    def client_url(self, node: str) -> str:
        return f"http://127.0.0.1:{CLIENT_PORT + int(node[1:])}"

    # -- processes --------------------------------------------------------------------------

    def is_running(self, node: str) -> bool:
        return node not in self._ended

    async def join(self, token: str) -> str:
        raise ChaosError(f"New nodes: {self.why_not(Need.NEW_NODES)}.")

    async def start(self, node: str) -> None:
        await self._compose("start", node)
        self._ended.discard(node)

    async def stop(self, node: str) -> None:
        self._ended.add(node)
        await self._compose("stop", node)

    async def kill(self, node: str) -> None:
        self._ended.add(node)
        await self._compose("kill", "--signal", "SIGKILL", node)

    async def pause(self, node: str) -> None:
        await self._compose("pause", node)

    async def resume(self, node: str) -> None:
        await self._compose("unpause", node)

    def log(self, node: str) -> str:
        return self._log(node, "all")

    def log_tail(self, node: str) -> str:
        return self._log(node, _LOG_TAIL_LINES)

    def _log(self, node: str, lines: str) -> str:
        command = self._command("logs", "--no-color", "--no-log-prefix", "--tail", lines, node)
        try:
            done = subprocess.run(command, capture_output=True, timeout=LOG_S_MAX, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"(the log could not be read: {error})"
        return done.stdout.decode(errors="replace").strip()

    def exit_code(self, node: str) -> int | None:
        return None

    # -- network ----------------------------------------------------------------------------

    async def cut(self, lost: frozenset[Pair]) -> None:
        await self._links.cut(self._toxiproxy, lost)

    async def peer_toxic(
        self, pair: Pair, kind: str, attributes: Mapping[str, int], toxicity: float = 1.0
    ) -> None:
        await self._links.poison(self._toxiproxy, pair, kind, attributes, toxicity)

    async def client_toxic(
        self,
        node: str,
        kind: str,
        stream: str,
        attributes: Mapping[str, int],
        toxicity: float = 1.0,
    ) -> None:
        await self._toxiproxy.poison(f"http-{node}", kind, stream, attributes, toxicity)

    async def clear_toxics(self) -> None:
        await self._toxiproxy.cure_all()
        self._links.cleared()

    # -- the machine ------------------------------------------------------------------------

    def data_dir(self, node: str) -> Path:
        raise ChaosError(f"Data directories: {self.why_not(Need.DATA)}.")

    def disk(self, node: str) -> Path:
        raise ChaosError(f"Small disks: {self.why_not(Need.SMALL_DISK)}.")

    async def set_clock(self, node: str, offset_s: float) -> None:
        raise ChaosError(f"Clocks: {self.why_not(Need.CLOCK)}.")

    async def fail_calls(self, node: str, point: str, probability: float, errno: int) -> None:
        raise ChaosError(f"Failing calls: {self.why_not(Need.FAILING_CALLS)}.")
