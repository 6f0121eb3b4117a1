"""How much a node takes on at once: requests by class, and bytes of bodies."""

from __future__ import annotations

from typing import Literal, get_args

from agentmem_cluster.errors import Overloaded
from agentmem_node.model.limits import Limits

Class = Literal["search", "write", "read", "admin", "free"]
# No class may take every place: a flood of adds must leave room for searches, and the reverse.
_SHARE_OF_ONE_CLASS = 0.75
# Operators must get through to a node that has too much to do: they have places of their own.
_ADMIN_MAX = 32


class Admission:
    """Counts; a request over a bound is refused at once, because a queue only makes all late."""

    def __init__(self, limits: Limits) -> None:
        self._total_max = limits.requests_in_flight_max
        self._class_max = max(1, int(self._total_max * _SHARE_OF_ONE_CLASS))
        self._bodies_max = limits.bodies_bytes_max
        self.total = 0
        self.by_class: dict[str, int] = dict.fromkeys(get_args(Class), 0)
        self.body_bytes = 0
        self.refused = 0

    def enter(self, kind: Class) -> None:
        """Raises Overloaded. Each success must be followed by one `leave`."""
        counts = self.by_class
        if kind == "admin":
            if counts[kind] >= _ADMIN_MAX:
                self.refused += 1
                raise Overloaded(
                    f"This node works on {_ADMIN_MAX} requests of operators already.",
                    hint="Retry after a moment.",
                )
        elif kind != "free" and (self.total >= self._total_max or counts[kind] >= self._class_max):
            self.refused += 1
            raise Overloaded(
                f"This node works on {self.total} requests already ({counts[kind]} of kind "
                f"{kind}); the limit is {self._total_max} (limits.requests_in_flight_max), of "
                f"which one kind may take {self._class_max}.",
                hint="Retry after a moment, or send fewer at once.",
            )
        counts[kind] += 1
        self.total += 1

    def leave(self, kind: Class) -> None:
        self.by_class[kind] -= 1
        self.total -= 1

    def hold_bytes(self, size: int) -> None:
        """Raises Overloaded. Each success must be followed by `release_bytes` of as many."""
        if self.body_bytes + size > self._bodies_max:
            self.refused += 1
            raise Overloaded(
                f"The bodies of all requests at this moment reach {self._bodies_max:,} bytes "
                "(limits.bodies_bytes_max).",
                hint="Retry after a moment, or send smaller batches.",
            )
        self.body_bytes += size

    def release_bytes(self, size: int) -> None:
        self.body_bytes -= size
