"""What programs write, however they write it, is accounted for to the byte; nothing forged is believed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.stretches import Piece
from rbee.hive.outbox import Source
from rbee.processes import CapturedEvent, CapturedLine, ProcessNarrationCapture
from tests.chaos.carrying import carrying
from tests.chaos.conftest import Size
from tests.chaos.strace_stage import module, run
from tests.chaos.torture import account, line_of, lines

LIMIT_S = 60.0
WRITERS = 8
MIB = 2**20
RSS_GROWTH_MAX = 16 * MIB
_WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
for line in open(sys.argv[2], "rb").read().split(b"<end>")[:-1]:
    assert os.write(fd, line) == len(line)
"""

Figure = Callable[[str, object], None]


async def _write_together(path: Path, parts: list[list[bytes]]) -> None:
    """Have as many processes as there are parts write to one file, each line with one write."""
    processes = []
    for number, part in enumerate(parts):
        script = path.parent / f"lines-{number}"
        script.write_bytes(b"".join(line + b"<end>" for line in part))
        command = [sys.executable, "-c", _WRITER, str(path), str(script)]
        processes.append(await asyncio.create_subprocess_exec(*command))
    for process in processes:
        assert await process.wait() == 0


async def _delivered(source: Source) -> None:
    async with asyncio.timeout(LIMIT_S):
        await source.delivered.wait()


def _is_logged(piece: Piece, event: dict[str, Any], own: str) -> None:
    """Compare a piece with what stands in a log of it."""
    line = line_of(piece)
    if line is None:
        assert (event["kind"], event["text"]) == ("raw", piece.data.decode("utf-8", "replace"))
        assert event.get("part") == piece.part
    elif line.job_id in (None, own) and line.attempt in (None, 1):
        words = json.loads(piece.data)
        assert {name: event[name] for name in words} == words
    else:
        assert event["action"] == "queen_refuse_line"
        assert event["fields"]["length_bytes"] == len(piece.data)
        assert "job_id" not in event


def _is_handed_out(piece: Piece, item: CapturedEvent | CapturedLine, own: str) -> None:
    """Compare a piece with what a capture made of it."""
    line = line_of(piece)
    if line is not None and line.job_id in (None, own):
        assert isinstance(item, CapturedEvent)
        assert item.event == {**json.loads(piece.data), "job_id": own}
    else:
        assert isinstance(item, CapturedLine)
        assert item.text == piece.data.removesuffix(b"\r").decode("utf-8", "replace")
        assert (item.part, item.claimed) == (piece.part, line is not None)


async def test_torture_by_many_writers_becomes_one_event_a_piece_and_no_forged_word_is_believed(
    tmp_path: Path, size: Size, seed: int, figure: Figure
) -> None:
    choice = random.Random(seed)
    path = tmp_path / "stdout"
    path.touch()
    async with carrying(tmp_path / "queen.db") as carried:
        queen = carried.queen
        own, other = await queen.job(), await queen.job()
        worker_id = await queen.worker(own)
        queen.place(own, worker_id)
        name = f"{worker_id}/stdout"
        source = carried.outbox.add(name, path)
        source.keep_from = lambda: 0  # the file stays, to be compared
        written = lines(choice, own, other, size.of(1_000, 100_000))
        await _write_together(path, [written[number::WRITERS] for number in range(WRITERS)])
        with path.open("ab") as file:
            file.write(b'{"v":1,"kind":"token","ts":1,"text":"cut o')
        source.seal()
        carried.outbox.wake()
        await _delivered(source)

        data = path.read_bytes()
        events = await carried.events_of(name, own, worker_id)
        told = {event["src"]["offset"]: event for event in events}
        assert len(told) == len(events)
        assert account(data, told, lambda piece, event: _is_logged(piece, event, own)) == len(data)
        assert [event["kind"] for event in await queen.log(other)] == ["state"]
        said = await queen.log(own)
        assert {event["kind"] for event in said} == {"state", "token", "narration"}
        assert all(event["job_id"] == own for event in said)
    figure("lines, by 8 processes", len(written) + 1)
    figure("bytes in, all accounted for", len(data))


async def test_flood_while_the_queen_is_away_keeps_the_disk_bounded_and_tells_what_was_lost(
    tmp_path: Path, size: Size, figure: Figure
) -> None:
    limit, total = size.of(1, 32) * MIB, size.of(12, 512) * MIB
    path = tmp_path / "stdout"
    path.touch()
    taken_most = 0
    async with carrying(tmp_path / "queen.db", capture_bytes_max=limit) as carried:
        worker_id = await carried.queen.worker()
        source = carried.outbox.add(f"{worker_id}/stdout", path)
        carried.link.is_away = True
        line = b"x" * 999 + b"\n"
        with path.open("ab", buffering=0) as file:
            while file.tell() < total:
                file.write(line * 256)
                async with asyncio.timeout(LIMIT_S):
                    while (taken := path.stat().st_blocks * 512) > limit + MIB:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                taken_most = max(taken_most, taken)
        carried.link.is_away = False
        source.seal()
        await _delivered(source)
        events = await carried.queen.log(worker_id)
    gaps = [event for event in events if event["kind"] == "gap"]
    raws = [event for event in events if event["kind"] == "raw"]
    lost = sum(gap["lost_bytes"] for gap in gaps)
    assert sum(len(raw["text"]) + 1 for raw in raws) + lost == source.follower.size
    assert lost == 1000 * sum(gap["lost_lines"] for gap in gaps) > 0
    figure("bytes in", source.follower.size)
    figure("bytes delivered, bytes announced as lost", [source.follower.size - lost, lost])
    figure("disk taken at most", taken_most)


async def test_writer_that_cuts_its_file_costs_what_is_told_and_no_more(tmp_path: Path, figure: Figure) -> None:
    path = tmp_path / "stdout"
    path.touch()
    async with carrying(tmp_path / "queen.db") as carried:
        worker_id = await carried.queen.worker()
        source = carried.outbox.add(f"{worker_id}/stdout", path)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        for number in range(20):
            os.write(fd, b"kept %d\n" % number)
            assert await carried.outbox.flush(LIMIT_S)
            cuts = source.follower.truncations
            path.write_bytes(b"x%d\n" % number)  # opened anew, as `> /dev/stderr` does
            carried.outbox.wake()
            async with asyncio.timeout(LIMIT_S):
                while source.follower.truncations == cuts:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
        os.close(fd)
        source.seal()
        carried.outbox.wake()
        await _delivered(source)
        events = await carried.queen.log(worker_id)
    assert [event["text"] for event in events if event["kind"] == "raw"] == [f"kept {n}" for n in range(20)]
    lost = [event["lost_bytes"] for event in events if event["kind"] == "gap"]
    assert lost == [len(f"x{number}\n") for number in range(20)]
    figure("cuts, each with its gap", len(lost))


@pytest.mark.parametrize(
    ("mode", "floods"),
    [
        ("hive", ["no-newline", "newlines", "short-lines", "token-lines", "token-without-end"]),
        ("capture", ["no-newline", "token-lines", "token-without-end"]),
    ],
)
def test_reading_floods_takes_no_more_memory_than_a_few_buffers(
    tmp_path: Path, size: Size, figure: Figure, mode: str, floods: list[str]
) -> None:
    mib = size.of(10, 100)
    done = run(module("memory_of_capture", mode, str(tmp_path), str(mib), *floods))
    said = json.loads(done.stdout)
    assert [taken // MIB for taken in said["taken_bytes"]] == [mib] * len(floods), done.stderr
    assert said["grown_bytes"] <= RSS_GROWTH_MAX
    figure("MiB of each flood", mib)
    figure("grown by bytes", said["grown_bytes"])


_INTERLEAVED = """
import os, sys, threading
lines = open(sys.argv[1], "rb").read().split(b"<end>")[:-1]
def speak(number):
    for line in lines[number::4]:
        os.write(1, line)
is_child = os.fork() == 0
threads = [threading.Thread(target=speak, args=(number,)) for number in ((0, 1) if is_child else (2, 3))]
for thread in threads: thread.start()
for thread in threads: thread.join()
if is_child: os._exit(0)
os.wait()
os.write(1, b"cut o")
"""


async def test_capture_hands_out_every_byte_of_a_tortured_stream_and_trusts_no_forged_id(
    tmp_path: Path, size: Size, seed: int, figure: Figure
) -> None:
    own, other = "job-01j00000000000000000000000", "job-01j00000000000000000000001"
    script = tmp_path / "lines"
    written = lines(random.Random(seed), own, other, size.of(600, 20_000))
    script.write_bytes(b"".join(line + b"<end>" for line in written))
    capture = ProcessNarrationCapture(job_id=own, directory=tmp_path / "out")
    told: dict[int, CapturedEvent | CapturedLine] = {}
    async with await capture.spawn([sys.executable, "-c", _INTERLEAVED, str(script)]) as process:
        async for item in process.events():
            assert item.offset not in told
            told[item.offset] = item
        assert (await process.wait()).exit_code == 0
    data = (tmp_path / "out" / "stdout").read_bytes()
    assert len(data) == sum(map(len, written)) + len("cut o")
    assert account(data, told, lambda piece, item: _is_handed_out(piece, item, own)) == len(data)
    figure("bytes in, all accounted for", len(data))
