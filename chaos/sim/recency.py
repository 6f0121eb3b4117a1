"""No read is older than what was answered before it was asked for: checked as each answer comes.

The checker looks at values at the end of a world, and values may agree by chance. Indexes do not:
a read that shows the state at an index before one that somebody had an answer from is stale.
"""

from __future__ import annotations

from collections.abc import Mapping

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.clients import Call
from agentmem_chaos.sim.judge import Judge


class Recency:
    """Implements `clients.Witness`."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._seen: dict[str, int] = {}  # the latest index of a shard that any client was shown

    def seen(self) -> Mapping[str, int]:
        return dict(self._seen)

    def answered(self, call: Call, seen_before: Mapping[str, int]) -> None:
        """`seen_before`: what `seen` was when the call was made."""
        before = seen_before.get(call.shard, 0)
        if call.kind is Kind.READ and call.index < before:
            self._judge.accuse(
                "stale reads",
                f"{call} shows {call.shard} at {call.index}, after {before} was answered",
            )
        self._seen[call.shard] = max(self._seen.get(call.shard, 0), call.index)
