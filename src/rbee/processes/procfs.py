"""What /proc says of processes: who is whose child, since when, and which environment it was given."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from msgspec import Struct

Marker = tuple[str, str]
"""Name and value of an environment variable."""

Identity = tuple[int, int]
"""A process's number and start time: no other process ever has both, until the machine starts again."""


_EXEC_LOOKS_MAX = 20
_EXEC_LOOK_S = 0.001


class ProcessEntry(Struct, frozen=True):
    """One process as /proc showed it at one moment.

    Attributes:
        pid: Its number, which another process may have after it.
        parent: The number of its parent.
        group: Its process group.
        session: Its session.
        state: The kernel's letter (`R`, `S`, `D`, `T`, `Z`, …).
        threads: How many threads it has.
        start_time: When it started, in clock ticks since the machine did; with the number, its identity.
    """

    pid: int
    parent: int
    group: int
    session: int
    state: str
    threads: int
    start_time: int

    @property
    def identity(self) -> Identity:
        """Its number and start time."""
        return (self.pid, self.start_time)

    @property
    def is_gone(self) -> bool:
        """Tell whether only its exit status is left.

        A process whose first thread ended shows as a zombie too, but still has others, and is not gone.
        """
        return self.state in "ZXx" and self.threads <= 1


def read_process(pid: int) -> ProcessEntry | None:
    """Return what /proc says of a process; None when there is none of that number, or it is not shown to us."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last one with `hidepid`
        return None
    # The name in parentheses may hold anything, also parentheses and spaces.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return ProcessEntry(
        pid=pid,
        parent=int(fields[1]),
        group=int(fields[2]),
        session=int(fields[3]),
        state=fields[0].decode("ascii"),
        threads=int(fields[17]),
        start_time=int(fields[19]),
    )


def all_processes() -> dict[int, ProcessEntry]:
    """Return every process that can be seen, by its number."""
    return {entry.pid: entry for entry in _entries()}


def _entries() -> Iterator[ProcessEntry]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (entry := read_process(int(name))):
            yield entry


def carries(pid: int, marker: Marker) -> bool:
    """Tell whether a process was started with `NAME=value` in its environment; False when it cannot be read.

    For a moment in the middle of starting a program, a process shows no environment: then it is asked again.
    """
    wanted = f"{marker[0]}={marker[1]}".encode("utf-8", "surrogateescape")
    for _ in range(_EXEC_LOOKS_MAX):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
            if environment or not _is_in_exec(pid):
                return wanted in environment.split(b"\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False
        time.sleep(_EXEC_LOOK_S)
    return False


def _is_in_exec(pid: int) -> bool:
    """Tell whether a process has memory, but no place for its environment in it yet."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    return fields[20] != b"0" and fields[48] == b"0"


def self_and_ancestors(entries: dict[int, ProcessEntry]) -> frozenset[int]:
    """Return this process and everything above it: what must never be signalled from here."""
    found: set[int] = {1}
    pid = os.getpid()
    while pid and pid not in found:
        found.add(pid)
        entry = entries.get(pid)
        pid = entry.parent if entry else 0
    return frozenset(found)


def machine_boot_id() -> str:
    """Return the kernel's name for this start of the machine: start times of another are not to be compared."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
