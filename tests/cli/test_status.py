"""The shard table is joined from what each node says of itself."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from agentmem_node.cli.status import ClusterState, NodeState, _reasons, ask, join, render

MEMBERS = ["n1", "n2", "n3"]


def shard(
    leader: str | None, applied: dict[str, int], term: int = 1, **more: Any
) -> dict[str, Any]:
    return {
        "epoch": 1,
        "members": MEMBERS,
        "leader": leader,
        "term": term,
        "applied": applied,
        "slots": [[0, 16_383]],
        **more,
    }


def node(name: str, told: dict[str, Any] | None, *, up: bool = True) -> NodeState:
    view = {} if told is None else {"version": 1, "shards": {"s00": told}}
    return NodeState(name, f"http://{name}", up, up, view=view)


def joined(*nodes: NodeState) -> Any:
    view = next(n.view for n in nodes if n.view)
    (state,) = join(view, nodes)
    return state


def test_lag_is_what_the_slowest_replica_that_answers_is_behind() -> None:
    state = joined(
        node("n1", shard("n1", {"n1": 120}, memories=7)),
        node("n2", shard("n1", {"n2": 118}, memories=6)),
        node("n3", shard("n1", {"n3": 90}, memories=5)),
    )
    assert (state.lag, state.memories, state.leader) == (30, 7, "n1")


def test_the_leader_of_the_latest_term_is_believed() -> None:
    state = joined(
        node("n1", shard("n1", {"n1": 5}, term=3)),
        node("n2", shard("n2", {"n2": 6}, term=4)),
        node("n3", shard("n2", {"n3": 6}, term=4)),
    )
    assert state.leader == "n2"


def test_a_node_that_is_down_leads_nothing_whatever_the_others_still_believe() -> None:
    state = joined(
        node("n1", shard("n3", {"n1": 5})),
        node("n2", shard("n3", {"n2": 5})),
        node("n3", None, up=False),
    )
    assert state.leader is None
    assert state.applied == {"n1": 5, "n2": 5}


def test_a_replica_of_an_older_epoch_is_not_counted() -> None:
    old = shard("n3", {"n3": 900}) | {"epoch": 0}
    state = joined(
        node("n1", shard("n1", {"n1": 5})), node("n2", shard("n1", {"n2": 5})), node("n3", old)
    )
    assert state.lag == 0


def test_a_cluster_is_healthy_when_every_node_is_ready_and_every_shard_led() -> None:
    up = tuple(node(name, shard("n1", {name: 1})) for name in MEMBERS)
    assert ClusterState(1, up, tuple(join(up[0].view, up))).is_healthy
    one_down = (*up[:2], node("n3", None, up=False))
    state = ClusterState(1, one_down, tuple(join(up[0].view, one_down)))
    assert not state.is_healthy
    screen = io.StringIO()
    Console(file=screen, width=120).print(render(state))
    assert "down" in screen.getvalue() and "s00" in screen.getvalue()


def at(index: int, digest: str, **more: Any) -> dict[str, Any]:
    return shard("n1", {"n1": index, "n2": index, "n3": index}, digest=digest, **more)


def test_replicas_at_the_same_entry_must_have_the_same_digest() -> None:
    n1, n2 = node("n1", at(120, "aa")), node("n2", at(120, "aa"))
    assert joined(n1, n2, node("n3", at(120, "aa"))).digests_agree is True
    assert joined(n1, n2, node("n3", at(120, "bb"))).digests_agree is False
    # At another entry another digest is as it should be.
    assert joined(n1, n2, node("n3", at(119, "bb"))).digests_agree is True
    assert joined(n1, node("n2", at(119, "bb")), node("n3", None)).digests_agree is None
    assert joined(n1, n2, node("n3", at(120, "bb") | {"epoch": 0})).digests_agree is True


def test_a_digest_is_compared_at_the_entry_that_it_was_taken_at() -> None:
    n1 = node("n1", at(121, "aa", digest_index=120))
    assert joined(n1, node("n2", at(120, "aa"))).digests_agree is True
    assert joined(n1, node("n2", at(121, "bb"))).digests_agree is None


def test_a_cluster_whose_replicas_differ_is_not_healthy_and_says_where() -> None:
    nodes = (node("n1", at(9, "aa")), node("n2", at(9, "bb")), node("n3", at(9, "aa")))
    state = ClusterState(1, nodes, tuple(join(nodes[0].view, nodes)))
    assert state.diverged == ("s00",)
    assert not state.is_healthy
    assert state.to_plain()["shards"][0]["digests_agree"] is False
    screen = io.StringIO()
    Console(file=screen, width=120).print(render(state))
    assert "DIFFER" in screen.getvalue()


def test_every_node_that_the_map_names_is_asked(fake: Any) -> None:
    state = ask([fake.urls["n1"]])
    assert [n.id for n in state.nodes] == ["n1", "n2", "n3"]
    assert [n.is_ready for n in state.nodes] == [True, False, False]
    assert set(fake.asked("/health/ready")) == {"n1", "n2", "n3"}


def test_a_ready_node_says_which_replicas_it_is_without(fake: Any) -> None:
    assert ask([fake.urls["n1"]]).nodes[0].trouble == ""
    fake.reasons["n1"] = {"replica_missing": ["s01"]}
    (first, *_) = ask([fake.urls["n1"]]).nodes
    assert (first.is_ready, first.trouble) == (True, "replica_missing: s01")


def test_a_node_alone_that_listens_everywhere_is_asked_where_it_answered(fake: Any) -> None:
    url = fake.urls["n1"]
    fake.urls = {"n1": "http://0.0.0.0:1"}
    fake.leaders = dict.fromkeys(fake.leaders, "n1")
    assert [node.url for node in ask([url]).nodes] == [url]


def test_long_reasons_are_cut_short() -> None:
    groups = ["meta", "s00", "s01", "s02", "s03", "s04"]
    assert _reasons({"reasons": {"without_leader": groups}}) == (
        "without_leader: meta, s00, s01, s02 and 2 more"
    )
