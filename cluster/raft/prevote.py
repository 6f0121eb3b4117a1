"""PreVote and leader stickiness: nobody raises the term unless a majority wants an election.

Raft thesis 9.6. Without it a node that comes back from a partition deposes a healthy leader (D13:
terms 2 to 6 in 20 s). A member asks first, without changing anything; others grant only when
they hear no leader themselves and the asker's log is at least as good as theirs.
"""

from __future__ import annotations


class PreVote:
    """The round of questions that precedes an election."""

    def __init__(self, members: int) -> None:
        self._majority = members // 2 + 1
        self._granted: set[str] = set()
        self.round = 0
        self.open = False

    def begin(self) -> int:
        self.round += 1
        self.open = True
        self._granted.clear()
        return self.round

    def close(self) -> None:
        self.open = False

    def grant(self, peer: str, round_: int) -> bool:
        """True when this grant makes a majority, the asker included."""
        if not self.open or round_ != self.round:
            return False
        self._granted.add(peer)
        if len(self._granted) + 1 < self._majority:
            return False
        self.open = False
        return True


def hears_leader(leader: str | None, heard_s: float, now_s: float, election_s_min: float) -> bool:
    """Whether a member is content with the leader it has."""
    return leader is not None and now_s - heard_s < election_s_min


def log_is_as_good(last_term: int, last_index: int, own_term: int, own_index: int) -> bool:
    """Raft 5.4.1: the later last term wins; with equal terms, the longer log."""
    return (last_term, last_index) >= (own_term, own_index)
