"""The ring: balance, bounded loads, and few replicas moved when a node comes or goes."""

from __future__ import annotations

import math
import statistics
from binascii import crc_hqx
from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentmem_cluster.ring import SLOTS, assign, slot_of, slot_of_id
from agentmem_node.model.ids import new_id
from agentmem_node.model.ids import slot_of_id as slot_by_the_model

NAMES = st.text("abcdefghij0123456789-", min_size=1, max_size=8)
CLUSTERS = st.lists(NAMES, min_size=1, max_size=20, unique=True)
SHARDS = [f"s{i:02d}" for i in range(16)]


def loads(assigned: dict[str, tuple[str, ...]], nodes: list[str]) -> list[int]:
    count = Counter(node for members in assigned.values() for node in members)
    return [count[node] for node in nodes]


def moved(old: dict[str, tuple[str, ...]], new: dict[str, tuple[str, ...]]) -> int:
    """Replicas that must be copied."""
    return sum(len(set(new[shard]) - set(old[shard])) for shard in new)


class Fixed:
    def token(self, size_bytes: int) -> bytes:
        return bytes(range(size_bytes))

    def random(self) -> float:
        return 0.5


@given(st.text(), st.text())
def test_every_owner_has_a_slot(tenant: str, owner: str) -> None:
    assert 0 <= slot_of(tenant, owner) < SLOTS
    assert slot_of(tenant, owner) == slot_of(tenant, owner)


def test_slots_never_change_from_one_release_to_the_next() -> None:
    # Data lies where these say: a change here loses every memory of every cluster.
    assert slot_of("default", "user:ana") == crc_hqx(b"default\0user:ana", 0) % SLOTS == 16196
    assert slot_of("t", "é") == 12096


def test_owners_spread_over_the_slots() -> None:
    count = Counter(slot_of("default", f"user-{i}") * 16 // SLOTS for i in range(16_000))
    assert len(count) == 16
    assert max(count.values()) < 1.2 * min(count.values())


@given(st.integers(0, SLOTS - 1), st.integers(0, 1 << 47))
def test_the_slot_within_an_id_is_read_the_same_everywhere(slot: int, now_ms: int) -> None:
    key = new_id(now_ms, slot, Fixed())
    assert slot_of_id(key) == slot_by_the_model(key) == slot


@given(
    CLUSTERS,
    st.integers(1, 64),
    st.integers(1, 5),
    st.sampled_from([1.0, 1.1, 1.25, 2.0]),
    st.sampled_from([1, 8, 64]),
)
def test_loads_are_bounded_and_replicas_on_different_nodes(
    nodes: list[str], shards: int, replication: int, load: float, virtual_nodes: int
) -> None:
    names = [f"s{i:02d}" for i in range(shards)]
    assigned = assign(names, nodes, replication, load=load, virtual_nodes=virtual_nodes)
    copies = min(replication, len(nodes))
    assert set(assigned) == set(names)
    assert all(len(set(m)) == len(m) == copies for m in assigned.values())
    mean = shards * copies / len(nodes)
    assert max(loads(assigned, nodes)) <= math.ceil(load * mean)
    assert min(loads(assigned, nodes)) >= math.floor(mean / load)


@given(CLUSTERS, st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(nodes: list[str], chance: object) -> None:
    shuffled, shards = list(nodes), list(SHARDS)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    chance.shuffle(shards)  # type: ignore[attr-defined]
    assert assign(SHARDS, nodes, 3) == assign(shards, shuffled, 3)


@pytest.mark.parametrize("count", range(3, 21))
def test_sixteen_shards_on_any_cluster_have_even_leaders(count: int) -> None:
    nodes = [f"n{i}" for i in range(1, count + 1)]
    assigned = assign(SHARDS, nodes, 3)
    leaders = Counter(members[0] for members in assigned.values())
    leads = [leaders[node] for node in nodes]
    assert max(leads) - min(leads) <= 1
    assert max(loads(assigned, nodes)) <= math.ceil(1.25 * 48 / count)


@given(CLUSTERS, st.integers(2, 5))
def test_no_choice_of_leaders_is_more_even(nodes: list[str], replication: int) -> None:
    """Hall's condition for the busiest: those who lead most, and all they could hand over to."""
    assigned = assign(SHARDS, nodes, replication, virtual_nodes=4)
    leads = Counter(dict.fromkeys(nodes, 0))
    leads.update(members[0] for members in assigned.values())
    most = max(leads.values())
    closed = {node for node, count in leads.items() if count == most}
    while True:
        reached = {
            node for members in assigned.values() if members[0] in closed for node in members
        } - closed
        if not reached:
            break
        closed |= reached
    # Within what the busiest can hand over to, nobody leads fewer than one less.
    assert min(leads[node] for node in closed) >= most - 1


@given(CLUSTERS, NAMES, st.integers(1, 40))
def test_an_added_node_takes_only_its_part(nodes: list[str], new: str, shards: int) -> None:
    assume(new not in nodes)
    names = [f"s{i:02d}" for i in range(shards)]
    before = assign(names, nodes, 3)
    after = assign(names, [*nodes, new], 3, current=before)
    copies = min(3, len(nodes) + 1)
    mean = shards * copies / (len(nodes) + 1)
    gained = loads(after, [new])[0]
    grown = shards * (copies - min(3, len(nodes)))  # replicas that did not exist before
    over = sum(max(0, load - math.ceil(1.25 * mean)) for load in loads(before, nodes))
    assert moved(before, after) <= max(gained, grown) + over + grown
    assert gained >= math.floor(mean / 1.25)


@given(CLUSTERS, st.data(), st.integers(1, 40))
def test_a_lost_node_moves_only_what_it_had(
    nodes: list[str], data: st.DataObject, shards: int
) -> None:
    assume(len(nodes) > 1)
    names = [f"s{i:02d}" for i in range(shards)]
    before = assign(names, nodes, 3)
    gone = data.draw(st.sampled_from(nodes))
    left = [node for node in nodes if node != gone]
    after = assign(names, left, 3, current=before)
    lost = loads(before, [gone])[0]
    mean = shards * min(3, len(left)) / len(left)
    # With fewer nodes the least that each carries grows.
    lacking = sum(max(0, math.floor(mean / 1.25) - load) for load in loads(before, left))
    # One more move for each replica that only an exchange could place.
    assert moved(before, after) <= 2 * lost + lacking
    assert max(loads(after, left)) <= math.ceil(1.25 * mean)


def test_without_a_current_assignment_few_replicas_move_too() -> None:
    shares = []
    for count in range(3, 20):
        nodes = [f"node-{i}" for i in range(count)]
        shards = [f"s{i:03d}" for i in range(128)]
        before, after = assign(shards, nodes, 3), assign(shards, [*nodes, "node-new"], 3)
        shares.append(moved(before, after) / (128 * 3 / (count + 1)))
    assert statistics.mean(shares) < 2, "moves, in units of the new node's fair share"


def test_a_small_change_keeps_everything_when_nothing_must_move() -> None:
    nodes = ["n1", "n2", "n3"]
    before = assign(SHARDS, nodes, 3)
    assert assign(SHARDS, nodes, 3, current=before) == before


@pytest.mark.parametrize(
    ("shards", "nodes", "replication"),
    [(["s0"], [], 3), (["s0", "s0"], ["a"], 1), (["s0"], ["a", "a"], 1), (["s0"], ["a"], 0)],
)
def test_nonsense_is_refused(shards: list[str], nodes: list[str], replication: int) -> None:
    with pytest.raises(ValueError, match=r"node|twice|least"):
        assign(shards, nodes, replication)
