"""Logs: for people on a terminal, for machines elsewhere, and never a key."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_node.observe.logs import JsonFormatter, set_up_logging, without_secrets

KEY = "am_" + "abcdefgh" + "2" * 44


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("agentmem")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_json_is_one_object_a_line_with_the_fields() -> None:
    stream = io.StringIO()
    set_up_logging("info", "auto", stream)
    logging.getLogger("agentmem.http").info("hello\nworld", extra={"fields": {"ms": 1.5}})
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["message"] == "hello\nworld"
    assert (entry["level"], entry["logger"], entry["ms"]) == ("info", "agentmem.http", 1.5)
    assert entry["time"].endswith("Z")


def test_a_terminal_gets_text() -> None:
    stream = Terminal()
    set_up_logging("info", "auto", stream)
    logging.getLogger("agentmem.http").warning("slow", extra={"fields": {"ms": 900}})
    assert "warning agentmem.http  slow  ms=900" in stream.getvalue()


def test_levels_are_ours_and_libraries_are_kept_to_warnings() -> None:
    stream = io.StringIO()
    set_up_logging("debug", "text", stream)
    logging.getLogger("agentmem.raft").debug("ours")
    logging.getLogger("aiohttp.server").info("theirs")
    logging.getLogger("aiohttp.server").warning("their warning")
    text = stream.getvalue()
    assert "ours" in text
    assert "theirs" not in text
    assert "their warning" in text


def test_setting_up_twice_does_not_log_twice() -> None:
    stream = io.StringIO()
    set_up_logging("info", "text", stream)
    set_up_logging("info", "text", stream)
    logging.getLogger("agentmem").info("once")
    assert stream.getvalue().count("once") == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_key_never_gets_into_a_log(form: str) -> None:
    stream = io.StringIO()
    set_up_logging("info", form, stream)
    log = logging.getLogger("agentmem.http")
    log.info("key %s refused", KEY, extra={"fields": {"header": f"Bearer {KEY}"}})
    try:
        raise ValueError(f"bad key {KEY}")
    except ValueError:
        log.exception("failed")
    assert KEY not in stream.getvalue()
    assert "am_abcdefgh..." in stream.getvalue()


@given(st.text(max_size=40), st.text(max_size=40))
def test_what_is_no_key_is_left_as_it_is(before: str, after: str) -> None:
    if "am_" not in before + after:
        assert without_secrets(before + after) == before + after
    assert KEY not in without_secrets(f"{before} {KEY} {after}")


def test_values_that_json_does_not_know_are_logged_as_text() -> None:
    record = logging.LogRecord("agentmem", 20, __file__, 1, "m", (), None)
    record.fields = {"error": OSError("x"), "where": sys}
    assert json.loads(JsonFormatter().format(record))["error"] == "x"
