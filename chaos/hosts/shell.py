"""Commands of the system (ip, iptables, mount, docker), each with a deadline."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Sequence

from agentmem_chaos.errors import ChaosError

COMMAND_S_MAX = 20.0


async def run(
    command: Sequence[str], *, seconds: float = COMMAND_S_MAX, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Raises ChaosError when it fails (with `check`), is missing, or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise ChaosError(f"{command[0]} cannot be run: {error.strerror}.") from error
    try:
        async with asyncio.timeout(seconds):
            out, err = await process.communicate()
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise ChaosError(f"`{' '.join(command)}` took more than {seconds:g} s.") from None
        raise
    done = subprocess.CompletedProcess(
        list(command),
        process.returncode or 0,
        out.decode(errors="replace"),
        err.decode(errors="replace"),
    )
    if check and done.returncode != 0:
        why = (done.stderr or done.stdout).strip()[-500:]
        raise ChaosError(f"`{' '.join(command)}` failed with {done.returncode}: {why}")
    return done


def have(tool: str) -> bool:
    return shutil.which(tool) is not None
