"""`agentmem add` to `history`: what they store, print and return."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import agentmem_client as client
from agentmem_node.cli.exits import Exit


@pytest.fixture(autouse=True)
def _there(fake: Any, agentmem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_URL", fake.urls["n1"])


def test_what_is_added_is_found_listed_shown_changed_and_deleted(agentmem: Any) -> None:
    added = agentmem("add", "Ana likes tea", "--user", "ana", "--metadata", "city=Oslo").json
    memory_id = added["results"][0]["id"]
    assert agentmem("search", "tea", "--user", "ana").json["results"][0]["id"] == memory_id
    assert [m["id"] for m in agentmem("list", "--user", "ana").json["results"]] == [memory_id]
    assert agentmem("get", memory_id).json["metadata"] == {"city": "Oslo"}
    assert agentmem("update", memory_id, "Ana likes coffee").json["version"] == 2
    assert agentmem("history", memory_id).json["results"][0]["event"] == "ADD"
    assert agentmem("delete", memory_id).code == Exit.OK
    assert agentmem("get", memory_id).code == Exit.NOT_FOUND


def test_a_terminal_gets_tables_and_json_only_on_request(agentmem: Any) -> None:
    memory_id = agentmem("add", "Ana likes [bold]tea[/bold]", "--user", "ana").json["results"][0][
        "id"
    ]
    table = agentmem("search", "tea", terminal=True).out
    assert "score" in table and "Ana likes [bold]tea[/bold]" in table and memory_id in table
    assert agentmem("search", "tea", "--json", terminal=True).json["results"]
    for arguments in (("list",), ("get", memory_id), ("history", memory_id)):
        shown = agentmem(*arguments, terminal=True)
        assert shown.code == 0 and not shown.out.startswith("{")


def test_a_lost_race_ends_with_its_own_code(agentmem: Any) -> None:
    memory_id = agentmem("add", "tea", "--user", "ana").json["results"][0]["id"]
    assert agentmem("update", memory_id, "a", "--expected-version", "1").code == Exit.OK
    lost = agentmem("update", memory_id, "b", "--expected-version", "1")
    assert lost.code == Exit.CONFLICT
    assert lost.err.startswith("error: ")


def test_what_the_server_refuses_is_wrong_usage(agentmem: Any) -> None:
    refused = agentmem("add", "", "--user", "ana")
    assert refused.code == Exit.USAGE
    assert "`content` is empty" in refused.err


def test_without_a_node_the_command_says_what_to_do_and_soon(
    agentmem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AGENTMEM_URL", f"127.0.0.1:{held.getsockname()[1]}")
        gone = agentmem("search", "tea")
    assert gone.code == Exit.UNAVAILABLE
    assert "Connection refused" in gone.err and "agentmem serve" in gone.err


def test_a_missing_key_has_a_code_and_a_hint(agentmem: Any, fake: Any) -> None:
    fake.refuse = lambda _node, _request: web.json_response(
        {"code": "unauthorized", "detail": "This node needs an API key."}, status=401
    )
    refused = agentmem("search", "tea")
    assert refused.code == Exit.NOT_ALLOWED
    assert "AGENTMEM_API_KEY" in refused.err


def test_the_key_comes_from_the_environment(
    agentmem: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMEM_API_KEY", "am_key")
    agentmem("search", "tea")
    assert fake.seen[-1][3]["Authorization"] == "Bearer am_key"


def test_a_file_of_lines_is_one_memory_a_line(agentmem: Any, fake: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Ana likes tea\nBen likes rye bread\n")
    assert agentmem("add", "--file", str(path), "--user", "ana").code == Exit.OK
    assert [m["content"] for m in fake.memories.values()] == [
        "Ana likes tea",
        "Ben likes rye bread",
    ]


def test_json_lines_keep_their_own_fields_and_take_the_rest_from_the_options(
    agentmem: Any, fake: Any, tmp_path: Path
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"content": "a", "user_id": "ben"}\n\n{"content": "b"}\n')
    added = agentmem("add", "--file", str(path), "--user", "ana", "--category", "diary")
    assert added.code == Exit.OK and len(added.json["results"]) == 2
    stored = list(fake.memories.values())
    assert [m["user_id"] for m in stored] == ["ben", "ana"]
    assert [m["categories"] for m in stored] == [["diary"], ["diary"]]


def test_what_list_prints_as_json_lines_add_reads_back(
    agentmem: Any, fake: Any, tmp_path: Path
) -> None:
    for i in range(7):
        agentmem("add", f"fact {i}", "--user", "ana", "--metadata", f"n={i}")
    copy = tmp_path / "copy.jsonl"
    copy.write_text(agentmem("list", "--all", "--jsonl").out)
    before = {(m["content"], m["metadata"]["n"]) for m in fake.memories.values()}
    fake.memories.clear()
    assert agentmem("add", "--file", str(copy)).code == Exit.OK
    assert {(m["content"], m["metadata"]["n"]) for m in fake.memories.values()} == before


def test_standard_input_is_read_with_a_dash(
    agentmem: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("té\nmaté\n".encode())))
    assert agentmem("add", "--file", "-", "--user", "ana").code == Exit.OK
    ids = list(fake.memories)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(ids).encode())))
    assert agentmem("delete", "-").code == Exit.OK
    assert fake.memories == {}


def test_a_bad_line_is_refused_and_named_and_the_others_are_stored(
    agentmem: Any, fake: Any, tmp_path: Path
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text('{"content": "good"}\n{"content": ""}\n')
    added = agentmem("add", "--file", str(path), "--user", "ana")
    assert added.code == Exit.USAGE
    assert "memory 2" in added.err
    assert len(fake.memories) == 1


def test_a_file_that_failed_midway_can_be_repeated_without_storing_twice(
    agentmem: Any, fake: Any, tmp_path: Path
) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"content": f"fact {i}"}) + "\n" for i in range(450)))
    batches = 0

    def full(_node: str, request: web.Request) -> web.Response | None:
        nonlocal batches
        batches += request.path.endswith("/batch")
        body = {"code": "disk_full", "detail": "The disk is full."}
        return web.json_response(body, status=503) if batches > 1 else None

    fake.refuse = full
    failed = agentmem("add", "--file", str(path), "--user", "ana")
    assert failed.code == Exit.UNAVAILABLE
    assert "200 of the memories were stored" in failed.err
    key = failed.err.rsplit("--idempotency-key ", 1)[1].split()[0]
    fake.refuse = lambda _node, _request: None
    repeated = agentmem("add", "--file", str(path), "--user", "ana", "--idempotency-key", key)
    assert repeated.code == Exit.OK
    assert sorted(m["content"] for m in fake.memories.values()) == sorted(
        f"fact {i}" for i in range(450)
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serch", "tea"), "Did you mean 'search'?"),
        (("config", "explian", "x"), "Did you mean 'explain'?"),
        (("cluster", "stat"), "Did you mean 'status'?"),
        (("add",), "Give a text"),
        (("add", "a", "--file", "b"), "Give a text"),
        (("add", "a", "--metadata", "oslo"), "KEY=VALUE"),
        (("search", "a", "--filter", "{"), "not JSON"),
        (("search", "a", "--filter", "[]"), "JSON object"),
        (("search", "a", "--legs", "bm25=much"), "not a weight"),
        (("search", "a", "--url", ","), "URL"),
        (("list", "--limit", "0"), "--limit"),
        (("update", "x"), "new text"),
        (("delete", "a", "b", "--expected-version", "1"), "one id"),
        (("serve", "--set", "raft"), "SECTION.KEY=VALUE"),
        (("serve", "--set", "raft.heartbeat=5"), "Did you mean 'raft.heartbeat_ms'?"),
        (("cluster", "dev", "--set", "node.idd=x"), "Did you mean 'node.id'?"),
        (("add", "--file", "/nowhere/at/all"), "Cannot read"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(
    agentmem: Any, arguments: tuple[str, ...], said: str
) -> None:
    wrong = agentmem(*arguments)
    assert wrong.code == Exit.USAGE
    assert said in wrong.err


def test_only_the_asked_number_is_listed_and_more_is_told(agentmem: Any) -> None:
    for i in range(6):
        agentmem("add", f"fact {i}", "--user", "ana")
    listed = agentmem("list", "--limit", "4").json
    assert (len(listed["results"]), listed["has_more"]) == (4, True)
    listed = agentmem("list", "--limit", "6").json
    assert (len(listed["results"]), listed["has_more"]) == (6, False)


def test_legs_are_names_or_weights(agentmem: Any, fake: Any) -> None:
    assert agentmem("search", "tea", "--legs", "bm25,vector").code == 0
    assert agentmem("search", "tea", "--legs", "bm25=1,vector=2").code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_the_terminal_has_not_are_no_obstacle(fake: Any, encoding: str) -> None:
    command = [sys.executable, "-m", "agentmem_node.cli.main"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "AGENTMEM_URL": fake.urls["n1"]}
    text = "Győr, Zürich, 東京 😀"
    item = fake.store({"content": text, "user_id": "ana"})
    for arguments in (["list", "--json"], ["list", "--jsonl"], ["config", "explain", "nó.ő"]):
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, timeout=20, check=False
        )
        assert b"Traceback" not in done.stderr
        if arguments == ["list", "--json"]:
            found = json.loads(done.stdout.decode(encoding))["results"]
            assert [(m["id"], m["content"]) for m in found] == [(item["id"], text)]


def test_ctrl_c_in_a_file_says_how_to_go_on_without_storing_twice(
    agentmem: Any, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"line {number}\n" for number in range(450)))
    really, stored = client.Client.add_many, 0

    def interrupted(self: Any, items: Any, **options: Any) -> Any:
        progress = options.pop("progress")

        def stop(done: int, part: Any) -> None:
            nonlocal stored
            stored = done
            progress(done, part)
            raise KeyboardInterrupt

        return really(self, items, progress=stop, **options)

    with monkeypatch.context() as patched:
        patched.setattr(client.Client, "add_many", interrupted)
        stopped = agentmem("add", "--file", str(lines), "--user", "ana")
    assert stopped.code == Exit.INTERRUPTED
    assert f"Stopped after {stored} memories" in stopped.err
    key = stopped.err.split()[-1]
    again = agentmem("add", "--file", str(lines), "--user", "ana", "--idempotency-key", key)
    assert again.code == Exit.OK
    assert len(fake.memories) == 450


def test_nothing_to_delete_is_said_as_json_too(
    agentmem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert agentmem("delete", "-").json == {"results": []}
