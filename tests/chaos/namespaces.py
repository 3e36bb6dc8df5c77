"""Two hosts on one machine: network namespaces with a cable between them, gone with whoever made them.

A namespace is held by a process that waits for the end of its standard input; nothing is named, so nothing can be
left: when that process and the programs in the namespace are gone, the kernel takes cable and addresses away. The
cable is made inside the namespaces, the machine's own network never sees it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

COMMAND_S = 10.0
LEFT, RIGHT = "10.77.0.1", "10.77.0.2"
TOOLS = ("ip", "tc", "unshare", "nsenter")


class Namespace:
    """One host: what runs with its `prefix` sees its network alone."""

    def __init__(self, holder: subprocess.Popen[bytes]) -> None:
        self.pid = holder.pid
        self.prefix: Sequence[str] = ("nsenter", f"--net=/proc/{holder.pid}/ns/net", "--")

    def run(self, *command: str) -> None:
        """Run a command there.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        subprocess.run([*self.prefix, *command], check=True, capture_output=True, timeout=COMMAND_S)


class TwoHosts:
    """`left` and `right`, at `LEFT` and `RIGHT`, and the cable between them."""

    def __init__(self, left: Namespace, right: Namespace) -> None:
        self.left = left
        self.right = right

    def unplug(self) -> None:
        """Cut the cable."""
        self.left.run("ip", "link", "set", "cable", "down")

    def plug(self) -> None:
        """Mend it."""
        self.left.run("ip", "link", "set", "cable", "up")

    def shape(self, *queueing: str) -> None:
        """Make the cable as bad as `tc` can (`netem delay 200ms 100ms loss 5%`); skip where it cannot."""
        for host in (self.left, self.right):
            try:
                host.run("tc", "qdisc", "replace", "dev", "cable", "root", *queueing)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"tc {queueing[0]}: {error.stderr.decode().strip()}")


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Make two hosts, or skip the test with the reason why this machine cannot."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"network namespaces need root and {', '.join(TOOLS)}; missing: {missing or 'root'}")
    with ExitStack() as stack:
        try:
            left, right = stack.enter_context(_namespace()), stack.enter_context(_namespace())
            left.run(
                "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(right.pid)
            )
            for host, address in ((left, LEFT), (right, RIGHT)):
                host.run("ip", "address", "add", f"{address}/24", "dev", "cable")
                host.run("ip", "link", "set", "cable", "up")
                host.run("ip", "link", "set", "lo", "up")
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        yield TwoHosts(left, right)


@contextmanager
def _namespace() -> Iterator[Namespace]:
    own = os.readlink("/proc/self/ns/net")
    holder = subprocess.Popen(["unshare", "--net", "--", "cat"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + COMMAND_S
        while _network_of(holder.pid) == own:
            if holder.poll() is not None or time.monotonic() > deadline:
                raise OSError("unshare --net failed")
            time.sleep(0.01)
        yield Namespace(holder)
    finally:
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait(COMMAND_S)


def _network_of(pid: int) -> str:
    return os.readlink(Path(f"/proc/{pid}/ns/net"))
