"""Watch over a worker that is loading its model: the engine holds up every thread of it meanwhile.

Run as a process of its own. It is killed when the model is loaded, and ends with its standard input if the worker
dies.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.narration import FileSink, configure, narrate
from rbee.processes.lease import LeaseThread


class Guarded(Struct, frozen=True, kw_only=True):
    """Whom to watch, and what to say about it."""

    pid: int
    lock: Path
    lease_s: float
    hive_id: str
    worker_id: str


@contextmanager
def guarding(guarded: Guarded, stdout_fd: int) -> Iterator[None]:
    """Have this process ended during the `with` block if its hive is gone for longer than the lease."""
    child = subprocess.Popen(
        [sys.executable, "-m", __spec__.name, msgspec.json.encode(guarded, enc_hook=str).decode()],
        stdin=subprocess.PIPE,
        stdout=stdout_fd,
    )
    try:
        yield
    finally:
        child.kill()  # it holds nothing, and may still be starting
        child.wait()
        assert child.stdin is not None
        child.stdin.close()


def main() -> None:
    """Watch until standard input ends."""
    guarded = msgspec.json.decode(sys.argv[1], type=Guarded, dec_hook=lambda kind, value: kind(value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure(actor="worker", sink=FileSink(1), hive_id=guarded.hive_id, worker_id=guarded.worker_id)
    LeaseThread(guarded.lock, guarded.lease_s, lambda: _end(guarded)).start()
    sys.stdin.buffer.read()
    os._exit(0)


def _end(guarded: Guarded) -> None:
    if os.getppid() == guarded.pid:
        say_lease_lost(guarded.lease_s)
        os.kill(guarded.pid, signal.SIGKILL)


def say_lease_lost(lease_s: float) -> None:
    """Say why the worker ends."""
    narrate(
        "worker_lease_lost",
        f"The hive has been gone for more than {lease_s:g} s, so this worker ends.",
        level="warning",
        lease_s=lease_s,
    )


if __name__ == "__main__":
    main()
