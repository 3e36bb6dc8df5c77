"""Ask an engine once whether it is ready, before there is an event loop."""

from __future__ import annotations

import http.client
import socket
from urllib.parse import urlsplit

from msgspec import Struct

from rbee.worker.engines import EngineAddress


class Probe(Struct, frozen=True):
    """What became of one question; `status` is None where nobody answered."""

    status: int | None = None

    def describe(self, path: str) -> str:
        """Return it as the end of a sentence."""
        return f"{path} is answered with status {self.status}, not 200"


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("engine", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask_ready(address: EngineAddress, path: str, timeout_s: float) -> Probe:
    """Ask for `path` and return the status; nobody who answers within `timeout_s` is as good as nobody."""
    connection = _connection(address, timeout_s)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {address.key}"})
        return Probe(connection.getresponse().status)
    except (OSError, http.client.HTTPException):
        return Probe()
    finally:
        connection.close()


def _connection(address: EngineAddress, timeout_s: float) -> http.client.HTTPConnection:
    if address.socket_path:
        return _SocketConnection(address.socket_path, timeout_s)
    place = urlsplit(address.url)
    return http.client.HTTPConnection(place.hostname or "", place.port, timeout=timeout_s)
