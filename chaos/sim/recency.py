"""No read is older than what was answered before it was asked for: checked as each answer comes.

The checker looks at values at the end of a world, and values may agree by chance. Indexes do not:
a read that shows the state at an index before one that somebody had an answer from is stale.
"""

from __future__ import annotations

from agentmem_chaos.checker import Kind
from agentmem_chaos.sim.clients import Call
from agentmem_chaos.sim.judge import Judge


class Recency:
    """Implements `clients.Witness`."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._seen: dict[str, int] = {}  # the latest index that any client of a group was shown

    def seen(self, group: str) -> int:
        return self._seen.get(group, 0)

    def answered(self, call: Call, seen_before: int) -> None:
        """`seen_before`: what `seen` was when the call was made."""
        if call.kind is Kind.READ and call.index < seen_before:
            self._judge.accuse(
                "stale reads",
                f"{call} shows {call.group} at {call.index}, after {seen_before} was answered",
            )
        self._seen[call.group] = max(self.seen(call.group), call.index)
