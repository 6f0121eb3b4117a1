"""Somebody who writes memories, one after the other, while something happens to the cluster."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from agentmem_client import AgentMemError, Memory

WRITE_DEADLINE_S = 10.0
_BEGIN_S_MAX = 15.0
# Fast enough to show a pause of some ten milliseconds, slow enough to leave a laptop its processor.
_PACE_S = 0.03


class Writer:
    """Writes in a thread of its own while its `with` block runs. `write` stores the next memory."""

    def __init__(self, write: Callable[[], list[Memory]], seen: Callable[[Memory], None]) -> None:
        self._write = write
        self._seen = seen
        self._marked_at: float | None = None
        self._begun, self._enough, self._after = (threading.Event() for _ in range(3))
        self._thread = threading.Thread(target=self._run, name="demo-writer", daemon=True)
        self.acknowledged = 0
        self.refused: list[str] = []
        self.longest_s = 0.0  # of any write, acknowledged or not
        self.first_after_mark_s: float | None = None

    def __enter__(self) -> Writer:
        self._thread.start()
        self._begun.wait(_BEGIN_S_MAX)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._enough.set()
        self._thread.join(WRITE_DEADLINE_S + 5.0)

    def mark(self) -> float:
        """Now it happened: from here on the next acknowledged write is timed. `time.monotonic`."""
        self._marked_at = time.monotonic()
        return self._marked_at

    def wait_for_write_after_mark(self, seconds: float) -> float | None:
        """Seconds from the mark to the end of the first write that began after it, or None."""
        self._after.wait(seconds)
        return self.first_after_mark_s

    def _run(self) -> None:
        while not self._enough.wait(_PACE_S):
            begun = time.monotonic()
            is_after = self._marked_at is not None
            try:
                memories = self._write()
            except AgentMemError as error:
                self.refused.append(error.message)
                continue
            finally:
                self.longest_s = max(self.longest_s, time.monotonic() - begun)
            for memory in memories:
                self._seen(memory)
            self.acknowledged += 1
            self._begun.set()
            if is_after and self._marked_at is not None and not self._after.is_set():
                self.first_after_mark_s = time.monotonic() - self._marked_at
                self._after.set()
