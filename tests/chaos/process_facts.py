"""What the kernel knows of a process: descriptors, threads, memory, connections."""

from __future__ import annotations

import psutil
from msgspec import Struct


class Facts(Struct, frozen=True):
    """A process at one moment."""

    descriptors: int
    threads: int
    rss_bytes: int


class ProcessFacts:
    """Looks at one process."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def now(self) -> Facts:
        """Return what holds now."""
        process = self._process
        return Facts(process.num_fds(), process.num_threads(), process.memory_info().rss)

    def local_port(self) -> int:
        """Return the local port of its one connection."""
        connections = self._process.net_connections("tcp")
        (port,) = {found.laddr.port for found in connections if found.status == psutil.CONN_ESTABLISHED}
        return int(port)
