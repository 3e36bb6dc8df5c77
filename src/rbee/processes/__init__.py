"""Start, follow, find and stop processes for real. Linux only: elsewhere every part refuses when it is used."""

from rbee.processes.capture import (
    CapturedEvent,
    CapturedLine,
    CapturedProcess,
    ProcessNarrationCapture,
)
from rbee.processes.child import Child, ExitStatus, adopt
from rbee.processes.environment import child_environment
from rbee.processes.follower import FileFollower, Loss, Stretch
from rbee.processes.lease import LeaseThread
from rbee.processes.linux import require_linux
from rbee.processes.locks import FileLock, is_held
from rbee.processes.procfs import machine_boot_id
from rbee.processes.spawn import ProcessSpec, spawn
from rbee.processes.tree import StopReport, find_marked, kill_tree, stop_tree
from rbee.processes.watch import FileWatch

__all__ = [
    "CapturedEvent",
    "CapturedLine",
    "CapturedProcess",
    "Child",
    "ExitStatus",
    "FileFollower",
    "FileLock",
    "FileWatch",
    "LeaseThread",
    "Loss",
    "ProcessNarrationCapture",
    "ProcessSpec",
    "StopReport",
    "Stretch",
    "adopt",
    "child_environment",
    "find_marked",
    "is_held",
    "kill_tree",
    "machine_boot_id",
    "require_linux",
    "spawn",
    "stop_tree",
]
