"""Give the number of a process that ended to a stranger, and stop what that process left: the stranger lives on.

As a program, for a namespace of process numbers of its own: `python -m tests.chaos.reused_numbers TIMES`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

from rbee.processes import Child, ProcessSpec, adopt, spawn, stop_tree

_LAST = Path("/proc/sys/kernel/ns_last_pid")
_WAIT = "import signal; signal.pause()"


def _spawn(directory: Path, code: str, marker: tuple[str, str]) -> Child:
    env = {"PATH": os.environ["PATH"], marker[0]: marker[1]}
    out = directory / "out"
    return spawn(ProcessSpec(command=(sys.executable, "-c", code), env=env, stdout=out, stderr=out))


def _stranger(pid: int) -> subprocess.Popen[bytes]:
    """Start a process of this number, in a session of its own, as if numbers had gone once round."""
    for _ in range(50):
        _LAST.write_text(str(pid - 1))
        made = subprocess.Popen([sys.executable, "-c", _WAIT], start_new_session=True)
        if made.pid == pid:
            return made
        made.kill()
        made.wait()
    raise AssertionError(f"the number {pid} could not be had again")


async def _once(directory: Path) -> None:
    marker = ("RBEE_TEST_REUSE", uuid.uuid4().hex)
    child = _spawn(directory, "pass", marker)
    left = _spawn(directory, _WAIT, marker)  # what is really to be stopped
    start_time = child.start_time
    await child.wait()
    stranger = _stranger(child.pid)
    try:
        assert adopt(child.pid, start_time) is None
        assert not child.send_signal(signal.SIGKILL)
        report = await stop_tree(child, marker=marker, grace_s=0.2)
        assert report.found == 1
        assert left.poll() is not None
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def main(times: int) -> None:
    """Do it so many times."""
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(times):
            await _once(Path(directory))
    sys.stdout.write(str(times))


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
