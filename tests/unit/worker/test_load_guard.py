"""A worker whose every thread is held up still ends with its hive."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from rbee.processes import FileLock
from rbee.processes.tree import find_marked

# PyDLL keeps Python's lock during the call, as the engine does while it loads.
HELD_UP = """
import ctypes, os, sys
from pathlib import Path
from rbee.worker.load_guard import Guarded, guarding
guarded = Guarded(pid=os.getpid(), lock=Path(sys.argv[1]), lease_s=0.2, hive_id="hive-1", worker_id="worker-1")
with guarding(guarded, 1):
    ctypes.PyDLL(None).usleep(int(sys.argv[2]))
os.write(1, b"done\\n")
"""


def run_held_up(lock: Path, held_up_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run a process that is held up for so long."""
    command = [sys.executable, "-c", HELD_UP, str(lock), str(int(held_up_s * 1_000_000))]
    return subprocess.run(command, stdout=subprocess.PIPE, timeout=60, check=False)


def test_held_up_worker_ends_when_its_hive_is_gone(tmp_path: Path) -> None:
    """It is killed, and the reason stands on its stdout."""
    ended = run_held_up(tmp_path / "hive.lock", 50)
    assert ended.returncode == -signal.SIGKILL
    line = msgspec.json.decode(ended.stdout)
    assert (line["actor"], line["action"], line["worker_id"]) == ("worker", "worker_lease_lost", "worker-1")


def test_held_up_worker_goes_on_while_its_hive_lives(tmp_path: Path) -> None:
    """The lock is held: the load ends in its own time, and the guard is gone with it."""
    lock = FileLock(tmp_path / "hive.lock")
    assert lock.acquire()
    ended = run_held_up(lock.path, 2.5)
    lock.release()
    assert (ended.returncode, ended.stdout) == (0, b"done\n")


def test_guard_ends_with_a_killed_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its standard input is closed by the kernel."""
    monkeypatch.setenv("RBEE_TEST_GUARD", str(tmp_path))
    lock = FileLock(tmp_path / "hive.lock")
    assert lock.acquire()
    command = [sys.executable, "-c", HELD_UP, str(lock.path), "50000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as held_up:
        marker = ("RBEE_TEST_GUARD", str(tmp_path))
        while len(find_marked(*marker)) < 2:
            pass
        held_up.kill()
        assert held_up.stdout is not None
        assert held_up.stdout.read() == b""  # the guard had it too, so this waits for its end
    lock.release()
    assert find_marked(*marker) == []
