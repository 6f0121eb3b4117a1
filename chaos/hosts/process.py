"""One node as a child process: started, signalled and ended by its own process id."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from agentmem_chaos.errors import ChaosError

END_S_MAX = 10.0
_LOG_TAIL_CHARACTERS = 4_000


class NodeProcess:
    """`command` runs in a session of its own: Ctrl-C in a terminal reaches the harness alone.

    `parent_pipe`: the reading end of a pipe whose writing end only this process has, so that
    nodes end when the harness dies, however it dies.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def pid(self) -> int:
        """Raises ChaosError when the node does not run."""
        if self._process is None or self._process.poll() is not None:
            raise ChaosError(f"Node {self.name} is not running.")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def is_paused(self) -> bool:
        return self._paused and self.is_running

    @property
    def exit_code(self) -> int | None:
        """Of the last process that ended; negative: the signal that killed it."""
        return None if self._process is None else self._process.poll()

    def start(self, parent_pipe: int) -> None:
        if self.is_running:
            raise ChaosError(f"Node {self.name} is running already.")
        self._paused = False
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._command, "--parent-pipe", str(parent_pipe)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=(parent_pipe,),
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
        if number in (signal.SIGSTOP, signal.SIGCONT):
            self._paused = number is signal.SIGSTOP

    async def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            await self.ended(END_S_MAX)

    async def stop(self) -> bool:
        """SIGTERM; True when it ended by itself, False when it had to be killed."""
        if not self.is_running:
            return True
        if self._paused:
            self.signal(signal.SIGCONT)  # a paused process would not hear the next
        self.signal(signal.SIGTERM)
        try:
            await self.ended(END_S_MAX)
        except ChaosError:
            await self.kill()
            return False
        return True

    async def ended(self, seconds: float) -> int:
        """The exit code once the process ended. Raises ChaosError when it does not in time."""
        assert self._process is not None
        try:
            return await asyncio.to_thread(self._process.wait, seconds)
        except subprocess.TimeoutExpired:
            raise ChaosError(
                f"Node {self.name} (pid {self._process.pid}) did not end within {seconds:g} s."
            ) from None

    def log_text(self) -> str:
        try:
            return self.log.read_bytes().decode(errors="replace")
        except OSError:
            return ""

    def log_tail(self) -> str:
        """The last of what the node printed."""
        return self.log_text()[-_LOG_TAIL_CHARACTERS:].strip()
