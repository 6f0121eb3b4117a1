"""API keys: made, kept as hashes, found; and what the headers of a request say."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import Forbidden, Unauthorized
from agentmem_node.config_keys import ApiKey, ConfigError
from agentmem_node.security.authenticate import ANONYMOUS, KeyAuthenticator, Principal
from agentmem_node.security.browsers import BrowserFence
from agentmem_node.security.keys import KeyOwner, KeyTable, check_tenant, hash_key, new_key


class CountingRng:
    def __init__(self) -> None:
        self._next = 0

    def random(self) -> float:
        return 0.5

    def token(self, size_bytes: int) -> bytes:
        self._next += 1
        return hashlib.shake_128(bytes([self._next])).digest(size_bytes)


def test_a_new_key_is_long_different_each_time_and_easy_to_copy() -> None:
    rng = CountingRng()
    keys = {new_key(rng) for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == 55 and key.startswith("am_") for key in keys)
    assert all(key[3:].isalnum() and key == key.lower() for key in keys)


def test_a_key_is_found_by_its_hash_only() -> None:
    key = new_key(CountingRng())
    table = KeyTable.from_config(
        [ApiKey(tenant="acme/prod", id="laptop", key_hash=hash_key(key).hex())], {}
    )
    assert table.find(hash_key(key)) == KeyOwner("acme/prod", "laptop")
    assert table.find(hash_key(key + "x")) is None
    assert table.find(b"") is None


def test_a_key_may_stand_in_a_variable() -> None:
    secret = new_key(CountingRng())
    table = KeyTable.from_config([ApiKey(key_env="MY_KEY")], {"MY_KEY": secret})
    owner = table.find(hash_key(secret))
    assert owner is not None
    assert owner.tenant == "default"
    assert owner.key_id == hash_key(secret).hex()[:8]


@pytest.mark.parametrize("value", [None, "", "short", "x" * 15])
def test_a_missing_or_short_variable_is_refused_without_being_shown(value: str | None) -> None:
    environment = {} if value is None else {"MY_KEY": value}
    with pytest.raises(ConfigError, match="MY_KEY holds no API key") as raised:
        KeyTable.from_config([ApiKey(key_env="MY_KEY")], environment)
    if value:
        assert value not in str(raised.value)


def test_the_same_key_twice_is_refused() -> None:
    entry = ApiKey(key_hash="ab" * 32)
    with pytest.raises(ConfigError, match=r"api_keys\[1\] is the same key"):
        KeyTable.from_config([entry, entry], {})


@pytest.mark.parametrize("tenant", ["a", "acme", "acme/prod", "A.b-c_9/x", "a" * 64])
def test_tenants_are_organisation_and_project(tenant: str) -> None:
    assert check_tenant(tenant) == tenant


@pytest.mark.parametrize(
    "tenant",
    ["", "/", "a/", "/a", "a/b/c", "a b", ".a", "a" * 65, "ä", "a\n"],
)
def test_other_tenants_are_refused(tenant: str) -> None:
    with pytest.raises(ConfigError, match="is not a tenant"):
        check_tenant(tenant)


def authenticator(
    *, required: bool, is_admin: bool = False, exist: bool = True
) -> KeyAuthenticator:
    owners = {hash_key("good-key-of-ana"): KeyOwner("ana", "k1", is_admin)}
    return KeyAuthenticator(owners.get, lambda: required, lambda: exist)


@pytest.mark.parametrize("required", [False, True])
def test_a_known_key_is_its_owner(required: bool) -> None:
    asked = authenticator(required=required)
    assert asked.authenticate("Bearer good-key-of-ana", None) == Principal("ana", "k1")
    assert asked.authenticate("Token good-key-of-ana", None) == Principal("ana", "k1")
    assert asked.authenticate(None, " good-key-of-ana ") == Principal("ana", "k1")


def test_no_key_is_anonymous_only_where_none_is_needed() -> None:
    assert authenticator(required=False).authenticate(None, None) == ANONYMOUS
    with pytest.raises(Unauthorized, match="needs an API key"):
        authenticator(required=True).authenticate(None, None)


def test_only_a_key_that_is_said_to_be_is_an_admin() -> None:
    entries = [
        ApiKey(tenant="ana", key_hash="ab" * 32),
        ApiKey(tenant="ops", key_hash="cd" * 32, admin=True),
    ]
    table = KeyTable.from_config(entries, {})
    assert [table.find(bytes([byte] * 32)).is_admin for byte in (0xAB, 0xCD)] == [False, True]  # type: ignore[union-attr]
    for is_admin in (False, True):
        asked = authenticator(required=True, is_admin=is_admin)
        found = asked.authenticate(None, "good-key-of-ana")
        assert found.is_admin == is_admin
        if is_admin:
            found.must_be_admin()
        else:
            with pytest.raises(Forbidden, match="'k1'"):
                found.must_be_admin()


def test_no_key_is_an_admin_only_while_there_are_no_keys() -> None:
    assert authenticator(required=False, exist=False).authenticate(None, None).is_admin
    assert not authenticator(required=False, exist=True).authenticate(None, None).is_admin


ADVICE = "Send `Authorization: Bearer <API key>`, `Authorization: Token <API key>` or `X-API-Key`."


@given(st.text(max_size=40), st.booleans())
def test_no_other_text_is_let_in_nor_shown(text: str, required: bool) -> None:
    asked = authenticator(required=required)
    for authorization, api_key in ((text, None), (f"Bearer {text}", None), (None, text)):
        if "good-key-of-ana" in text:
            continue
        with pytest.raises(Unauthorized) as raised:
            asked.authenticate(authorization, api_key)
        if len(text) > 8:
            assert text not in raised.value.message + raised.value.hint


def test_two_different_keys_are_refused() -> None:
    with pytest.raises(Unauthorized, match="different keys"):
        authenticator(required=True).authenticate("Bearer good-key-of-ana", "another")


def test_undecodable_bytes_in_a_key_do_no_harm() -> None:
    with pytest.raises(Unauthorized):
        authenticator(required=True).authenticate(
            None, b"\xff\xfe".decode("utf-8", "surrogateescape")
        )


def test_the_fence_stands_only_where_no_key_is_needed() -> None:
    BrowserFence(keyless=False).check("evil.example", "https://evil.example")
    fence = BrowserFence(keyless=True)
    fence.check("127.0.0.1:7700", None)
    fence.check("127.0.0.1:7700", "http://127.0.0.1:7700")
    for host, origin in (("evil.example", None), ("127.0.0.1", "https://evil.example")):
        with pytest.raises(Forbidden):
            fence.check(host, origin)


@given(st.text(max_size=30))
def test_no_other_host_name_passes_the_fence(host: str) -> None:
    fence = BrowserFence(keyless=True)
    try:
        fence.check(host, None)
    except Forbidden:
        return
    name = host.lower().removeprefix("[")
    assert name.startswith(("localhost", "127.", "::1", "0:"))
