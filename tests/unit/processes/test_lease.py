from __future__ import annotations

import threading
from pathlib import Path

from rbee.processes import FileLock, LeaseThread
from rbee.processes.lease import Lease

LIMIT_S = 30.0


def test_lease_is_lost_only_after_its_whole_length() -> None:
    lease = Lease(30)
    answers = [lease.is_lost(held=False, now_s=now) for now in (100, 129, 130, 130.5)]
    assert answers == [False, False, False, True]


def test_lease_counts_anew_after_the_lock_was_held_again() -> None:
    lease = Lease(30)
    assert not lease.is_lost(held=False, now_s=100)
    assert not lease.is_lost(held=True, now_s=129)
    assert not lease.is_lost(held=False, now_s=140)
    assert not lease.is_lost(held=False, now_s=170)
    assert lease.is_lost(held=False, now_s=171)


def test_thread_calls_once_after_the_lock_went(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire()
    calls: list[bool] = []
    lost = threading.Event()

    def on_lost() -> None:
        calls.append(lock.held)
        lost.set()

    thread = LeaseThread(lock.path, 0.02, on_lost, poll_s=0.005)
    thread.start()
    assert not lost.wait(0.1)
    lock.release()
    assert lost.wait(LIMIT_S)
    thread.stop()
    assert calls == [False]


def test_thread_without_a_file_counts_as_missed(tmp_path: Path) -> None:
    lost = threading.Event()
    thread = LeaseThread(tmp_path / "nowhere" / "lock", 0.0, lost.set, poll_s=0.005)
    thread.start()
    assert lost.wait(LIMIT_S)
    thread.stop()


def test_stopped_thread_never_calls(tmp_path: Path) -> None:
    lost = threading.Event()
    thread = LeaseThread(tmp_path / "lock", 0.05, lost.set, poll_s=0.005)
    thread.start()
    thread.stop()
    assert not lost.is_set()


def test_stop_from_within_the_call_returns(tmp_path: Path) -> None:
    done = threading.Event()

    def on_lost() -> None:
        thread.stop()
        done.set()

    thread = LeaseThread(tmp_path / "lock", 0.0, on_lost, poll_s=0.005)
    thread.start()
    assert done.wait(LIMIT_S)
