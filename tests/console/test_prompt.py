"""The demo's prompt obeys, explains and never falls over."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agentmem_node.cli.devlayout import DevClusterError
from agentmem_node.console.prompt import Prompt, split_user
from agentmem_node.console.show import Show
from agentmem_node.console.story import Demo


@pytest.fixture
def screen() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def prompt(tmp_path: Path, screen: io.StringIO) -> Iterator[Prompt]:
    """A prompt over a cluster that was never started: everything that can fail, fails."""
    demo = Demo(tmp_path)
    yield Prompt(demo, Show(Console(file=screen, width=200)))
    demo.close()


def test_quit_leaves_and_anything_else_stays(prompt: Prompt) -> None:
    assert not any(prompt.obey(word) for word in ("quit", " QUIT ", "exit", "q"))
    assert all(prompt.obey(line) for line in ("", "  ", "help", "people", "nonsense"))


def test_the_end_of_input_leaves_too(prompt: Prompt) -> None:
    def read(_question: str) -> str:
        raise EOFError

    prompt.run(read)


def test_a_typing_error_is_answered_with_the_nearest_command(
    prompt: Prompt, screen: io.StringIO
) -> None:
    prompt.obey("serch tea")
    assert "Did you mean 'search'?" in screen.getvalue()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("search", "Search for what?"),
        ("add", "Add what?"),
        ("kill", "Which node? 1, 2, 3"),
        ("kill 7", "There is no node 7"),
        ("kill 2", "is not running"),
        ("restart x", "There is no node x"),
        ("restart 2", "not started"),
        ("status", "No node runs"),
        ("cut", "Which node? 1, 2, 3"),
        ("cut 2", "is not running"),
        ("heal 2", "n2 is not cut off"),
        ("join", "No node runs"),
        ("move s03 2", "No node runs"),
        ("move s03", "Move which shard where?"),
        ("move s03 7", "There is no node 7"),
        ("drain", "Which node? 1, 2, 3"),
    ],
)
def test_what_cannot_be_done_is_said(
    prompt: Prompt, screen: io.StringIO, line: str, said: str
) -> None:
    assert prompt.obey(line)
    assert said in screen.getvalue()


def test_a_user_may_stand_before_the_words() -> None:
    assert split_user("@ana what tea") == ("ana", "what tea")
    assert split_user("what tea @ana") == (None, "what tea @ana")
    assert split_user("@ana") == (None, "@ana")


@pytest.mark.parametrize(
    "text",
    ["what tea --user ana", "--user ana what tea", "what --user ana tea", "what tea --user=ana"],
)
def test_a_user_may_be_given_as_on_the_command_line(text: str) -> None:
    assert split_user(text) == ("ana", "what tea")
    assert split_user("foo --user") == (None, "foo --user")


def test_a_memory_with_brackets_is_shown_as_it_is(prompt: Prompt, screen: io.StringIO) -> None:
    Show(Console(file=screen, width=200)).say("[bold]not markup[/bold] [/]")
    assert "[bold]not markup[/bold] [/]" in screen.getvalue()


def test_an_error_of_the_cluster_is_told_not_thrown(
    prompt: Prompt, screen: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_rest: str) -> Any:
        raise DevClusterError("the port is taken")

    monkeypatch.setitem(prompt._commands, "kill", fails)
    assert prompt.obey("kill 1")
    assert "the port is taken" in screen.getvalue()
