"""Who may come in: which hosts, which origins, which key."""

from __future__ import annotations

import pytest

from rbee.errors import AuthenticationError, ForbiddenError, StartError
from rbee.http.auth import Door, is_loopback, require_key_off_loopback


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST"])
def test_loopback_names_are_known(host: str) -> None:
    assert is_loopback(host)
    require_key_off_loopback(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "127.0.0.1.evil.example", "localhost.evil", ""])
def test_everything_else_needs_a_key_to_be_served(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(StartError, match="RBEE_API_KEY is not set"):
        require_key_off_loopback(host, "")
    require_key_off_loopback(host, "key")


@pytest.mark.parametrize("header", ["127.0.0.1:8500", "localhost", "[::1]:8500", "LocalHost:1", "Mine.example:80"])
def test_host_of_ours_is_let_in(header: str) -> None:
    Door(hosts=frozenset({"mine.EXAMPLE"})).check_host(header)


@pytest.mark.parametrize(
    "header",
    [
        *(None, "", "evil.example", "localhost.evil.example:8500", "127.0.0.1.evil.example", "evil@", ":8500"),
        *("[::1", "[zz]", "127.0.0.1@evil.example", "127.0.0.1.evil", "localhost,evil.example"),
    ],
)
def test_host_of_anybody_else_is_refused(header: str | None) -> None:
    with pytest.raises(ForbiddenError, match="is not one this server answers to"):
        Door(hosts=frozenset({"mine.example"})).check_host(header)


def test_host_of_any_name_is_let_in_where_that_is_configured() -> None:
    Door(hosts=frozenset({"*"})).check_host("anything.example")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "localhost:8500"),
        ("http://localhost:8500", "localhost:8500"),
        ("https://LOCALHOST:8500", "localhost:8500"),
        ("https://friend.example", "localhost:8500"),
    ],
)
def test_origin_of_ours_or_a_friends_is_let_in(origin: str | None, host: str) -> None:
    Door(origins=frozenset({"https://friend.example"})).check_origin(origin, host)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "localhost:8500"),
        ("http://localhost:3000", "localhost:8500"),
        ("http://localhost", "localhost:8500"),
        ("null", "localhost:8500"),
        ("", "localhost:8500"),
        ("", ""),
        ("http://", ""),
        ("http://[", "localhost:8500"),
        ("file://localhost:8500", "localhost:8500"),
        ("http://localhost:8500.evil.example", "localhost:8500"),
        ("http://evil.example/http://localhost:8500", "localhost:8500"),
    ],
)
def test_origin_of_anybody_else_is_refused(origin: str, host: str) -> None:
    with pytest.raises(ForbiddenError, match="may not call this server"):
        Door(origins=frozenset({"https://friend.example"})).check_origin(origin, host)


@pytest.mark.parametrize("authorization", ["Bearer ké y", "bearer  ké y ", "BEARER ké y"])
def test_key_is_let_in(authorization: str) -> None:
    as_decoded = authorization.encode().decode("latin-1")
    assert Door(api_key="ké y").principal(as_decoded) == "key"


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic key", "key", "Bearer key2"]
)
def test_anything_but_the_key_is_refused(given: str | None) -> None:
    with pytest.raises(AuthenticationError):
        Door(api_key="key").principal(given)


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_everybody_is_local(key: str | None) -> None:
    assert Door(api_key=key).principal("Bearer whatever") == "local"
