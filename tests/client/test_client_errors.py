"""The client's error tree matches the server's, and its public names are sorted and complete."""

from __future__ import annotations

from pathlib import Path

import pytest

import agentmem_client
from agentmem_client import errors
from agentmem_client.answers import error_of, is_retryable
from agentmem_cluster import errors as server


def server_errors() -> list[type[server.AgentMemError]]:
    """The tree itself: what is defined elsewhere stops a node, or stays between nodes."""
    found = [server.AgentMemError]
    for kind in found:
        found += [k for k in kind.__subclasses__() if k.__module__ == server.__name__]
    return found


@pytest.mark.parametrize("kind", server_errors(), ids=lambda kind: kind.code)
def test_every_code_of_the_server_has_a_class_here(kind: type[server.AgentMemError]) -> None:
    answer = {"code": kind.code, "detail": "what, why and what to do", "details": {"field": "x"}}
    error = error_of(kind.status, answer, "http://a")
    assert type(error).code == kind.code
    assert (error.status, error.message) == (kind.status, "what, why and what to do")
    assert error.details == {"field": "x"}


@pytest.mark.parametrize("kind", server_errors(), ids=lambda kind: kind.code)
def test_only_what_the_server_calls_retryable_is_retried(kind: type[server.AgentMemError]) -> None:
    # A full disk and a missing model pass too, but not within a call.
    lasting = kind.code in ("disk_full", "model_unavailable")
    assert is_retryable(kind.code, kind.status) == (kind.retryable and not lasting)


def test_a_code_of_a_newer_server_falls_back_to_its_status() -> None:
    assert type(error_of(409, {"code": "new_kind"}, "u")) is errors.Conflict
    assert type(error_of(418, {"code": "new_kind"}, "u")) is errors.BadRequest
    assert type(error_of(599, None, "u")) is errors.ServerError


def test_the_drawn_tree_names_every_class() -> None:
    drawn = errors.__doc__ or ""
    classes = [v for v in vars(errors).values() if isinstance(v, type)]
    missing = [c.__name__ for c in classes if issubclass(c, Exception) and c.__name__ not in drawn]
    assert missing == []


def test_public_names_are_sorted_and_complete() -> None:
    assert agentmem_client.__all__ == sorted(agentmem_client.__all__)
    classes = {name for name, v in vars(errors).items() if isinstance(v, type) and name[0] != "_"}
    assert classes - {"Any", "ClassVar"} <= set(agentmem_client.__all__)
    assert all(hasattr(agentmem_client, name) for name in agentmem_client.__all__)


def test_every_method_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    for name, method in vars(agentmem_client.Client).items():
        if callable(method) and not name.startswith("_") and name != "close":
            assert f"| `{name}(" in text
    for name in [v.__name__ for v in vars(errors).values() if isinstance(v, type)]:
        if name in agentmem_client.__all__ and name != "MethodNotAllowed":
            assert name in text
