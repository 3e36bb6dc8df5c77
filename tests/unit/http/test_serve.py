"""Sockets: which one is had, what is said when none is, and connections that are given up."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import pytest

from rbee.errors import StartError
from rbee.http.serve import STALLED_MS, bind, is_loopback_url, listening_socket, stop_signal, url_of
from tests.unit.http.http_stage import Stage


def test_default_port_that_is_taken_gives_way_and_one_asked_for_does_not() -> None:
    with bind("127.0.0.1", 0, is_port_asked_for=True) as taken:
        port = taken.getsockname()[1]
        with listening_socket("127.0.0.1", None, port, None) as other:
            assert other.getsockname()[1] not in {0, port}
        with pytest.raises(StartError, match=f"Cannot listen on 127.0.0.1 port {port}: Address already in use"):
            listening_socket("127.0.0.1", port, 8500, None)


def test_address_that_is_not_ours_cannot_be_had() -> None:
    with pytest.raises(StartError, match=r"Cannot listen on 192\.0\.2\.1 port 0"):
        bind("192.0.2.1", 0, is_port_asked_for=False)


def test_url_is_one_the_machine_itself_can_use() -> None:
    with bind("0.0.0.0", 0, is_port_asked_for=True) as sock:
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_inherited_socket_is_served_on_and_another_descriptor_is_refused() -> None:
    with bind("127.0.0.1", 0, is_port_asked_for=True) as sock:
        inherited = listening_socket("ignored", 1, 2, os.dup(sock.fileno()))
        assert inherited.getsockname() == sock.getsockname()
        inherited.close()
    reading, writing = os.pipe()
    with pytest.raises(StartError, match=f"The file descriptor {reading} is no socket"):
        listening_socket("ignored", 1, 2, reading)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("url", "expected"),
    [("http://127.0.0.1:1", True), ("http://[::1]:1/x", True), ("http://10.0.0.1", False), ("nonsense", False)],
)
def test_loopback_urls_are_known(url: str, expected: bool) -> None:
    assert is_loopback_url(url) is expected


async def test_connections_are_given_up_when_the_other_end_takes_nothing(stage: Stage) -> None:
    async with stage.get("/livez") as response:  # its connection is kept open
        assert response.status == 200
        ours = [fd for fd in os.listdir("/proc/self/fd") if _is_accepted(int(fd), stage.address)]
    assert [_user_timeout(int(fd)) for fd in ours] == [STALLED_MS]


def _is_accepted(fd: int, address: tuple[str, int]) -> bool:
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            return bool(sock.getsockname() == address and sock.getpeername() != address)
    except OSError:
        return False


def _user_timeout(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


async def test_stop_signal_is_an_event_and_not_the_end() -> None:
    stop = stop_signal()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(stop.wait(), 20)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)
