from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rbee.processes import FileWatch

LIMIT_S = 30.0


def append(path: Path, data: bytes = b"x") -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    first.touch()
    second.touch()
    return first, second


async def test_wait_after_a_write_returns_that_file(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        for path in files:
            watch.add(path)
        append(files[1])
        assert await watch.wait(LIMIT_S) == {files[1]}


async def test_wait_before_a_write_returns_when_it_comes(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        watch.add(files[0])
        asyncio.get_running_loop().call_soon(append, files[0])
        assert await watch.wait(LIMIT_S) == {files[0]}


async def test_write_between_two_waits_is_not_lost(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        watch.add(files[0])
        for _ in range(100):
            append(files[0])
            assert await watch.wait(LIMIT_S) == {files[0]}
        assert await watch.wait(0) == frozenset()


async def test_wait_without_a_write_returns_nothing_after_the_timeout(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        watch.add(files[0])
        assert await watch.wait(0.01) == frozenset()


async def test_removed_file_is_not_reported(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        for path in files:
            watch.add(path)
        append(files[0])
        watch.remove(files[0])
        append(files[0])
        append(files[1])
        assert await watch.wait(LIMIT_S) == {files[1]}


async def test_deleted_file_is_forgotten_and_removing_it_is_fine(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        watch.add(files[0])
        files[0].unlink()
        assert await watch.wait(0.01) == frozenset()
        watch.remove(files[0])


async def test_missing_file_cannot_be_added(tmp_path: Path) -> None:
    with FileWatch() as watch, pytest.raises(FileNotFoundError, match="nowhere"):
        watch.add(tmp_path / "nowhere")


async def test_wake_ends_the_wait_of_now(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        asyncio.get_running_loop().call_soon(watch.wake)
        async with asyncio.timeout(LIMIT_S):
            assert await watch.wait(2 * LIMIT_S) == frozenset()


async def test_wake_before_a_wait_ends_the_next_one_only() -> None:
    with FileWatch() as watch:
        watch.wake()
        async with asyncio.timeout(LIMIT_S):
            assert await watch.wait(2 * LIMIT_S) == frozenset()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await watch.wait(LIMIT_S)


async def test_cancelled_wait_loses_nothing(files: tuple[Path, Path]) -> None:
    with FileWatch() as watch:
        watch.add(files[0])
        waiting = asyncio.create_task(watch.wait(LIMIT_S))
        await asyncio.sleep(0)
        append(files[0])
        waiting.cancel()
        await asyncio.wait([waiting])
        assert await watch.wait(LIMIT_S) == {files[0]}


async def test_second_waiter_is_refused() -> None:
    with FileWatch() as watch:
        waiting = asyncio.create_task(watch.wait(LIMIT_S))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one task"):
            await watch.wait(0)
        watch.wake()
        await waiting


def queue_limit() -> int:
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


async def test_queue_overflow_reports_every_file(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "quiet")]
    with FileWatch() as watch:
        for path in paths:
            path.touch()
            watch.add(path)
        fds = [os.open(path, os.O_WRONLY | os.O_APPEND) for path in paths[:2]]
        for number in range(queue_limit() + 1):  # in turn, or the kernel joins them
            os.write(fds[number % 2], b"x")
        for fd in fds:
            os.close(fd)
        seen: set[Path] = set()
        while changed := await watch.wait(0):
            seen |= changed
        assert seen == set(paths)


async def test_busy_file_lets_other_tasks_run(files: tuple[Path, Path]) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    with FileWatch() as watch:
        watch.add(files[0])
        task = asyncio.create_task(other())
        for _ in range(50):
            append(files[0])
            await watch.wait(LIMIT_S)
        task.cancel()
        await asyncio.wait([task])
    assert turns >= 50


async def test_close_twice_is_fine() -> None:
    watch = FileWatch()
    watch.close()
    watch.close()
