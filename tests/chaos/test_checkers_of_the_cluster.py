"""Checkers of nodes and answers: planted violations are found, innocence passes."""

from __future__ import annotations

from typing import Any

from agentmem_chaos.checkers.answers import errors, in_time, minority
from agentmem_chaos.checkers.base import Crash, Damage, Evidence, Refusal, Verdict
from agentmem_chaos.checkers.cluster import converges, crashes, damage, digests, one_epoch, replicas
from agentmem_chaos.checkers.registry import CLAIMS, OF_EVERY_RUN, OF_WORKLOADS, check_all
from agentmem_chaos.runs.probe import without_majority
from agentmem_chaos.workloads.registry import WORKLOADS
from tests.chaos.evidence import FAILED, UNKNOWN, Story, stored


def view(node: str, digest: str = "aa", applied: int = 7, **more: Any) -> dict[str, Any]:
    told = {"epoch": 1, "members": ["n1", "n2"], "digest": digest, "applied": {node: applied}}
    return {"version": 3, "shards": {"s00": told | more}}


def seen(**views: Any) -> Evidence:
    return Evidence([], 5.0, views=views)


def test_equal_digests_hold_and_different_ones_at_one_index_do_not() -> None:
    assert digests(seen(n1=view("n1"), n2=view("n2"))).verdict is Verdict.HOLDS
    assert digests(seen(n1=view("n1"), n2=view("n2", "bb"))).verdict is Verdict.VIOLATED


def test_a_replica_that_never_catches_up_is_no_pass() -> None:
    behind = seen(n1=view("n1"), n2=view("n2", "bb", applied=5))
    assert digests(behind).verdict is Verdict.UNKNOWN


def test_two_epochs_or_two_map_versions_are_found() -> None:
    assert one_epoch(seen(n1=view("n1"), n2=view("n2"))).verdict is Verdict.HOLDS
    assert one_epoch(seen(n1=view("n1"), n2=view("n2", epoch=2))).verdict is Verdict.VIOLATED
    old = view("n2") | {"version": 2}
    assert one_epoch(seen(n1=view("n1"), n2=old)).verdict is Verdict.VIOLATED


def test_nodes_that_do_not_tell_are_no_pass() -> None:
    for checker in (digests, one_epoch, replicas):
        assert checker(Evidence([], 5.0)).verdict is Verdict.UNKNOWN


def test_a_replica_that_lists_something_else_is_found() -> None:
    evidence = Evidence(
        [],
        5.0,
        inventory={"ana": [stored("a"), stored("b")]},
        replicas={"n1": {"ana": [stored("b"), stored("a")]}, "n2": {"ana": [stored("a")]}},
    )
    found = replicas(evidence)
    assert found.verdict is Verdict.VIOLATED
    assert found.details == ("n2, ana: 1 missing, as ['b text']",)


def test_a_replica_that_cannot_be_read_is_found_and_one_that_refuses_is_unknown() -> None:
    broken, busy = {"n1": "500 internal: ..."}, {"n1": "503 unavailable: ..."}
    assert replicas(Evidence([], 5.0, inventory={}, replicas=broken)).verdict is Verdict.VIOLATED
    assert replicas(Evidence([], 5.0, inventory={}, replicas=busy)).verdict is Verdict.UNKNOWN


def test_damage_may_be_survived_or_refused_by_name_and_nothing_else() -> None:
    def verdict(outcome: str, exit_code: int | None, said: str) -> Verdict:
        one = Damage("n1", "journal/0001.seg", "cut", outcome, exit_code, said)
        return damage(Evidence([], 5.0, damages=[one])).verdict

    assert verdict("recovered", None, "") is Verdict.HOLDS
    assert verdict("refused", 1, "error: journal/0001.seg is damaged") is Verdict.HOLDS
    assert verdict("refused", 1, "error: something is damaged") is Verdict.VIOLATED
    assert verdict("refused", 1, "Traceback ... 0001.seg") is Verdict.VIOLATED
    assert verdict("refused", -7, "0001.seg") is Verdict.VIOLATED
    assert verdict("hung", None, "0001.seg") is Verdict.VIOLATED


def refusal(status: int, took_s: float, code: str = "no_quorum") -> Refusal:
    return Refusal("n1", "s00", "write", 10.0, took_s, status, code)


def test_a_minority_that_refuses_in_time_holds() -> None:
    refused = [refusal(503, 0.1), refusal(504, 1.9, "deadline_exceeded")]
    assert minority(Evidence([], 5.0, refusals=refused)).verdict is Verdict.HOLDS


def test_a_minority_that_answers_or_refuses_late_or_hangs_is_found() -> None:
    for wrong in (refusal(200, 0.1, ""), refusal(503, 2.1), refusal(0, 10.0), refusal(500, 0.1)):
        assert minority(Evidence([], 5.0, refusals=[wrong])).verdict is Verdict.VIOLATED


def test_a_call_that_outlives_its_deadline_is_found() -> None:
    story = Story()
    story.op("read", "r1", FAILED, at=(0.0, 5.5))
    story.op("write", "r1", UNKNOWN)
    assert in_time(Evidence(story.ops, 5.0)).verdict is Verdict.HOLDS
    impatient = {7: 1.0}
    story.op("tick", "t1", client=7, at=(0.0, 5.0))
    assert in_time(Evidence(story.ops, 5.0, patience_s=impatient)).verdict is Verdict.HOLDS
    story.op("read", "r1", FAILED, client=7, at=(0.0, 3.5))
    assert in_time(Evidence(story.ops, 5.0, patience_s=impatient)).verdict is Verdict.VIOLATED
    story.op("read", "r1", FAILED, at=(0.0, 7.5))
    assert in_time(Evidence(story.ops, 5.0)).verdict is Verdict.VIOLATED


def test_an_internal_error_is_found_and_a_refusal_is_none() -> None:
    story = Story()
    story.op("read", "r1", FAILED, code="no_quorum")
    assert errors(Evidence(story.ops, 5.0)).verdict is Verdict.HOLDS
    story.op("read", "r1", FAILED, code="internal")
    assert errors(Evidence(story.ops, 5.0)).verdict is Verdict.VIOLATED


def test_crashes_and_clusters_that_do_not_come_back_are_found() -> None:
    evidence = Evidence([], 5.0, converged_s=1.0)
    assert crashes(evidence).verdict is converges(evidence).verdict is Verdict.HOLDS
    assert crashes(Evidence([], 5.0, crashes=[Crash("n1", 3.0, "x")])).verdict is Verdict.VIOLATED
    assert converges(Evidence([], 5.0)).verdict is Verdict.VIOLATED


def test_a_side_lacks_the_majority_of_the_shards_whose_replicas_are_elsewhere() -> None:
    members = {"s00": ("n1", "n2", "n3"), "s01": ("n3", "n4", "n5")}
    sides = (frozenset({"n1", "n2"}), frozenset({"n3", "n4", "n5"}))
    assert without_majority(sides, members) == {
        **{node: ["s01"] for node in ("n1", "n2")},
        **{node: ["s00"] for node in ("n3", "n4", "n5")},
    }
    assert without_majority((frozenset({"n1", "n2", "n3"}),), {"s00": ("n1", "n2", "n3")}) == {}


def test_every_checker_is_listed_and_every_workload_names_checkers() -> None:
    assert set(CLAIMS) == {*OF_EVERY_RUN, *OF_WORKLOADS}
    for workload in WORKLOADS.values():
        assert workload.checkers
        found = check_all(Evidence([], 5.0), workload.checkers)
        names = [finding.checker for finding in found]
        assert names == [*workload.checkers, *OF_EVERY_RUN]
