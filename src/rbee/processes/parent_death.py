"""Let a child end with the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def dies_with_parent(number: int = signal.SIGTERM) -> Callable[[], None] | None:
    """Return what a child does before its program starts: ask for a signal (SIGTERM) when its parent dies.

    The kernel sends that signal when the *thread* ends that made the child: call this, and start the child, in
    the main thread. None where there is no such signal.

    Raises:
        RuntimeError: Called from another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("A child that is to end with its parent must be started from the main thread.")
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # found before the fork, where nothing may be loaded
    parent = os.getpid()

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died before it could be noticed
            os._exit(1)

    return before_exec
