"""What the pipeline is compared with: bytes forwarded unseen, and the same rows in SQLite alone."""

from __future__ import annotations

import multiprocessing
import socket
import sqlite3
import time
from pathlib import Path

CHUNK_BYTES = 64 * 1024


def _forward(from_port: int, to_port: int) -> None:
    source = socket.create_connection(("127.0.0.1", from_port))
    with source, socket.create_connection(("127.0.0.1", to_port)) as target:
        while data := source.recv(CHUNK_BYTES):
            target.sendall(data)


def _listening() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(1)
    return sock


def forwarded_per_s(path: Path) -> float:
    """Send a file through two processes and count its lines in a third; returns lines a second."""
    inner, outer = _listening(), _listening()
    context = multiprocessing.get_context("spawn")
    relay = context.Process(target=_forward, args=(inner.getsockname()[1], outer.getsockname()[1]))
    relay.start()
    incoming, _ = inner.accept()
    outgoing, _ = outer.accept()
    lines, began = 0, time.perf_counter()
    sender = context.Process(target=_pump, args=(str(path), incoming))
    sender.start()
    incoming.close()
    while data := outgoing.recv(CHUNK_BYTES):
        if not lines:
            began = time.perf_counter()
        lines += data.count(b"\n")
    took_s = time.perf_counter() - began
    for process in (sender, relay):
        process.join()
    return lines / took_s


def _pump(path: str, target: socket.socket) -> None:
    with open(path, "rb") as file, target:
        while data := file.read(CHUNK_BYTES):
            target.sendall(data)


def committed_per_s(path: Path, database: Path, batch_bytes: int) -> float:
    """Commit a file's lines as rows of `batch_bytes`, WAL and FULL, each row one transaction; lines a second."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE rows (log_id TEXT, last_seq INTEGER, body BLOB)")
    connection.execute("CREATE UNIQUE INDEX by_seq ON rows (log_id, last_seq)")
    lines, began = 0, time.perf_counter()
    with path.open("rb") as file:
        while data := file.read(batch_bytes):
            lines += data.count(b"\n")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("INSERT INTO rows VALUES ('job', ?, ?)", (lines, data))
            connection.execute("COMMIT")
    took_s = time.perf_counter() - began
    connection.close()
    return lines / took_s
