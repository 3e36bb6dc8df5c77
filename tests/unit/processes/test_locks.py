from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from rbee.processes import Child, FileLock, is_held
from tests.unit.processes.process_stage import LIMIT_S, Stage


def holder(stage: Stage, path: Path, then: str = "signal.pause()") -> Child:
    """Start a process that takes the lock, by an object that lives as long as it does."""
    source = str(Path(__file__).parents[3] / "src")
    code = f"""
sys.path.insert(0, {source!r})
from pathlib import Path
from rbee.processes import FileLock
lock = FileLock(Path({str(path)!r}))
print(lock.acquire())
{then}
"""
    return stage.python(code)


def test_free_lock_is_taken_and_given_back(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert not is_held(lock.path)
    assert lock.acquire()
    assert lock.acquire()
    assert (lock.held, is_held(lock.path)) == (True, True)
    lock.release()
    lock.release()
    assert (lock.held, is_held(lock.path)) == (False, False)


def test_second_lock_of_the_same_process_is_refused(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    second.release()


def test_asking_neither_takes_nor_loses_the_lock(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert lock.acquire()
    for _ in range(100):
        assert is_held(lock.path)
    assert not other.acquire()
    lock.release()
    for _ in range(100):
        assert not is_held(lock.path)
    assert other.acquire()
    other.release()


def test_lock_without_a_file_is_not_held_and_asking_makes_none(tmp_path: Path) -> None:
    assert not is_held(tmp_path / "lock")
    assert not (tmp_path / "lock").exists()


async def test_lock_of_another_process_ends_with_it(stage: Stage, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    child = holder(stage, lock.path)
    assert await stage.said(1) == ["True"]
    assert is_held(lock.path)
    assert not lock.acquire()
    child.send_signal(signal.SIGKILL)
    await child.wait()
    assert not is_held(lock.path)
    assert lock.acquire()
    lock.release()


async def test_lock_is_not_inherited_by_a_program_the_holder_starts(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    child = holder(
        stage,
        path,
        then="import subprocess\n"
        "subprocess.Popen([sys.executable, '-c', 'import signal; print(1); signal.pause()'], close_fds=False)\n"
        "signal.pause()",
    )
    await stage.said(2)
    child.send_signal(signal.SIGKILL)
    await child.wait()
    assert len(stage.left()) == 1
    assert not is_held(path)


async def test_acquire_blocking_gets_the_lock_when_its_holder_dies(stage: Stage, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    child = holder(stage, lock.path)
    await stage.said(1)
    waiting = asyncio.create_task(lock.acquire_blocking(LIMIT_S))
    await asyncio.sleep(0)
    child.send_signal(signal.SIGKILL)
    assert await waiting
    lock.release()
    await child.wait()


async def test_acquire_blocking_gives_up_after_its_time(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert lock.acquire()
    assert not await other.acquire_blocking(0.01)
    lock.release()


def test_lock_in_a_missing_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FileLock(tmp_path / "nowhere" / "lock").acquire()


def test_refused_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    before = len(os.listdir("/proc/self/fd"))
    assert not FileLock(lock.path).acquire()
    assert is_held(lock.path)
    assert len(os.listdir("/proc/self/fd")) == before
    lock.release()
