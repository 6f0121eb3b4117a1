"""Bad input is answered with what is wrong, why and what to do, and changes nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem_cluster.errors import InternalError

Run = Callable[..., None]
MEMORIES = "/api/v1/memories"
SEARCH = "/api/v1/memories/search"


def check_error(answer: Any, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json
    assert (answer.status, body["code"]) == (status, code), body
    assert body["detail"] == body["error"]
    assert set(body) <= {"detail", "error", "code", "details"}
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]
    return body


# (path, body, status, code, field, a part of the text)
BODIES: list[tuple[str, Any, int, str, str | None, str]] = [
    (MEMORIES, b"", 400, "bad_request", None, "body is empty"),
    (MEMORIES, b"  \n", 400, "bad_request", None, "body is empty"),
    (MEMORIES, b"{", 400, "bad_request", None, "not JSON"),
    (MEMORIES, b'{"content": "a"} trailing', 400, "bad_request", None, "trailing"),
    (MEMORIES, b'{"content": "\xff"}', 400, "bad_request", None, "not UTF-8"),
    (MEMORIES, b'\xef\xbb\xbf{"content": "a"}', 400, "bad_request", None, "byte order mark"),
    (MEMORIES, b'{"content": "\\ud800"}', 400, "bad_request", None, "second half"),
    (MEMORIES, b'{"content": "a\x00"}', 400, "bad_request", None, "NUL"),
    (MEMORIES, b'{"vector": [NaN]}', 400, "bad_request", None, "NaN and Infinity are not JSON"),
    (MEMORIES, b'{"vector": [-Infinity]}', 400, "bad_request", None, "NaN and Infinity"),
    (MEMORIES, b'{"vector": [1e999]}', 400, "invalid_field", "vector[0]", "out of range"),
    (
        MEMORIES,
        b'{"metadata": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
        400,
        "bad_request",
        None,
        "nested too deep",
    ),
    (
        MEMORIES,
        b'{"metadata": {"a": ' + b"9" * 5000 + b"}}",
        400,
        "invalid_field",
        "metadata.*",
        "out of range",
    ),
    (MEMORIES, b"[]", 400, "invalid_field", "", "expected `object`, got `array`"),
    (MEMORIES, b"null", 400, "invalid_field", "", "expected `object`"),
    (
        MEMORIES,
        {"content": "a", "user": "u"},
        400,
        "invalid_field",
        "user",
        "Did you mean `user_id`",
    ),
    (
        MEMORIES,
        {"content": "a", "x" * 3000: 1},
        400,
        "invalid_field",
        "x" * 100 + "...",
        "no field",
    ),
    (MEMORIES, {"content": 5}, 400, "invalid_field", "content", "expected `str"),
    (MEMORIES, {"user_id": ""}, 400, "invalid_field", "user_id", "length >= 1"),
    (MEMORIES, {"user_id": "x" * 257}, 400, "invalid_field", "user_id", "length <= 256"),
    (MEMORIES, {"importance": 1.5}, 400, "invalid_field", "importance", "<= 1"),
    (MEMORIES, {"memory_type": "dream"}, 400, "invalid_field", "memory_type", "'dream'"),
    (
        MEMORIES,
        {"messages": [{"role": "bot", "content": "a"}]},
        400,
        "invalid_field",
        "messages[0].role",
        "'bot'",
    ),
    (
        MEMORIES,
        {"messages": [{"role": "user"}]},
        400,
        "invalid_field",
        "messages[0].content",
        "missing",
    ),
    (f"{MEMORIES}/batch", {"memories": []}, 400, "invalid_field", "memories", "empty"),
    (f"{MEMORIES}/batch", {}, 400, "invalid_field", "memories", "missing"),
    (f"{MEMORIES}/batch", {"memories": [{}] * 6}, 413, "too_large", "memories", "limit is 5"),
    (
        f"{MEMORIES}/batch",
        {"memories": [{}], "memory": 1},
        400,
        "invalid_field",
        "memory",
        "Did you mean `memories`",
    ),
    (f"{MEMORIES}/batch", {"memories": {}}, 400, "invalid_field", "memories", "got `object`"),
    (f"{MEMORIES}/batch/delete", {"ids": []}, 400, "invalid_field", "ids", "empty"),
    (f"{MEMORIES}/batch/delete", {"ids": ["a"] * 6}, 413, "too_large", "ids", "limit is 5"),
    (f"{MEMORIES}/batch/delete", {"ids": [1]}, 400, "invalid_field", "ids[0]", "expected `str`"),
    (SEARCH, {"query": "a", "top_k": 0}, 400, "invalid_field", "top_k", ">= 1"),
    (SEARCH, {"query": "a", "top_k": 1001}, 400, "invalid_field", "top_k", "at most 1000"),
    (SEARCH, {"query": "a", "top_k": 10**30}, 400, "invalid_field", "top_k", "at most 1000"),
    (SEARCH, {"query": "a", "top_k": True}, 400, "invalid_field", "top_k", "`bool`"),
    (SEARCH, {"query": "a" * 9000}, 413, "too_large", "query", "9,000 bytes"),
    (SEARCH, {"query": "ä" * 5000}, 413, "too_large", "query", "10,000 bytes"),
    (SEARCH, {"legs": ["vektor"]}, 400, "invalid_field", "legs[0]", "'vektor'"),
    (SEARCH, {"legs": {"vektor": 1}}, 400, "invalid_field", "legs", "as a key"),
    (SEARCH, {"legs": {"bm25": "much"}}, 400, "invalid_field", "legs.*", "expected `float`"),
    (SEARCH, {"threshold": 1.1}, 400, "invalid_field", "threshold", "<= 1"),
    (SEARCH, {"consistency": "strong"}, 400, "invalid_field", "consistency", "'strong'"),
    (SEARCH, {"filters": [1]}, 400, "invalid_field", "filters", "got `array`"),
    (f"{SEARCH}/batch", {"searches": []}, 400, "invalid_field", "searches", "empty"),
    (f"{SEARCH}/batch", {"searches": [{}] * 51}, 413, "too_large", "searches", "limit is 50"),
]


def test_a_wrong_body_is_refused_by_name_and_reaches_nobody(run: Run) -> None:
    async def scenario(node: Any) -> None:
        for path, body, status, code, field, text in BODIES:
            answer = await node.ask("POST", path, body)
            error = check_error(answer, status, code)
            assert text in error["detail"], (text, error)
            if field is not None:
                assert error["details"]["field"] == field, error
        assert node.service.calls == []
        # The connection and the node go on as if nothing had been.
        assert (await node.post("/memories", {"content": "a", "user_id": "u"})).status == 201

    run(scenario, limits__batch_items_max=5)


@pytest.mark.parametrize(
    ("path", "field", "text"),
    [
        ("/memories?limit=0", "limit", ">= 1"),
        ("/memories?limit=1001", "limit", "the largest page is 1000"),
        ("/memories?limit=ten", "limit", "expected `int`"),
        ("/memories?user=ana", "user", "Did you mean `user_id`"),
        ("/memories?user_id=a&user_id=b", "user_id", "given twice"),
        ("/memories?filters={", "filters", "is not JSON"),
        ("/memories?filters=[1]", "filters", "got `array`"),
        ("/memories?consistency=strong", "consistency", "'strong'"),
        ("/memories/00000000-0000-8000-8000-000000000001?consistncy=session", "consistncy", "Did"),
        ("/memories/00000000-0000-8000-8000-000000000001/history?x=1", "x", "no parameter"),
        ("/cluster?x=1", "x", "no parameter"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(run: Run, path: str, field: str, text: str) -> None:
    async def scenario(node: Any) -> None:
        error = check_error(await node.get(path), 400, "invalid_field")
        assert error["details"]["field"] == field
        assert text in error["detail"]
        assert node.service.calls == []

    run(scenario)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Idempotency-Key", ""),
        ("Idempotency-Key", "with a space"),
        ("Idempotency-Key", "k" * 256),
        ("Idempotency-Key", "schlüssel"),
        ("X-AgentMem-Deadline-Ms", "0"),
        ("X-AgentMem-Deadline-Ms", "-5"),
        ("X-AgentMem-Deadline-Ms", "soon"),
        ("X-AgentMem-Deadline-Ms", "1.5"),
        ("X-AgentMem-Deadline-Ms", "٣"),
        ("Content-Encoding", "gzip"),
        ("Expect", "200-maybe"),
    ],
)
def test_a_wrong_header_is_refused_by_name(run: Run, header: str, value: str) -> None:
    async def scenario(node: Any) -> None:
        body = {"content": "a" * (300_000 if header == "Expect" else 1), "user_id": "u"}
        answer = await node.ask("POST", MEMORIES, body, {header: value})
        assert answer.status == 400
        assert header in answer.json["detail"] or "packed" in answer.json["detail"]
        assert node.service.calls == []

    run(scenario)


@pytest.mark.parametrize("tag", ["3", '"three"', 'W/"3"', '"3", "4"', '"0"', '"-1"', "", '"'])
def test_an_etag_that_the_api_never_made_is_refused(run: Run, tag: str) -> None:
    async def scenario(node: Any) -> None:
        path = f"{MEMORIES}/{await node.add()}"
        for method in ("PATCH", "DELETE"):
            answer = await node.ask(method, path, {"content": "b"}, {"If-Match": tag})
            check_error(answer, 400, "bad_request")
        assert [name for name, _ in node.service.calls] == ["add"]

    run(scenario)


def test_unknown_paths_and_methods_are_answered_in_json(run: Run) -> None:
    async def scenario(node: Any) -> None:
        for path in (
            "/",
            "/nothing",
            "/api/v1",
            "/api/v2/memories",
            "/api/v1/memories/a/b/c",
            "/api/v1/memories/a%2Fb/x",
            "/" + "x" * 5000,
        ):
            error = check_error(await node.ask("GET", path), 404, "not_found")
            assert len(error["detail"]) < 400
        for method, path, allow in (
            ("PUT", MEMORIES, "GET, HEAD, OPTIONS, POST"),
            ("GET", SEARCH, "OPTIONS, POST"),
            ("POST", f"{MEMORIES}/abc", "DELETE, GET, HEAD, OPTIONS, PATCH"),
            ("PROPFIND", "/health/live", "GET, HEAD, OPTIONS"),
        ):
            answer = await node.ask(method, path)
            check_error(answer, 405, "method_not_allowed")
            assert answer.headers["Allow"] == allow

    run(scenario)


def test_head_and_options_say_what_get_would(run: Run) -> None:
    async def scenario(node: Any) -> None:
        path = f"{MEMORIES}/{await node.add()}"
        got, head = await node.ask("GET", path), await node.ask("HEAD", path)
        assert (head.status, head.body) == (200, b"")
        for name in ("ETag", "Content-Length", "Content-Type", "X-AgentMem-Token"):
            assert head.headers[name] == got.headers[name]
        options = await node.ask("OPTIONS", path)
        assert (options.status, options.body) == (204, b"")
        assert options.headers["Allow"] == "DELETE, GET, HEAD, OPTIONS, PATCH"
        assert (await node.ask("HEAD", "/nothing")).status == 404

    run(scenario)


def test_an_escaped_slash_stays_within_the_id(run: Run) -> None:
    async def scenario(node: Any) -> None:
        answer = await node.ask("GET", f"{MEMORIES}/a%2Fb%20c")
        assert "'a/b c'" in check_error(answer, 404, "not_found")["detail"]

    run(scenario)


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"GET / HTTP/9.9\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n" % (b"a" * 40_000),
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: %s\r\n\r\n" % (b"a" * 40_000),
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Many: 1\r\n" * 500 + b"\r\n",
        b"POST /api/v1/memories HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /api/v1/memories HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/v1/memories HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_answered_400_in_json_and_closed(
    run: Run, junk: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(node: Any) -> None:
        head, _, body = (await node.raw(junk)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), head
        assert b"Connection: close" in head
        assert json.loads(body)["code"] == "bad_request"
        assert (await node.ask("GET", "/health/live")).status == 200

    run(scenario)
    # A stranger's noise is not the operator's.
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bodies=st.lists(
        st.binary(max_size=200)
        | st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["content", "user_id", "metadata", "vector", "query", "top_k", "x"]
                    )
                    | st.text(max_size=5),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value).encode()),
        min_size=1,
        max_size=20,
    )
)
def test_no_body_whatsoever_is_a_server_error(run: Run, bodies: list[bytes]) -> None:
    async def scenario(node: Any) -> None:
        for body in bodies:
            for path in (MEMORIES, SEARCH, f"{MEMORIES}/batch"):
                answer = await node.ask("POST", path, body)
                assert answer.status in (200, 201, 400), (body, answer.body)
                assert isinstance(answer.json, dict)

    run(scenario)


def test_a_bug_is_answered_500_with_an_id_and_nothing_else(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(node: Any) -> None:
        async def fail(name: str) -> None:
            raise RuntimeError("the password is hunter2")

        node.service.before = fail
        answer = await node.post("/memories/search", {"query": "a"}, X_Request_Id="req-17")
        error = check_error(answer, 500, "internal")
        assert b"hunter2" not in answer.body
        assert error["details"]["request_id"] == answer.headers["X-Request-Id"] == "req-17"
        assert node.server._api.admission.total == 0

    run(scenario)
    assert any("req-17" in record.getMessage() for record in caplog.records)


def test_an_internal_error_of_the_service_is_logged_with_its_request(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(node: Any) -> None:
        async def fail(name: str) -> None:
            raise InternalError("The index is inconsistent.")

        node.service.before = fail
        check_error(await node.get("/memories", X_Request_Id="req-18"), 500, "internal")

    run(scenario)
    assert any("req-18" in record.getMessage() for record in caplog.records)


def test_concurrent_bad_requests_leave_no_place_taken(run: Run) -> None:
    async def scenario(node: Any) -> None:
        await asyncio.gather(*(node.ask("POST", MEMORIES, b"{") for _ in range(50)))
        admission = node.server._api.admission
        assert (admission.total, admission.body_bytes) == (0, 0)

    run(scenario)
