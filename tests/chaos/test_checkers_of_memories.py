"""Checkers of memories, counters and registers: planted violations are found, innocence passes."""

from __future__ import annotations

import pytest

from agentmem_chaos.checkers.base import Evidence, Finding, Stored, Verdict
from agentmem_chaos.checkers.linearizable import linearizable
from agentmem_chaos.checkers.memories import exactly_once, memories, search
from agentmem_chaos.workloads.registers import ABSENT, INITIAL
from tests.chaos.evidence import FAILED, OK, UNKNOWN, Story, stored


def violated(found: Finding, part: str) -> None:
    assert found.verdict is Verdict.VIOLATED
    assert any(part in detail for detail in found.details), found.details


# -- memories -------------------------------------------------------------------------------


def test_memories_that_are_there_once_and_deleted_ones_that_are_gone_pass() -> None:
    story = Story()
    story.add("kept")
    story.add("gone")
    story.op("delete", "gone", result=True)
    found = memories(story.evidence(stored("kept")))
    assert (found.verdict, found.looked_at) == (Verdict.HOLDS, 2)


def test_an_acknowledged_memory_that_is_missing_is_lost() -> None:
    story = Story()
    story.add("kept")
    story.add("lost")
    violated(memories(story.evidence(stored("kept"))), "lost of ana")


def test_a_refused_delete_deletes_nothing() -> None:
    story = Story()
    story.add("kept")
    story.op("delete", "kept", FAILED)
    assert memories(story.evidence(stored("kept"))).verdict is Verdict.HOLDS
    violated(memories(story.evidence()), "is lost")


def test_a_memory_that_is_there_twice_is_found() -> None:
    story = Story()
    story.add("twice")
    evidence = story.evidence(stored("twice"), stored("twice", "id-other"))
    violated(memories(evidence), "is there 2 times")


def test_a_deleted_memory_that_is_there_is_back_from_the_dead() -> None:
    story = Story()
    story.add("zombie")
    story.op("delete", "zombie", result=True)
    violated(memories(story.evidence(stored("zombie"))), "and is back")


def test_a_delete_that_finds_nothing_means_that_the_memory_was_lost() -> None:
    story = Story()
    story.add("lost")
    story.op("delete", "lost", result=False)
    violated(memories(story.evidence()), "found nothing")


@pytest.mark.parametrize("there", [True, False])
def test_unknown_adds_and_deletes_may_have_happened_or_not(there: bool) -> None:
    story = Story()
    story.add("maybe-added", UNKNOWN)
    story.add("maybe-deleted")
    story.op("delete", "maybe-deleted", UNKNOWN)
    shown = [stored("maybe-added"), stored("maybe-deleted")] if there else []
    assert memories(story.evidence(*shown)).verdict is Verdict.HOLDS


def test_a_refused_add_that_is_there_was_no_refusal() -> None:
    story = Story()
    story.add("refused", FAILED)
    violated(memories(story.evidence(stored("refused"))), "was refused")


def test_a_memory_that_nobody_added_is_found() -> None:
    story = Story()
    story.add("mine")
    violated(memories(story.evidence(stored("mine"), stored("noise"))), "nobody added it")


def test_a_memory_under_another_id_is_found() -> None:
    story = Story()
    story.add("moved")
    violated(memories(story.evidence(stored("moved", "id-new"))), "and is id-new")


def test_without_a_list_nothing_is_claimed() -> None:
    story = Story()
    story.add("kept")
    assert memories(Evidence(story.ops, 5.0)).verdict is Verdict.UNKNOWN
    assert memories(Evidence([], 5.0)).verdict is Verdict.NOTHING


# -- search ---------------------------------------------------------------------------------


def test_a_search_that_misses_an_acknowledged_memory_is_found() -> None:
    story = Story()
    story.add("tea")
    story.op("search", "tea", result=True)
    story.op("search", "tea", result=False)
    violated(search(story.evidence(searched={"tea": True})), "was not found by a search")


def test_a_search_at_the_end_that_misses_is_found() -> None:
    story = Story()
    story.add("tea")
    violated(search(story.evidence(searched={"tea": False})), "not found at the end")


def test_a_search_beside_the_add_or_after_the_delete_may_miss() -> None:
    story = Story()
    story.op("add", "tea", result="id-tea", value="tea text", at=(1.0, 3.0))
    story.op("search", "tea", result=False, at=(2.0, 4.0))
    story.op("delete", "tea", result=True, at=(5.0, 8.0))
    story.op("search", "tea", result=False, at=(6.0, 7.0))
    assert search(story.evidence(searched={})).verdict is Verdict.NOTHING


def test_unanswered_searches_at_the_end_are_no_pass() -> None:
    story = Story()
    story.add("tea")
    assert search(story.evidence()).verdict is Verdict.UNKNOWN


# -- exactly once ---------------------------------------------------------------------------


def tick(story: Story, name: str, outcome: object = OK, ids: tuple[str, ...] = ("id-1",)) -> None:
    result = list(ids) if outcome is OK else None
    kind = "again" if any(op.key == name for op in story.ops) else "tick"
    story.op(kind, name, outcome, result, value=name)  # type: ignore[arg-type]


def test_a_tick_that_is_counted_once_whatever_was_sent_passes() -> None:
    story = Story()
    tick(story, "t1", UNKNOWN)
    tick(story, "t1")
    tick(story, "t1")
    tick(story, "t2", FAILED)
    tick(story, "t3", UNKNOWN)
    found = exactly_once(story.evidence(Stored("id-1", "t1")))
    assert (found.verdict, found.looked_at) == (Verdict.HOLDS, 3)


def test_a_tick_that_is_counted_twice_is_found() -> None:
    story = Story()
    tick(story, "t1")
    evidence = story.evidence(Stored("id-1", "t1"), Stored("id-2", "t1"))
    violated(exactly_once(evidence), "counted 2 times")
    violated(exactly_once(evidence), "counts 2, and should count 1 to 1")


def test_a_tick_that_was_acknowledged_and_is_not_counted_is_found() -> None:
    story = Story()
    tick(story, "t1")
    violated(exactly_once(story.evidence()), "is not counted")


def test_a_tick_that_was_answered_with_two_ids_is_found() -> None:
    story = Story()
    tick(story, "t1")
    tick(story, "t1", ids=("id-2",))
    violated(exactly_once(story.evidence(Stored("id-1", "t1"))), "answered with 2 ids")


def test_a_tick_that_was_always_refused_and_is_counted_is_found() -> None:
    story = Story()
    tick(story, "t1", FAILED)
    violated(exactly_once(story.evidence(Stored("id-1", "t1"))), "refused every time")


# -- registers ------------------------------------------------------------------------------


def test_reads_writes_and_cas_in_order_are_linearizable() -> None:
    story = Story()
    story.op("read", "r1", result=INITIAL)
    story.op("write", "r1", result=True, value="a")
    story.op("cas", "r1", result=True, value="b", expected="a")
    story.op("cas", "r1", result=False, value="c", expected="a")
    story.op("read", "r1", result="b")
    found = linearizable(Evidence(story.ops, 5.0))
    assert (found.verdict, found.looked_at) == (Verdict.HOLDS, 5)


def test_a_stale_read_is_found() -> None:
    story = Story()
    story.op("write", "r1", result=True, value="a")
    story.op("write", "r1", result=True, value="b")
    story.op("read", "r1", result="a")
    violated(linearizable(Evidence(story.ops, 5.0)), "a read of 'a'")


def test_a_refused_write_that_is_read_is_found() -> None:
    story = Story()
    story.op("write", "r1", FAILED, value="a")
    story.op("read", "r1", result="a")
    violated(linearizable(Evidence(story.ops, 5.0)), "a read of 'a'")


def test_an_unknown_write_may_take_effect_late_or_never() -> None:
    story = Story()
    story.op("write", "r1", UNKNOWN, value="a")
    story.op("read", "r1", result=INITIAL)
    story.op("read", "r1", result="a")
    story.op("write", "r1", UNKNOWN, value="b")
    assert linearizable(Evidence(story.ops, 5.0)).verdict is Verdict.HOLDS


def test_a_register_that_is_gone_is_found() -> None:
    story = Story()
    story.op("read", "r1", result=ABSENT)
    violated(linearizable(Evidence(story.ops, 5.0)), "register r1")


def test_an_order_that_the_cluster_claims_wrongly_does_not_hide_a_stale_read() -> None:
    story = Story()
    story.op("write", "r1", result=True, value="a", order=2.0)
    story.op("write", "r1", result=True, value="b", order=3.0)
    story.op("read", "r1", result="a", order=2.5)
    violated(linearizable(Evidence(story.ops, 5.0)), "a read of 'a'")


def test_a_search_that_is_cut_off_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    import agentmem_chaos.checkers.linearizable as module

    monkeypatch.setattr(module, "STEPS_MAX_PER_KEY", 3)
    story = Story()
    for number in range(5):
        at = (0.0, 1.0 + number)
        story.op("write", "r1", result=True, value=f"v{number}", at=at)
    for number in (4, 0, 3, 1, 2):
        story.op("read", "r1", result=f"v{number}", at=(0.0, 10.0))
    assert linearizable(Evidence(story.ops, 5.0)).verdict is Verdict.UNKNOWN
