"""A crowd of readers of one stream that look at little, so that the server is what is measured.

Arguments: host, port, path, how many readers, how many frames each shall get. Prints one line when all are
connected; then how many frames came, in which time, and how late the oldest of each portion was.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
import time

import msgspec

READ_BYTES = 256 * 1024
PATIENCE_S = 60.0
_SAID_AT = re.compile(rb'"ts":(\d{19})')


class _Reader:
    def __init__(self, address: tuple[str, int], path: str) -> None:
        self.socket = socket.create_connection(address)
        self.socket.sendall(b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode())
        self.frames = 0


def _connect(address: tuple[str, int], path: str, count: int) -> list[_Reader]:
    readers = [_Reader(address, path) for _ in range(count)]
    for reader in readers:
        got = reader.socket.recv(READ_BYTES)  # the head of the answer
        reader.frames += got.count(b"\ndata: ")
        reader.socket.setblocking(False)
    return readers


def _read(readers: list[_Reader], wanted: int) -> dict[str, object]:
    selector = selectors.DefaultSelector()
    for reader in readers:
        selector.register(reader.socket, selectors.EVENT_READ, reader)
    late_ns: list[int] = []
    frames, left, began = 0, len(readers), 0.0
    give_up = time.monotonic() + PATIENCE_S
    while left and time.monotonic() < give_up:
        for key, _ in selector.select(1.0):
            reader = key.data
            data = reader.socket.recv(READ_BYTES)
            began = began or time.perf_counter()
            count = data.count(b"\ndata: ")
            frames += count
            reader.frames += count
            if (found := _SAID_AT.search(data)) is not None:
                late_ns.append(time.time_ns() - int(found[1]))
            if reader.frames >= wanted or not data:
                selector.unregister(reader.socket)
                left -= 1
    took_s = time.perf_counter() - began
    late_ns = sorted(late_ns) or [0]
    return {
        "frames": frames,
        "took_s": took_s,
        "p50_ms": late_ns[len(late_ns) // 2] / 1e6,
        "p99_ms": late_ns[len(late_ns) * 99 // 100] / 1e6,
        "short": sum(reader.frames < wanted for reader in readers),
    }


def main() -> None:
    """Connect, read, tell."""
    host, port, path, count, wanted = sys.argv[1:]
    readers = _connect((host, int(port)), path, int(count))
    sys.stdout.write("connected\n")
    sys.stdout.flush()
    sys.stdout.write(msgspec.json.encode(_read(readers, int(wanted))).decode() + "\n")


if __name__ == "__main__":
    main()
