"""The demo as a play: the same scenes for a terminal that only watches, and for CI."""

from __future__ import annotations

import compileall
import time
from pathlib import Path

import agentmem_client
import agentmem_cluster
import agentmem_node
from agentmem_node.cli.status import ask
from agentmem_node.console import cutting, growing
from agentmem_node.console.show import Show
from agentmem_node.console.story import NOTES_USER, Demo
from agentmem_node.model import operations as ops

_QUESTIONS = 6
_MISSING_SHOWN_MAX = 10


def set_up(show: Show) -> None:
    """What is done once on a machine, before the clock runs. Raises ModelUnavailable."""
    from agentmem_node.providers.model_files import ensure_model

    # A fresh clone has no byte code: three nodes would each compile all of it at their start.
    for package in (agentmem_node, agentmem_cluster, agentmem_client):
        if package.__file__ is not None:
            compileall.compile_dir(Path(package.__file__).parent, quiet=2)
    with show.bar("embedding model fetched and checked", 100, unit="%") as step:
        ensure_model(lambda _what, share: step(round(share * 100), 100))


def start_and_load(demo: Demo, show: Show) -> None:
    """Nodes up, conversations stored, the first question answered."""
    nodes = len(demo.cluster.nodes)
    with show.bar("nodes started", nodes) as step:
        ready: list[str] = []

        def is_up(node: str) -> None:
            ready.append(node)
            step(len(ready), nodes)

        demo.start(is_up)
    for node in demo.cluster.nodes:
        show.say(f"      {node.id}  {node.url}  pid {demo.cluster.pid(node.id)}")
    first = demo.client.search("tea", top_k=1)
    first_s = time.monotonic() - demo.started_at
    show.good(f"first search answered {first_s:.1f} s after the nodes were started")
    del first
    with show.bar("memories stored", 1) as step:
        demo.load(step)


def play(demo: Demo, show: Show) -> int:
    """All scenes once. Returns how many things were not as promised: 0 when all is well."""
    _questions(demo, show)
    wrong = _kill(demo, show)
    wrong += _partition(demo, show)
    wrong += _growth(demo, show)
    show.scene("Looking for every memory that was acknowledged")
    return wrong + _verify(demo, show)


def _questions(demo: Demo, show: Show) -> None:
    show.scene("Questions about months of conversations")
    for question, answer, is_right in demo.ask_questions(_QUESTIONS):
        show.answer(question.query, question.user_id, answer)
        if not is_right:
            show.say("    (what was looked for is further down)", "dim")
    everyone = demo.client.search("tea", top_k=3)
    show.answer("tea", None, everyone)


def _kill(demo: Demo, show: Show) -> int:
    leader = demo.leader_of(NOTES_USER)
    show.scene(f"Killing {leader} with SIGKILL, while memories are written")
    outage = demo.kill_while_writing(leader, "which tea does she drink now?")
    show.good(f"{leader} led the shard of {NOTES_USER!r}; it is dead")
    if outage.first_search_s is not None:
        show.good(f"a search was answered {outage.first_search_s:.2f} s after the kill")
    if outage.first_write_s is None:
        show.bad("no write was acknowledged after the kill")
    else:
        show.good(f"a write was acknowledged {outage.first_write_s:.2f} s after the kill")
    show.good(f"{outage.acknowledged} memories were acknowledged before and after it")
    show.refused(outage.refused)
    show.status(ask([n.url for n in demo.cluster.nodes if n.id != leader]), short=not show.is_live)
    found = demo.client.search("which tea does she drink now?", user_id=NOTES_USER, top_k=2)
    show.answer("which tea does she drink now?", NOTES_USER, found)

    show.scene(f"Starting {leader} again")
    took_s = demo.restart(leader)
    assert took_s is not None, "the others are a majority"
    show.good(f"{leader} is back and has caught up, {took_s:.1f} s")
    return outage.first_write_s is None


def _partition(demo: Demo, show: Show) -> int:
    leader = demo.leader_of(NOTES_USER)
    show.scene(f"Cutting the links of {leader}, while memories are written")
    seen = cutting.cut_while_writing(demo, leader)
    show.partition(seen)
    healed_s = cutting.heal(demo, leader)
    show.healed(leader, healed_s)
    return (not seen.is_as_promised) + (healed_s is None)


def _growth(demo: Demo, show: Show) -> int:
    show.scene("One more node joins, while memories are written")
    node, took_s = growing.join(demo)
    show.joined(demo.cluster.node(node), demo.cluster.pid(node), took_s)
    grown = growing.change(demo, ops.OperationWish(kind="rebalance"), show.moved)
    show.changed(f"{node} has its share", grown)

    show.scene(f"Removing {node} again")
    shrunk = growing.change(demo, ops.OperationWish(kind="remove", node=node), show.moved)
    show.changed(f"the cluster has forgotten {node}", shrunk)
    if shrunk.is_done:
        demo.cluster.forget(node)
    return (not grown.is_done) + (not shrunk.is_done)


def _verify(demo: Demo, show: Show) -> int:
    with show.bar("memories looked for, by id and by search", len(demo.acknowledged)) as step:
        missing = demo.missing(step)
    for lost in missing[:_MISSING_SHOWN_MAX]:
        show.bad(f"not found {lost.how}: {lost.text}")
    if missing:
        show.bad(f"{len(missing)} acknowledged memories are missing")
    else:
        show.good(f"all {len(demo.acknowledged)} acknowledged memories are there")
    return len(missing)
