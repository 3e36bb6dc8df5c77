"""A stack whose queen or hive runs under `strace` and is killed at a place that is counted out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rbee.processes import CapturedEvent, ProcessNarrationCapture
from rbee.testing.stack import READY_S, LocalStack, Running, console_script
from tests.chaos.strace_stage import traced


class TracedStack(LocalStack):
    """A `LocalStack` that can start its programs under a fault."""

    async def start_traced_queen(self, inject: str) -> Running | None:
        """Start a queen that a fault on its registry's files may kill; None when that was before she was ready."""
        files = [self.home / f"queen.db{end}" for end in ("", "-wal", "-shm")]
        self.queen = await self._traced("queen-rbee", ["--port", "0"], "queen_ready", inject, files)
        return self.queen

    async def _traced(
        self, program: str, arguments: Sequence[str], ready: str, inject: str, files: Sequence[Path]
    ) -> Running | None:
        directory = self.home / "test-logs" / f"traced-{program}-{len(self._programs)}"
        capture = ProcessNarrationCapture(directory=directory, env=self.env, marker=("RBEE_HOME", str(self.home)))
        log = self.home / "test-logs" / f"strace-{len(self._programs)}"
        log.parent.mkdir(exist_ok=True)
        process = await capture.spawn(traced(log, inject, files, [console_script(program), *arguments]))
        running = Running(program, process, directory)
        self._programs.append(running)
        async with asyncio.timeout(READY_S):
            async for item in process.events():
                if isinstance(item, CapturedEvent) and item.event["action"] == ready:
                    running.url = item.event.get("fields", {}).get("url", "")
                    return running
        return None
