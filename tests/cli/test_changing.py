"""`agentmem cluster move`, `drain`, ...: they show, ask, watch, and never act by mistake."""

from __future__ import annotations

import asyncio
from typing import Any

import click
import pytest

import agentmem_client as client
from agentmem_cluster.errors import Unavailable
from agentmem_node.cli import following, plan_view
from agentmem_node.cli.admin import Admin
from agentmem_node.cli.exits import Exit
from agentmem_node.model import operations as ops
from agentmem_node.security.keys import KeyOwner, KeyTable, hash_key

KEY_ANA, KEY_OPS = "am_" + "a" * 52, "am_" + "o" * 52


@pytest.fixture(autouse=True)
def _there(agentmem: Any, operators: Any) -> None:
    """The environment that `agentmem` clears is set by `operators` afterwards."""


CHANGES = [
    ("move", "s03", "n4"),
    ("move", "s03", "n4", "--away-from", "n2"),
    ("drain", "n3"),
    ("remove", "n3"),
]


@pytest.mark.parametrize("change", CHANGES, ids=" ".join)
def test_a_change_shows_its_plan_asks_and_is_carried_out(
    agentmem: Any, operators: Any, change: tuple[str, ...]
) -> None:
    done = agentmem("cluster", *change, terminal=True, typed="y\n")
    assert done.code == Exit.OK, done.err
    assert "Go on? [y/N]" in done.err
    for said in ("s03", "n1 n2 n3", "3.0 MiB", "about 300 ms", "n4 is in the same zone as n1"):
        assert said in done.out
    assert "done" in done.out
    (operation,) = operators.stored
    assert operation.state == "done" and "n4" in operators.shards["s03"]


def test_a_move_names_who_gives_its_replica_up(agentmem: Any, operators: Any) -> None:
    assert agentmem("cluster", "move", "s03", "n4", "--away-from", "n2", "--yes").code == Exit.OK
    assert operators.shards["s03"] == ["n1", "n3", "n4"]


@pytest.mark.parametrize("answer", ["n\n", "\n", "nonsense\nno\n"])
def test_without_a_yes_nothing_is_changed(agentmem: Any, operators: Any, answer: str) -> None:
    refused = agentmem("cluster", "drain", "n3", terminal=True, typed=answer)
    assert refused.code == Exit.FAILED
    assert "Nothing was changed." in refused.err
    assert operators.stored == []


def test_where_nobody_can_be_asked_the_plan_is_shown_and_nothing_changed(
    agentmem: Any, operators: Any
) -> None:
    refused = agentmem("cluster", "drain", "n3")
    assert refused.code == Exit.USAGE
    assert "--yes" in refused.err
    assert refused.json["operation"] is None
    assert len(refused.json["plan"]["steps"]) == 4
    assert operators.stored == []


def test_json_is_one_document_with_the_plan_and_how_it_ended(agentmem: Any) -> None:
    told = agentmem("cluster", "drain", "n3", "--yes", "--json", terminal=True).json
    assert told["plan"]["wish"]["kind"] == "drain"
    assert told["operation"]["state"] == "done"
    assert {step["state"] for step in told["operation"]["steps"]} == {"done"}


def test_whoever_is_asked_sees_the_plan_even_when_json_goes_to_stdout(agentmem: Any) -> None:
    done = agentmem("cluster", "drain", "n3", "--json", typed="y\n")
    assert done.json["operation"]["state"] == "done"
    assert done.err.index("4 shards, 12.0 MiB to copy") < done.err.index("Go on?")


def test_a_dry_run_neither_asks_nor_changes(agentmem: Any, operators: Any) -> None:
    shown = agentmem("cluster", "drain", "n3", "--dry-run", "--yes", terminal=True)
    assert shown.code == Exit.OK
    assert "4 shards, 12.0 MiB to copy" in shown.out
    assert operators.stored == []


def test_nothing_to_do_is_said_and_not_asked(agentmem: Any, operators: Any) -> None:
    shown = agentmem("cluster", "rebalance", terminal=True)
    assert shown.code == Exit.OK
    assert "no shard has to move" in shown.out
    assert agentmem("cluster", "rebalance").json["operation"] is None
    assert operators.stored == []


def test_a_node_without_replicas_is_drained_all_the_same(agentmem: Any, operators: Any) -> None:
    for arguments, kind in ((("n4",), "drain"), (("n4", "--undo"), "undrain")):
        assert agentmem("cluster", "drain", *arguments, "--yes").code == Exit.OK
        assert operators.stored[0].wish.kind == kind


def test_a_detached_operation_is_begun_and_not_waited_for(agentmem: Any, operators: Any) -> None:
    operators.is_held = True
    begun = agentmem("cluster", "drain", "n3", "--yes", "--detach", terminal=True)
    assert begun.code == Exit.OK
    assert "agentmem cluster operations op1 --watch" in begun.out
    assert "agentmem cluster stop op1" in begun.out
    told = agentmem("cluster", "drain", "n3", "--yes", "--detach").json
    assert (told["operation"]["id"], told["operation"]["state"]) == ("op2", "running")


def test_ctrl_c_stops_watching_and_not_the_operation(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_self: Admin, _id: str) -> ops.Operation:
        raise KeyboardInterrupt

    monkeypatch.setattr(Admin, "operation", interrupted)
    left = agentmem("cluster", "drain", "n3", "--yes")
    assert left.code == Exit.INTERRUPTED
    assert "goes on" in left.err
    assert "agentmem cluster operations op1 --watch" in left.err
    assert "agentmem cluster stop op1" in left.err
    assert operators.stored[0].state == "running"
    assert not any(name == "stop" for name, _ in operators.callers)


def test_an_operation_that_fails_ends_with_1_and_the_reason(agentmem: Any, operators: Any) -> None:
    operators.failing = {"s02"}
    failed = agentmem("cluster", "drain", "n3", "--yes")
    assert failed.code == Exit.FAILED
    assert "s02: the disk of n4 is full" in failed.err
    assert "agentmem cluster resume op1" in failed.err
    assert failed.json["operation"]["state"] == "failed"


def test_an_operation_that_somebody_stops_ends_with_how_to_go_on(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Admin.operation

    def stopped(self: Admin, operation_id: str) -> ops.Operation:
        operators.stored[0].state = "stopped"
        return asked(self, operation_id)

    monkeypatch.setattr(Admin, "operation", stopped)
    ended = agentmem("cluster", "drain", "n3", "--yes")
    assert ended.code == Exit.FAILED
    assert "was stopped" in ended.err and "agentmem cluster resume op1" in ended.err


def test_a_cluster_that_does_not_answer_for_a_while_is_waited_for(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, silent = Admin.operation, [True] * 3

    def now_and_then(self: Admin, operation_id: str) -> ops.Operation:
        if silent:
            silent.pop()
            raise client.NoQuorum("A majority is gone.", status=503)
        return asked(self, operation_id)

    monkeypatch.setattr(Admin, "operation", now_and_then)
    assert agentmem("cluster", "drain", "n3", "--yes").code == Exit.OK
    silent += [True] * 10_000
    monkeypatch.setattr(following, "_SILENCE_S_MAX", 0.05)
    gone = agentmem("cluster", "move", "s00", "n3", "--yes")
    assert gone.code == Exit.UNAVAILABLE
    assert "A majority is gone." in gone.err and "agentmem cluster operations op2" in gone.err


def test_whether_it_began_is_said_to_be_unknown_when_it_is(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_caller: Any, _wish: Any) -> ops.Operation:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(operators, "begin_operation", never)
    late = agentmem("cluster", "drain", "n3", "--yes", "--timeout", "0.5")
    assert late.code == Exit.UNAVAILABLE
    assert "not known whether" in late.err and "agentmem cluster operations" in late.err
    assert "--idempotency-key" not in late.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("move", "s3", "n4", "--yes"), Exit.NOT_FOUND, "Did you mean 's03'?"),
        (("move", "s03", "m4", "--yes"), Exit.NOT_FOUND, "Did you mean 'n4'?"),
        (("move", "s03", "n4", "--away-from", "x", "--yes"), Exit.NOT_FOUND, "There are: n1, n2"),
        (("drain", "n", "--yes"), Exit.NOT_FOUND, "Did you mean 'n"),
        (("move", "s03", "n4", "--away-from", "n4", "--yes"), Exit.USAGE, "is none"),
        (("move", "s03"), Exit.USAGE, "Missing argument 'NODE'"),
        (("drain",), Exit.USAGE, "Missing argument 'NODE'"),
        (("split", "s03", "--at", "0"), Exit.USAGE, "--at"),
        (("split", "s03", "--at", "16384"), Exit.USAGE, "--at"),
        (("split", "", "--yes"), Exit.USAGE, "shard"),
        (("drain", "n" * 100, "--yes"), Exit.USAGE, "64"),
        (("stop", "op7"), Exit.NOT_FOUND, "no operation 'op7'"),
        (("resume", "../plan"), Exit.NOT_FOUND, "no operation '../plan'"),
        (("operations", "op 1/2"), Exit.NOT_FOUND, "no operation 'op 1/2'"),
        (("rebalence",), Exit.USAGE, "Did you mean 'rebalance'?"),
    ],
)
def test_bad_input_says_what_is_wrong_and_changes_nothing(
    agentmem: Any, operators: Any, arguments: tuple[str, ...], code: Exit, said: str
) -> None:
    wrong = agentmem("cluster", *arguments)
    assert wrong.code == code, wrong.err
    assert said in wrong.err
    assert operators.stored == []


def test_operations_are_listed_shown_stopped_and_resumed(agentmem: Any, operators: Any) -> None:
    assert "no operation" in agentmem("cluster", "operations", terminal=True).out
    operators.is_held = True
    agentmem("cluster", "drain", "n3", "--yes", "--detach")
    agentmem("cluster", "move", "s03", "n4", "--yes", "--detach")
    listed = agentmem("cluster", "operations").json["operations"]
    assert [operation["id"] for operation in listed] == ["op2", "op1"]
    table = agentmem("cluster", "operations", terminal=True).out
    assert "move s03 to n4" in table and "drain n3" in table and "0 of 4 shards" in table
    one = agentmem("cluster", "operations", "op1", terminal=True).out
    assert "s02" in one and "pending" in one and "move s03" not in one
    assert agentmem("cluster", "operations", "op1").json["id"] == "op1"
    stopped = agentmem("cluster", "stop", "op1", terminal=True)
    assert "stopped" in stopped.out and "agentmem cluster resume op1" in stopped.out
    assert agentmem("cluster", "stop", "op1").code == Exit.CONFLICT
    assert agentmem("cluster", "resume", "op1").json["state"] == "running"
    assert agentmem("cluster", "resume", "op1").code == Exit.CONFLICT
    shown = agentmem("cluster", "operations", "op1", terminal=True)
    assert "running" in shown.out


def test_an_operation_is_watched_until_it_ends(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem_node.cli.operating._WATCH_S", 0.01)
    agentmem("cluster", "drain", "n3", "--yes", "--detach")
    watched = agentmem("cluster", "operations", "op1", "--watch", terminal=True)
    assert watched.code == Exit.OK
    assert "4 of 4 shards, 12.0 MiB of 12.0 MiB" in watched.out


def test_check_prints_a_line_for_each_invariant_and_ends_with_4_when_one_is_broken(
    agentmem: Any, operators: Any
) -> None:
    operators.findings = [ops.Finding(name="one serving epoch", ok=True, message="4 shards")]
    whole = agentmem("cluster", "check", terminal=True)
    assert whole.code == Exit.OK
    assert click.unstyle(whole.out).split() == ["ok", "one", "serving", "epoch", "4", "shards"]
    operators.findings.append(
        ops.Finding(name="equal digests", ok=False, message="s02: n3 differs at entry 117")
    )
    broken = agentmem("cluster", "check", terminal=True)
    assert broken.code == Exit.UNAVAILABLE
    assert [line.split()[0] for line in click.unstyle(broken.out).splitlines()] == ["ok", "FAILED"]
    assert agentmem("cluster", "check").json["ok"] is False


def test_a_key_without_admin_rights_ends_with_6(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operators.keys = KeyTable(
        {
            hash_key(KEY_ANA): KeyOwner("ana", "laptop"),
            hash_key(KEY_OPS): KeyOwner("ops", "pager", True),
        }
    )
    refused = agentmem("cluster", "drain", "n3", "--yes", "--api-key", KEY_ANA)
    assert refused.code == Exit.NOT_ALLOWED
    assert "'laptop'" in refused.err and "agentmem key new --admin" in refused.err
    assert agentmem("cluster", "drain", "n3", "--yes").code == Exit.NOT_ALLOWED
    assert operators.stored == []
    assert agentmem("cluster", "drain", "n3", "--yes", "--api-key", KEY_OPS).code == Exit.OK
    assert operators.stored[0].by == "pager"


def test_what_the_cluster_cannot_do_now_ends_with_4(
    agentmem: Any, operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_leader(_caller: Any, _wish: Any) -> ops.OperationPlan:
        raise Unavailable("The meta group has no leader.")

    monkeypatch.setattr(operators, "plan", no_leader)
    refused = agentmem("cluster", "drain", "n3", "--yes", "--timeout", "0.5")
    assert refused.code == Exit.UNAVAILABLE
    assert "The meta group has no leader." in refused.err


def test_status_shows_running_operations_zones_and_who_is_draining(
    agentmem: Any, operators: Any
) -> None:
    operators.is_held = True
    agentmem("cluster", "drain", "n1", "--yes", "--detach")
    shown = click.unstyle(agentmem("cluster", "status", terminal=True).out)
    assert "draining" in shown and "rack 7" in shown
    assert "drain n1: running, 0 of 4 shards" in shown
    told = agentmem("cluster", "status").json
    assert [operation["id"] for operation in told["operations"]] == ["op1"]
    assert (told["nodes"][0]["state"], told["nodes"][0]["zone"]) == ("draining", "rack 7")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (12 << 20, "12.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5000 << 40, "5,000.0 TiB"),
    ],
)
def test_sizes_are_shown_in_units_that_people_read(size: int, text: str) -> None:
    assert plan_view.size_text(size) == text
