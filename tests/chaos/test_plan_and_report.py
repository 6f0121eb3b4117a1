"""Plans are functions of their seed; figures and the page say what the record says."""

from __future__ import annotations

import datetime
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from agentmem_chaos import commands
from agentmem_chaos.checkers.base import Finding, Verdict
from agentmem_chaos.cli import main
from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Need
from agentmem_chaos.hosts.registry import HOSTS
from agentmem_chaos.nemeses.plan import CALM_FIRST_S, plan
from agentmem_chaos.nemeses.registry import NEMESES
from agentmem_chaos.report.page import write_page
from agentmem_chaos.runs.figures import figures, next_writes_s, percentile
from agentmem_chaos.runs.observer import LeaderChange
from agentmem_chaos.runs.result import TIMELINE, RunResult, find_run, load, save
from agentmem_chaos.runs.scenario import NAMED, find
from agentmem_chaos.runs.strikes import Struck
from agentmem_chaos.workloads.registry import WORKLOADS
from agentmem_client import Topology
from tests.chaos.evidence import FAILED, UNKNOWN, Story

HOLDS = {name: kind.hold_s for name, kind in NEMESES.items()}


def test_a_plan_is_a_function_of_its_seed_alone() -> None:
    names = sorted(NEMESES)
    made = plan(names, HOLDS, 300.0, 7)
    assert made == plan(names, HOLDS, 300.0, 7)
    assert made != plan(names, HOLDS, 300.0, 8)
    # Another interpreter with another hash seed draws the same.
    program = (
        "from agentmem_chaos.nemeses.plan import plan\n"
        "from agentmem_chaos.nemeses.registry import NEMESES\n"
        "holds = {name: kind.hold_s for name, kind in NEMESES.items()}\n"
        "print(plan(sorted(NEMESES), holds, 300.0, 7))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == str(made)


def test_every_nemesis_strikes_once_before_any_strikes_again() -> None:
    names = list(NAMED["partitions"].nemeses)
    made = [strike.nemesis for strike in plan(names, HOLDS, 200.0, 3)]
    assert sorted(made[: len(names)]) == sorted(names)
    assert len(made) > len(names)


def test_strikes_do_not_overlap_and_end_in_time() -> None:
    made = plan(sorted(NEMESES), HOLDS, 120.0, 5)
    assert made[0].at_s == CALM_FIRST_S
    for before, after in itertools.pairwise(made):
        assert before.at_s + before.hold_s < after.at_s
    assert made[-1].at_s + made[-1].hold_s <= 120.0


def test_a_short_run_has_at_least_one_strike_and_a_calm_one_none() -> None:
    assert len(plan(["kill-leader"], HOLDS, 1.0, 1)) == 1
    assert plan([], HOLDS, 60.0, 1) == ()


def test_scenarios_name_what_exists_and_can_be_combined() -> None:
    for scenario in NAMED.values():
        assert scenario.workload in WORKLOADS
        assert set(scenario.nemeses) <= set(NEMESES)
    combined = find("register+pause-leader+clock-jump")
    assert combined.nemeses == ("pause-leader", "clock-jump")
    assert combined.needs == {Need.SIGNALS, Need.CLOCK}
    with pytest.raises(ChaosError, match="no nemesis 'rain'"):
        find("register+rain")
    with pytest.raises(ChaosError, match="no scenario or workload 'nothing'"):
        find("nothing")


def test_list_shows_everything_that_can_be_named() -> None:
    shown = CliRunner().invoke(main, ["list"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for name in (*NAMED, *WORKLOADS, *NEMESES, *HOSTS):
        assert re.search(rf"^{re.escape(name)}\s", shown.output, re.MULTILINE), name


def test_an_unknown_scenario_is_an_error_that_says_what_there_is() -> None:
    shown = CliRunner().invoke(main, ["run", "nothing"])
    assert shown.exit_code == 2
    assert "Scenarios:" in shown.output and "Traceback" not in shown.output


# -- figures --------------------------------------------------------------------------------


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([], 0.99) is None
    assert percentile([3.0], 0.5) == 3.0
    hundred = [float(n) for n in range(1, 101)]
    assert (percentile(hundred, 0.5), percentile(hundred, 0.99)) == (50.0, 99.0)


CLUSTER = {
    "version": 1,
    "nodes": {"n1": {"http": "http://127.0.0.1:1"}},
    "shards": {
        "s00": {"epoch": 1, "members": ["n1"], "leader": "n1", "slots": [[0, 16_383]]},
    },
}


HALVES = {
    **CLUSTER,
    "shards": {
        "s00": {"epoch": 2, "members": ["n1"], "leader": "n1", "slots": [[0, 8_191]]},
        "s01": {"epoch": 2, "members": ["n1"], "leader": "n1", "slots": [[8_192, 16_383]]},
    },
}


def owner_in(shard: str) -> str:
    halves = Topology.read(HALVES)
    for owner in (f"owner-{number}" for number in range(1_000)):
        found = halves.shard_of_owner(f"user:{owner}")
        if found is not None and found.id == shard:
            return owner
    raise AssertionError("not one of a thousand")


def test_the_next_write_after_a_lost_leader_is_one_that_was_begun_after_it() -> None:
    story = Story()
    story.op("write", "r1", value="a", at=(0.5, 1.5))  # begun before
    story.op("write", "r1", FAILED, at=(1.1, 1.6))
    story.op("read", "r1", at=(1.2, 1.3))
    story.op("write", "r1", value="b", at=(1.4, 2.25))
    story.op("write", "r1", UNKNOWN, at=(2.0, 9.0))
    fault = Struck("kill-leader", 1.0, 1, led=("s00",), view=CLUSTER, undone_s=4.0, ready_s=0.5)
    found = figures(story.ops, [fault])
    assert found["lost_leader_to_next_write_s"] == {
        "count": 1,
        "p50": 1.25,
        "p99": 1.25,
        "max": 1.25,
    }
    assert (found["operations"], found["ok"], found["failed"], found["unknown"]) == (5, 3, 1, 1)
    assert found["longest_without_a_write_s"] == 0.75
    assert found["healed_to_ready_s"]["max"] == 0.5


def test_the_next_write_counts_for_the_shard_that_had_its_owner_then() -> None:
    """`s00` may be split afterwards, and have none of its busy owners any more."""
    low, high = (owner_in(half) for half in ("s00", "s01"))
    story = Story()
    story.op("write", "r1", owner=low, value="a", at=(1.5, 2.0))
    story.op("write", "r2", owner=high, value="b", at=(1.5, 3.0))
    story.op("write", "r1", owner=low, value="c", at=(90.0, 91.0))
    whole = Struck("kill-leader", 1.0, 1, led=("s00",), view=CLUSTER)
    assert next_writes_s([whole], story.ops) == [1.0]
    halves = replace(whole, led=("s00", "s01"), view=HALVES)
    assert sorted(next_writes_s([halves], story.ops)) == [1.0, 2.0]
    assert next_writes_s([replace(halves, at_s=2.5)], story.ops) == [], "nobody wrote for a while"
    story.op("write", "r1", FAILED, owner=low, at=(3.0, 9.0))
    assert next_writes_s([replace(halves, at_s=2.5)], story.ops) == [88.5]
    assert next_writes_s([replace(halves, view=None)], story.ops) == []


# -- results and the page -------------------------------------------------------------------


def a_result(verdict: Verdict = Verdict.HOLDS, failed: str = "") -> RunResult:
    story = Story()
    story.op("write", "r1", value="</script><script>alert(1)</script>", result=True)
    story.op("write", "r1", UNKNOWN, value="b")
    return RunResult(
        scenario="kills",
        workload="register",
        nemeses=("kill-leader",),
        hosts="loopback",
        nodes=("n1", "n2", "n3"),
        clients=2,
        seed=7,
        seconds=10.0,
        command="agentmem-chaos run kills --seed 7",
        started_at="2026-01-01T00:00:00+00:00",
        ended_s=12.0,
        findings=[Finding("linearizable", "all is well", verdict, 2)],
        struck=[
            Struck("kill-leader", 1.0, 1, "SIGKILL to n1", ("n1",), ("s00",), 4.0, 0.5, failed)
        ],
        leaders=[LeaderChange(0.1, "s00", 1, "n1"), LeaderChange(1.9, "s00", 2, "n2")],
        figures=figures(story.ops, []),
        ops=story.ops,
    )


@pytest.mark.parametrize(
    ("verdict", "failed", "passed"),
    [
        (Verdict.HOLDS, "", True),
        (Verdict.NOTHING, "", True),
        (Verdict.VIOLATED, "", False),
        (Verdict.UNKNOWN, "", False),
        (Verdict.HOLDS, "the fault could not be made", False),
    ],
)
def test_a_run_passes_when_nothing_is_violated_unknown_or_was_not_made(
    verdict: Verdict, failed: str, passed: bool
) -> None:
    assert a_result(verdict, failed).passed is passed


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.data = ""
        self._in_data = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.links += [v for k in ("src", "href") if (v := given.get(k)) is not None]
        self._in_data = given.get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data += data

    def handle_endtag(self, tag: str) -> None:
        self._in_data = False


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    result = a_result()
    save(result, tmp_path)
    page = Page()
    text = write_page(tmp_path).read_text()
    page.feed(text)
    assert page.links == []
    assert "{{" not in text.replace(page.data, "")
    assert page.tags.count("script") == 2, "what a client wrote cannot become part of the page"
    data = json.loads(page.data)
    assert data["result"] == json.loads(json.dumps(result.as_json()))
    assert len(data["operations"]) == 2


def test_the_latest_run_is_found_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChaosError, match="no run below chaos-runs"):
        find_run(None)
    folder = tmp_path / "chaos-runs" / "kills-7"
    folder.mkdir(parents=True)
    save(a_result(Verdict.VIOLATED), folder)
    assert load(find_run(None))["seed"] == 7
    shown = CliRunner().invoke(main, ["report"])
    assert shown.exit_code == 1
    assert "violated" in shown.output
    assert "agentmem-chaos run kills --seed 7" in shown.output
    assert (folder / TIMELINE).is_file()
    missing = CliRunner().invoke(main, ["report", "other"])
    assert missing.exit_code == 2 and "no run 'other'" in missing.output


def test_a_scenario_of_many_nemeses_has_a_folder_of_a_bounded_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scenario = find("+".join(["mixed", *find("everything").nemeses]))
    folder = commands._folder(scenario, 7, datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC))
    assert folder.is_dir() and folder.name.endswith("-7-20260131T000000")
