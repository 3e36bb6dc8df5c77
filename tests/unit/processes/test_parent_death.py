"""A child that is to end with its parent, however the parent ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from rbee.processes.parent_death import dies_with_parent

PARENT = """
import subprocess, sys
from rbee.processes.parent_death import dies_with_parent
child = "import signal; print('here', flush=True); signal.pause()"
subprocess.Popen([sys.executable, "-c", child], preexec_fn=dies_with_parent(), start_new_session=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_child_ends_with_its_parent(how: str) -> None:
    """Killed or not: the pipe both write to is closed by then."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"here\n"
    if how == "kill":
        os.kill(parent.pid, signal.SIGKILL)
    parent.stdin.close()
    assert parent.stdout.read() == b""
    parent.wait(30)
    parent.stdout.close()


def test_other_thread_is_refused() -> None:
    """The end of that thread would be the child's."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(dies_with_parent).result()
