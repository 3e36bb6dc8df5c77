"""Readers of logs: any number, at any time, torn off at random, stalled; each sees the log and nothing else."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest

from rbee.client.sse import SseParser
from rbee.testing import LocalStack
from tests.chaos.conftest import Size
from tests.chaos.process_facts import ProcessFacts
from tests.chaos.proxied import stored_log
from tests.chaos.speaking_hive import SpeakingHive

Figure = Callable[[str, object], None]
SECONDS = 110
PROMPT_S = 15.0
LINE_BYTES = 8000
LINES_PER_S = 400
RSS_MAX_BYTES = 8 * 2**20


@pytest.fixture
async def queen() -> AsyncIterator[LocalStack]:
    """Give a queen alone."""
    async with LocalStack(with_hive=False) as stack:
        yield stack


async def read_torn(url: str, tears: int, dice: random.Random, length: int) -> tuple[bytes, int]:
    """Read a log's frames, leaving the connection at random; returns its datas, one a line, and the connections.

    As a browser does it: the number of the last event goes along with the next request.
    """
    seen: list[bytes] = []
    last, connections = "", 0
    leave_after = sorted(dice.randrange(length) for _ in range(tears))
    async with aiohttp.ClientSession() as session:
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            connections += 1
            async with session.get(url, headers=headers) as response:
                if response.status == 204:
                    return b"\n".join(seen), connections
                assert response.status == 200
                parser, is_left = SseParser(), False
                async for chunk in response.content.iter_any():
                    for event in parser.feed(chunk):
                        seen.append(event.data)
                        last = event.id
                        if leave_after and len(seen) > leave_after[0]:
                            del leave_after[0]
                            is_left = (
                                True  # what else came with this chunk is lost on the way, and asked for again
                            )
                            break
                        if event.event == "end":
                            return b"\n".join(seen), connections
                    if is_left:
                        response.close()
                        break


@pytest.mark.timeout(900)
async def test_twenty_readers_torn_off_a_hundred_times_see_the_same_bytes(
    queen: LocalStack, size: Size, seed: int, figure: Figure
) -> None:
    """Before the log grows, while it does, and after it has ended."""
    lines, tears, readers = size.of(1000, 10_000), size.of(10, 100), 20
    dice = random.Random(seed)
    async with asyncio.timeout(size.of(SECONDS, 850)), queen.client() as client:
        job_id = (await client.submit({"operation": "queen_check", "lines": lines})).job_id
        url = f"{queen.url}/v1/jobs/{job_id}/stream"

        async def reader(number: int) -> tuple[bytes, int]:
            wanted = dice.randrange(lines) if number % 3 == 1 else (0, 0, lines + 4)[number % 3]
            while (await client.job(job_id)).last_seq < wanted:  # noqa: ASYNC110  # attach at that length
                await asyncio.sleep(0.02)
            return await read_torn(url, tears, random.Random(seed + number), lines)

        results = await asyncio.gather(*(reader(number) for number in range(readers)))
    logs = {log for log, _ in results}
    assert len(logs) == 1
    events = [msgspec.json.decode(line) for line in logs.pop().split(b"\n")]
    assert [event["seq"] for event in events] == list(range(1, lines + 6))
    assert events == await stored_log(queen.url, f"/v1/jobs/{job_id}")
    figure("events of the log", len(events))
    figure("connections of 20 readers", sum(count for _, count in results))


def checkpointed(database: Path) -> tuple[int, int, int]:
    """Ask for a truncating checkpoint from outside: (is it held up, pages of the WAL, pages written back)."""
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        busy, pages, written = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return busy, pages, written
    finally:
        connection.close()


def stalled_reader(url: str, path: str) -> socket.socket:
    """Ask for a log, read the first bytes of the answer, and take nothing any more."""
    host, _, port = url.removeprefix("http://").partition(":")
    sock = socket.socket()
    sock.settimeout(SECONDS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect((host, int(port)))
    sock.sendall(f"GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
    assert sock.recv(15) == b"HTTP/1.1 200 OK"
    return sock


async def test_reader_that_stalls_in_the_middle_of_a_log_does_not_hold_the_wal(
    queen: LocalStack, figure: Figure
) -> None:
    """It is in no transaction: the whole write-ahead log can be written back and emptied."""
    async with SpeakingHive(queen.url) as hive:
        for _ in range(20):
            await hive.say(*[b"x" * LINE_BYTES] * 100)  # 16 MB, of which a stalled reader takes the first few KiB
        stalled = [await asyncio.to_thread(stalled_reader, queen.url, hive.path + "/stream") for _ in range(4)]
        database = queen.home / "queen.db"
        wal = database.with_name("queen.db-wal")
        before = wal.stat().st_size
        assert await asyncio.to_thread(checkpointed, database) == (0, 0, 0)
        assert wal.stat().st_size == 0
        for sock in stalled:
            sock.close()
    figure("WAL before and after, bytes", (before, 0))


SLOW_READER = """
import sys
from rbee.client import SyncJobClient
with SyncJobClient(sys.argv[1]) as client:
    for event in client.follow_log(sys.argv[2]):
        print(event["seq"], flush=True)
"""


@asynccontextmanager
async def reading_process(url: str, path: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a reader as a process of its own that prints the number of each event."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SLOW_READER, url, path, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class FastReader:
    """A reader that keeps up, and knows how far it is."""

    def __init__(self) -> None:
        self.last_seq = 0
        self.is_dense = True

    async def read(self, stack: LocalStack, path: str) -> None:
        """Read until cancelled."""
        async with stack.client() as client:
            async for event in client.follow_log(path):
                self.is_dense &= event["seq"] == self.last_seq + 1
                self.last_seq = event["seq"]


@pytest.mark.timeout(400)
async def test_stopped_reader_is_cut_off_costs_no_memory_and_loses_nothing(
    queen: LocalStack, size: Size, figure: Figure
) -> None:
    """The others hear everything meanwhile; once it goes on, so does its log."""
    assert queen.queen is not None
    facts, others = ProcessFacts(queen.queen.pid), [FastReader() for _ in range(size.of(4, 99))]
    async with SpeakingHive(queen.url) as hive, asyncio.timeout(size.of(SECONDS, 380)):
        path = hive.path + "/stream"
        await hive.say(b"first")
        async with reading_process(queen.url, path) as slow, asyncio.TaskGroup() as group:
            assert slow.stdout is not None
            reading = [group.create_task(other.read(queen, path)) for other in others]
            assert await slow.stdout.readline() == b"1\n"
            slow_facts = ProcessFacts(slow.pid)
            port, rss_before = slow_facts.local_port(), facts.now().rss_bytes
            slow.send_signal(signal.SIGSTOP)
            stopped_at = asyncio.get_running_loop().time()
            await _speak(hive, size.of(1800, 12_000))
            async with asyncio.timeout(PROMPT_S):
                while any(other.last_seq < hive.said for other in others):  # noqa: ASYNC110  # they tell nobody
                    await asyncio.sleep(0.02)
            rss_grown = facts.now().rss_bytes - rss_before
            await asyncio.sleep(stopped_at + size.of(12, 60) - asyncio.get_running_loop().time())
            slow.send_signal(signal.SIGCONT)
            numbers = [int(await slow.stdout.readline()) for _ in range(hive.said - 1)]
            assert numbers == list(range(2, hive.said + 1))
            assert slow_facts.local_port() != port  # it had been cut off, and came back
            for task in reading:
                task.cancel()
    assert all(other.is_dense for other in others)
    assert rss_grown <= RSS_MAX_BYTES
    figure("events while one was stopped", hive.said)
    figure("RSS of the queen grew by, MiB", round(rss_grown / 2**20, 1))


async def _speak(hive: SpeakingHive, lines: int) -> None:
    """Say so many lines, some hundred a second, more bytes than all buffers on the way to one reader hold."""
    line = b"x" * LINE_BYTES
    while hive.said < lines:
        begun = asyncio.get_running_loop().time()
        await hive.say(*[line] * 20)
        if hive.said % 400 < 20:
            await hive.beat()
        await asyncio.sleep(begun + 20 / LINES_PER_S - asyncio.get_running_loop().time())
