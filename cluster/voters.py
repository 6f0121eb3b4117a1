"""Which nodes vote in the meta group."""

from __future__ import annotations

from collections.abc import Sequence

from agentmem_cluster.errors import BadRequest
from agentmem_cluster.nodestate import Nodes, states_of
from agentmem_cluster.zones import fits, zone_ranges

_VOTERS_MAX = 5  # survives two losses; more would only slow each decision
_VOTERS_LEAST = 3  # the fewest that survive a loss


def meta_voters(nodes: Nodes, current: Sequence[str] = ()) -> tuple[str, ...]:
    """The voters of the meta group, sorted: 1, 3 or 5, as many as the active nodes allow.

    Spread over zones as evenly as their sizes allow, and then as many of the `current` ones as
    possible. A node that is down stays a voter until it is lost, but does not become one. Lost
    voters stay while fewer than three nodes are active: going from three to one would put all
    that the meta group knows on one disk. Raises BadRequest when there is no active node.
    """
    states = states_of(nodes)
    able = [n for n, state in states.items() if state.is_active and (state.is_up or n in current)]
    if not able:
        raise BadRequest(
            "No node can vote in the meta group.",
            hint="Bring one back that is not draining, or add one.",
        )
    lost = [n for n in current if n in states and states[n].is_lost and not states[n].is_draining]
    if len(able) < _VOTERS_LEAST <= min(len(current), len(able) + len(lost)):
        able = [*able, *sorted(lost)[: _VOTERS_LEAST - len(able)]]
    size = min(_VOTERS_MAX, len(able) - (len(able) + 1) % 2)
    ranges = zone_ranges({n: states[n].zone for n in able}, size)
    chosen: list[str] = []
    # Sets that zones allow are the independent sets of a matroid: to take the best first is best.
    for node in sorted(able, key=lambda n: (n not in current, not states[n].is_live, n)):
        zones = [states[n].zone for n in (*chosen, node)]
        if len(chosen) < size and fits(zones, ranges, size):
            chosen.append(node)
    return tuple(sorted(chosen))
