from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from rbee.contracts.events import TOKEN_PREFIX
from rbee.hive.last_words import last_words
from rbee.hive.outbox import Outbox, Source
from rbee.hive.queen_link import QueenLink
from rbee.narration.emit import captured_narration
from rbee.narration.sinks import ListSink
from rbee.processes import FileFollower
from tests.unit.hive.small_queen import SmallQueen, small_queen, until

BLOCK = 4096


class Hive:
    """An outbox that runs, and the files it carries."""

    def __init__(self, queen: SmallQueen, outbox: Outbox, sink: ListSink, directory: Path) -> None:
        self.queen = queen
        self.outbox = outbox
        self.sink = sink
        self.directory = directory

    def file(self, name: str, data: bytes = b"") -> Path:
        """Make a file."""
        path = self.directory / name
        path.write_bytes(data)
        return path

    def source(self, name: str, data: bytes = b"", *, goes_first: bool = False) -> Source:
        """Make a file and carry it."""
        return self.outbox.add(name, self.file(name, data), goes_first=goes_first)

    async def delivered(self, source: Source) -> None:
        """Wait until the queen has all of a sealed file."""
        async with asyncio.timeout(10):
            await source.delivered.wait()


@asynccontextmanager
async def hive_of(
    directory: Path, *, is_running: bool = True, capture_bytes_max: int = 2**28
) -> AsyncIterator[Hive]:
    with captured_narration("hive") as sink:
        async with small_queen() as (queen, link):
            outbox = Outbox(link, capture_bytes_max=capture_bytes_max)
            running = asyncio.ensure_future(outbox.run()) if is_running else None
            try:
                yield Hive(queen, outbox, sink, directory)
            finally:
                if running is not None:
                    running.cancel()
                    result = (await asyncio.gather(running, return_exceptions=True))[0]
                    assert isinstance(result, asyncio.CancelledError), result
                outbox.close()


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Hive]:
    async with hive_of(tmp_path) as made:
        yield made


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def lines(count: int, width: int = 20) -> bytes:
    return b"".join(b"%0*d\n" % (width, number) for number in range(count))


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


async def test_lines_arrive_as_they_are_written(hive: Hive) -> None:
    source = hive.source("a", b"one\ntwo\n")
    await until(lambda: hive.queen.taken.get("a") == b"one\ntwo\n")
    append(source.follower.path, b"three\nhal")
    await until(lambda: hive.queen.taken["a"] == b"one\ntwo\nthree\n")
    append(source.follower.path, b"f\n")

    assert await hive.outbox.flush(5)
    assert hive.queen.taken["a"] == b"one\ntwo\nthree\nhalf\n"


async def test_unfinished_last_line_arrives_once_its_writer_is_dead(hive: Hive) -> None:
    source = hive.source("a", b"one\nhalf")
    await until(lambda: hive.queen.cursors.get("a") == 4)
    assert not source.delivered.is_set()

    assert source.seal() == 8
    hive.outbox.wake()
    await hive.delivered(source)

    assert hive.queen.taken["a"] == b"one\nhalf"


async def test_empty_file_is_delivered_when_it_is_sealed(hive: Hive) -> None:
    source = hive.source("a")
    source.seal()
    hive.outbox.wake()

    await hive.delivered(source)


async def test_queen_that_goes_and_comes_back_misses_nothing_and_gets_nothing_twice(hive: Hive) -> None:
    source = hive.source("a", lines(100))
    assert await hive.outbox.flush(5)
    await hive.queen.stop()
    append(source.follower.path, lines(200))
    await until(lambda: "hive_queen_away" in hive.sink.actions)
    append(source.follower.path, lines(300))

    await hive.queen.start()
    source.seal()
    await hive.delivered(source)

    assert hive.queen.taken["a"] == lines(100) + lines(200) + lines(300)
    assert hive.sink.actions == ["hive_queen_away", "hive_queen_back"]


async def test_flush_does_not_wait_for_a_queen_that_is_away(hive: Hive) -> None:
    await hive.queen.stop()
    hive.source("a", b"one\n")

    assert await hive.outbox.flush(3600) is False


async def test_flush_without_a_running_outbox_gives_up_after_its_time(tmp_path: Path) -> None:
    async with hive_of(tmp_path, is_running=False) as hive:
        hive.source("a", b"one\n")

        assert await hive.outbox.flush(0.01) is False


@pytest.mark.parametrize("failures", [1, 3])
async def test_batch_whose_acknowledgement_was_lost_is_brought_again_without_harm(
    hive: Hive, failures: int
) -> None:
    hive.queen.failures = failures
    source = hive.source("a", lines(50))
    source.seal()

    await hive.delivered(source)

    assert hive.queen.taken["a"] == lines(50)
    assert len(hive.queen.batches) == failures + 1


async def test_queen_with_an_older_memory_gets_again_what_is_still_there(hive: Hive) -> None:
    source = hive.source("a", b"one\ntwo\n")
    assert await hive.outbox.flush(5)
    hive.queen.forget("a", 4)

    append(source.follower.path, b"three\n")
    await until(lambda: hive.queen.taken["a"] == b"one\ntwo\nthree\n")


async def test_queen_with_an_older_memory_is_told_what_was_given_back(hive: Hive) -> None:
    data = lines(1000, 99)
    source = hive.source("a", data)
    assert await hive.outbox.flush(5)
    await until(lambda: allocated(source.follower.path) <= BLOCK)
    hive.queen.forget("a", 100)

    append(source.follower.path, b"next\n")
    source.seal()
    hive.outbox.wake()
    await hive.delivered(source)

    [loss] = hive.queen.losses
    kept_from = len(data) // BLOCK * BLOCK
    assert (loss.offset, loss.lost_bytes) == (100, kept_from - 100)
    assert hive.queen.taken["a"] == data[:100] + b"?" * loss.lost_bytes + data[kept_from:] + b"next\n"


async def test_queen_that_is_ahead_gets_only_what_is_behind_her_cursor(hive: Hive) -> None:
    hive.queen.cursors["a"], hive.queen.taken["a"] = 8, b"one\ntwo\n"
    source = hive.source("a", b"one\ntwo\nthree\n")
    source.seal()

    await hive.delivered(source)

    assert hive.queen.taken["a"] == b"one\ntwo\nthree\n"


async def test_file_that_was_delivered_and_given_back_before_a_restart_is_known_to_be_delivered(
    hive: Hive,
) -> None:
    path = hive.file("a", lines(BLOCK // 16, 15))
    follower = FileFollower(path)
    follower.acknowledge(BLOCK)
    follower.close()
    assert allocated(path) == 0
    hive.queen.cursors["a"], hive.queen.taken["a"] = BLOCK, path.read_bytes()

    source = hive.outbox.add("a", path)
    source.seal()
    await hive.delivered(source)

    assert hive.queen.losses == []


async def test_line_of_a_megabyte_arrives_in_one_stretch(hive: Hive) -> None:
    line = TOKEN_PREFIX + b'"text":"' + b"t" * 1_000_000 + b'"}\n'
    source = hive.source("a", b"before\n" + line + b"after\n")
    source.seal()

    await hive.delivered(source)

    assert hive.queen.taken["a"] == b"before\n" + line + b"after\n"
    assert (7, len(line)) in {(header.offset, header.bytes) for batch in hive.queen.batches for header in batch}


async def test_every_file_has_its_turn_however_many_are_busy_and_the_hives_own_goes_first(tmp_path: Path) -> None:
    async with hive_of(tmp_path, is_running=False) as hive:
        data = lines(100_000)
        for number in range(40):
            hive.source(f"w{number}", data)
        hive.source("own", data, goes_first=True)
        running = asyncio.ensure_future(hive.outbox.run())
        await until(lambda: len(hive.queen.batches) >= 4)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    assert [batch[0].source for batch in hive.queen.batches[:4]] == ["own"] * 4
    seen = {header.source for batch in hive.queen.batches[:4] for header in batch}
    assert seen == {"own", *(f"w{number}" for number in range(40))}


async def test_delivered_blocks_are_given_back(hive: Hive) -> None:
    source = hive.source("a", lines(50_000))

    assert await hive.outbox.flush(5)

    await until(lambda: allocated(source.follower.path) <= BLOCK)


async def test_blocks_that_somebody_here_still_reads_are_kept(hive: Hive) -> None:
    path = hive.file("a", lines(5000))
    before = allocated(path)
    source = hive.outbox.add("a", path)
    source.keep_from = lambda: 0
    assert await hive.outbox.flush(5)
    assert allocated(path) == before

    source.keep_from = None
    append(path, b"next\n")
    await until(lambda: allocated(path) <= 2 * BLOCK)


async def test_file_that_grows_too_large_while_the_queen_is_away_loses_its_oldest_part_and_says_so(
    tmp_path: Path,
) -> None:
    limit = 64 * BLOCK
    async with hive_of(tmp_path, capture_bytes_max=limit) as hive:
        await hive.queen.stop()
        source = hive.source("a", lines(1))
        await until(lambda: "hive_queen_away" in hive.sink.actions)
        written = lines(1)
        for _ in range(8):
            append(source.follower.path, lines(limit // 42))
            written += lines(limit // 42)
            await until(lambda: allocated(source.follower.path) <= limit + BLOCK)
        await hive.queen.start()
        source.seal()
        await hive.delivered(source)

    [loss] = hive.queen.losses
    taken = hive.queen.taken["a"]
    assert len(taken) == len(written)
    assert taken.replace(b"?", b"").count(b"\n") + loss.lost_lines == written.count(b"\n")
    assert taken == written[: loss.offset] + b"?" * loss.lost_bytes + written[loss.offset + loss.lost_bytes :]
    assert loss.lost_bytes < len(written) * 0.95


async def test_removed_file_is_carried_no_longer(hive: Hive) -> None:
    source = hive.source("a", b"one\n")
    assert await hive.outbox.flush(5)

    hive.outbox.remove(source)
    append(source.follower.path, b"two\n")
    hive.source("b", b"x\n")
    await until(lambda: hive.queen.taken.get("b") == b"x\n")

    assert hive.queen.taken["a"] == b"one\n"


async def test_last_lines_leave_out_the_pieces_of_answers(hive: Hive) -> None:
    spoken = b"".join(b"line %d\n" % number + TOKEN_PREFIX + b'"text":"secret"}\n' for number in range(30))
    source = hive.source("a", spoken)
    assert await hive.outbox.flush(5)

    assert len(source.last_lines) <= 20
    assert source.last_lines[-1] == "line 29"
    assert not any("secret" in line for line in source.last_lines)


@pytest.mark.parametrize("is_read", [True, False])
async def test_last_lines_leave_out_the_rest_of_a_piece_behind_a_hole(hive: Hive, is_read: bool) -> None:
    """Blocks that a hive gave back before it died end in the middle of a line; the next one begins there."""
    piece = TOKEN_PREFIX + b'"text":"' + b"secret" * 20 + b'"}\n'
    path = hive.file("a", piece * 100)
    before = FileFollower(path)
    before.acknowledge(len(piece) * 80)
    before.close()
    append(path, b"plain\n")
    source = hive.outbox.add("a", path) if is_read else Source("a", FileFollower(path))
    if is_read:
        assert await hive.outbox.flush(5)
    else:
        source.follower.skip_hole()
    words = last_words([source])
    if not is_read:
        source.follower.close()

    assert words.lines == ["plain"]


async def test_outbox_that_cannot_read_a_file_ends_instead_of_going_silent(tmp_path: Path) -> None:
    async with aiohttp.ClientSession() as session:
        outbox = Outbox(QueenLink(session, "http://127.0.0.1:1", "hive-x", None))
        path = tmp_path / "a"
        path.write_bytes(b"one\n")
        source = outbox.add("a", path)
        os.close(source.follower._fd)

        with pytest.raises(OSError, match="Bad file descriptor"):
            await outbox.run()
        source.follower._fd = -1
        outbox.close()


async def test_way_is_given_as_much_as_it_carries(hive: Hive) -> None:
    """A batch that does not get through is brought in pieces; nothing is lost or doubled."""
    hive.queen.carried_bytes_max = 20_000
    data = lines(3000)
    source = hive.source("w", data)
    source.seal()
    await hive.delivered(source)
    assert hive.queen.taken["w"] == data
    sizes = [sum(header.bytes for header in batch) for batch in hive.queen.batches]
    assert max(sizes) < 20_000
    assert len(sizes) < 12  # and in no smaller ones than that
