"""Lying clocks (libfaketime) and failing system calls (libfiu), preloaded into node processes."""

from __future__ import annotations

import asyncio
import platform
import shutil
from pathlib import Path

from agentmem_chaos.errors import ChaosError

CONTROL_S_MAX = 5.0
_FAKETIME = "faketime/libfaketimeMT.so.1"
_FIU = ("fiu_run_preload.so", "fiu_posix_preload.so")


def faketime_library() -> Path | None:
    machine = platform.machine()
    folders = (f"/usr/lib/{machine}-linux-gnu", "/usr/lib", "/usr/lib64", "/usr/local/lib")
    found = (Path(folder) / _FAKETIME for folder in folders)
    return next((path for path in found if path.exists()), None)


def fiu_libraries() -> tuple[Path, ...] | None:
    if shutil.which("fiu-ctrl") is None:
        return None
    for folder in ("/usr/lib/fiu", "/usr/local/lib/fiu"):
        paths = tuple(Path(folder) / name for name in _FIU)
        if all(path.exists() for path in paths):
            return paths
    return None


class LyingClock:
    """The wall clock of one node, set through a file that libfaketime reads again and again."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.set(0.0)

    def set(self, offset_s: float) -> None:
        # Replaced whole: a half-written offset would be another fault than the one that is meant.
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset_s:+.3f}\n")
        fresh.replace(self._file)

    def environment(self) -> dict[str, str]:
        return {
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            # Elections and deadlines hang on the monotonic clock, which a real one never sets.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Its workaround for another C library makes each timed wait of a thread 0.5 to 10 ms
            # long (measured), which slowed a node fifty times: a fault that nobody asked for.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            # A real jump does not change the times of files that are there already.
            "NO_FAKE_STAT": "1",
        }


class FailingCalls:
    """The failure points of one node, switched by `fiu-ctrl` through named pipes."""

    def __init__(self, folder: Path) -> None:
        self._prefix = folder / "fiu"

    def environment(self) -> dict[str, str]:
        return {"FIU_CTRL_FIFO": str(self._prefix), "FIU_ENABLE": ""}

    async def switch(self, pid: int, point: str, probability: float, errno: int) -> None:
        """Raises ChaosError when the process does not take the order."""
        if probability > 0:
            order = (
                f"enable_random name={point},failnum=1,failinfo={errno},probability={probability}"
            )
        else:
            order = f"disable name={point}"
        command = ("fiu-ctrl", "-f", str(self._prefix), "-c", order, str(pid))
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(CONTROL_S_MAX):
                said, _ = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise ChaosError(f"fiu-ctrl had no answer from process {pid}.") from None
        if process.returncode != 0 or b"rror" in said:
            raise ChaosError(f"fiu-ctrl failed: {said.decode(errors='replace').strip()}")


__all__ = ["FailingCalls", "LyingClock", "faketime_library", "fiu_libraries"]
