"""When a new epoch may take writes: once a majority of the old members has closed the old one.

A read of the old epoch needs a majority of its members to confirm it. Two majorities share a
member, so after this no read of the old state can be confirmed, and a write of the new epoch may
be acknowledged. The log then says BEGIN, which later leaders of the epoch find there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


def is_fenced(old_members: Sequence[str], closed: Collection[str]) -> bool:
    """`closed`: members that promised, durably, never to take part in the old epoch again."""
    return 2 * len(set(old_members) & set(closed)) > len(old_members)
