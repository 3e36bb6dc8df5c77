"""How much memory reading floods takes.

`python -m tests.chaos.memory_of_capture {hive,capture} DIRECTORY MIB FLOOD…` prints the bytes accounted for, and
by how many bytes the process grew beyond what one line took.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rbee.contracts.events import MAX_TOKEN_LINE_BYTES, TOKEN_PREFIX
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.processes import CapturedEvent, ProcessNarrationCapture
from rbee.queen.ingest import parse_batch

MIB = 2**20
FLOODS = {
    "one-line": b"hello\n",
    "no-newline": b"x" * MIB,
    "newlines": b"\n" * MIB,
    "short-lines": b"ab\n" * (MIB // 3) + b"c",
    "token-lines": TOKEN_PREFIX.ljust(MAX_TOKEN_LINE_BYTES - 1, b"t") + b"\n",
    "token-without-end": TOKEN_PREFIX.ljust(MIB, b"t"),
}
_WRITE = """
import os, sys
from tests.chaos.memory_of_capture import FLOODS
for _ in range(int(sys.argv[2])):
    os.write(1, FLOODS[sys.argv[1]])
"""


class Counting(QueenLink):
    """A queen who takes everything and keeps nothing but its length."""

    def __init__(self) -> None:
        self.taken_bytes = 0

    async def events(self, parts: Sequence[bytes]) -> dict[str, int]:
        """Acknowledge a batch."""
        stretches = list(parse_batch(b"".join(parts)))
        self.taken_bytes += sum(len(stretch.data) for stretch in stretches)
        return {stretch.header.source: stretch.end for stretch in stretches}


async def _by_hive(flood: str, mib: int, directory: Path) -> int:
    path = directory / f"{flood}-{mib}"
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(FLOODS[flood])
    link = Counting()
    outbox = Outbox(link)
    source = outbox.add("worker/stdout", path)
    source.seal()
    running = asyncio.ensure_future(outbox.run())
    await source.delivered.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    outbox.close()
    path.unlink()
    return link.taken_bytes


async def _by_capture(flood: str, mib: int, directory: Path) -> int:
    taken = 0
    async with await ProcessNarrationCapture().spawn([sys.executable, "-c", _WRITE, flood, str(mib)]) as process:
        async for item in process.events():
            if not isinstance(item, CapturedEvent):
                taken += len(item.text) + (item.part is None)
        assert (await process.wait()).exit_code == 0
        return taken


def grown_bytes() -> int:
    """Return the most memory this process has had."""
    status = Path("/proc/self/status").read_text("ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


async def main(mode: str, directory: Path, mib: int, floods: Sequence[str]) -> None:
    """Take one line, then the floods."""
    take = _by_hive if mode == "hive" else _by_capture
    await take("one-line", 1, directory)
    before = grown_bytes()
    taken = [await take(flood, mib, directory) for flood in floods]
    sys.stdout.write(json.dumps({"taken_bytes": taken, "grown_bytes": grown_bytes() - before}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
