"""Failpoints by themselves: what a plan means, that the registry is the code, what they cost."""

from __future__ import annotations

import ast
import errno
import timeit
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from agentmem_cluster import failpoints
from agentmem_cluster.failpoints import MAY_FAIL, POINTS, WrongPlan, arm, failpoint, parse

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("cluster", "agentmem_node", "client")
# A call and a comparison take 25 to 60 ns on machines of these years.
COST_NS_MAX = 1_000.0


class Crashed(Exception):
    """The process would have ended."""


class Recorded:
    def __init__(self) -> None:
        self.stalls: list[float] = []

    def crash(self) -> NoReturn:
        raise Crashed

    def stall(self, seconds: float) -> None:
        self.stalls.append(seconds)


@pytest.fixture
def effects() -> Iterator[Recorded]:
    recorded = Recorded()
    yield recorded
    arm("", recorded)


def calls_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name == "failpoint":
                (argument,) = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: not a literal"
                yield argument.value


def test_every_registered_point_is_in_the_code_once_and_no_other_is() -> None:
    used = Counter(
        name
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for name in calls_in(path)
    )
    assert used == dict.fromkeys(POINTS, 1)
    assert len(POINTS) >= 40
    assert set(POINTS) >= MAY_FAIL


def test_an_unarmed_point_costs_next_to_nothing() -> None:
    assert failpoints._armed is None
    rounds = 100_000
    cost_ns = min(
        timeit.repeat(lambda: failpoint("journal.after_sync"), number=rounds, repeat=5)
    ) * (1e9 / rounds)
    print(f"an unarmed failpoint costs {cost_ns:.0f} ns, the measuring lambda included")
    assert cost_ns < COST_NS_MAX


def test_a_crash_comes_at_its_pass_and_other_points_do_not_count(effects: Recorded) -> None:
    arm("journal.after_sync=crash@3", effects)
    for _ in range(2):
        failpoint("journal.after_sync")
        failpoint("journal.before_sync")
    with pytest.raises(Crashed):
        failpoint("journal.after_sync")
    failpoint("journal.after_sync")  # the fourth


def test_several_faults_at_one_point_and_at_others_are_all_carried_out(effects: Recorded) -> None:
    arm(
        "link.before_send=delay:0.25@1; link.before_send=delay:2@2;view.before_write=crash", effects
    )
    for _ in range(3):
        failpoint("link.before_send")
    assert effects.stalls == [0.25, 2.0]
    with pytest.raises(Crashed):
        failpoint("view.before_write")


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_an_error_is_an_oserror_of_that_number(effects: Recorded, name: str) -> None:
    arm(f"journal.before_sync=error:{name}", effects)
    with pytest.raises(OSError) as caught:
        failpoint("journal.before_sync")
    assert caught.value.errno == getattr(errno, name)


def test_chance_follows_from_the_seed_alone(effects: Recorded) -> None:
    def passes(seed: int) -> list[int]:
        arm(f"seed={seed};link.before_send=delay:1%0.25", effects)
        found = []
        for number in range(1_000):
            before = len(effects.stalls)
            failpoint("link.before_send")
            if len(effects.stalls) > before:
                found.append(number)
        return found

    assert passes(1) == passes(1) != passes(2)
    assert 180 < len(passes(1)) < 320


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("journal.after_lunch=crash", "no failpoint 'journal.after_lunch'"),
        ("journal.after_sync=explode", "no failpoint's entry"),
        ("journal.after_sync=delay", "no failpoint's entry"),
        ("journal.after_sync=crash@0", "no failpoint's entry"),
        ("journal.after_sync", "no failpoint's entry"),
        ("write.before_propose=error:EIO", "No disk can refuse anything at write.before_propose"),
    ],
)
def test_a_plan_that_means_nothing_is_refused_and_arms_nothing(
    effects: Recorded, plan: str, says: str
) -> None:
    with pytest.raises(WrongPlan, match=says):
        arm(f"link.before_send=delay:1;{plan}", effects)
    failpoint("link.before_send")
    assert effects.stalls == []


def test_an_empty_plan_disarms(effects: Recorded) -> None:
    arm("link.before_send=crash", effects)
    arm("", effects)
    failpoint("link.before_send")
    assert parse(" ; ") == ([], 0)
