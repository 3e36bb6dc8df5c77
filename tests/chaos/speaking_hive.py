"""A hive that is a script: it speaks the wire's words to a real queen, as fast and as much as a test wants."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import aiohttp

from rbee.contracts.events import encode_json
from rbee.contracts.heartbeats import Heartbeat, MachineInfo, SourceHeader, WorkerInfo
from rbee.contracts.ids import new_boot_id, new_id
from rbee.contracts.states import WorkerState


class SpeakingHive:
    """One hive with one worker, whose standard output is whatever `say` is given.

    Attributes:
        worker_id: The worker.
        path: Of the worker's log at the queen.
        said: How many lines were said.
    """

    def __init__(self, queen_url: str) -> None:
        self.hive_id = new_id("hive")
        self.worker_id = new_id("worker")
        self.path = f"/v1/workers/{self.worker_id}"
        self.said = 0
        self._boot_id = new_boot_id()
        self._offset = 0
        self._base = f"{queen_url}/v1/hives/{self.hive_id}"
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        """Register."""
        self._session = aiohttp.ClientSession()
        await self.beat()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Fall silent."""
        await self._session.close()

    async def beat(self) -> None:
        """Send a heartbeat that names the worker."""
        worker = WorkerInfo(
            worker_id=self.worker_id,
            model="smollm2:135m",
            state=WorkerState.READY,
            url="http://127.0.0.1:1",
            token="t",
            purpose="generate",
            slots=1,
            slots_used=0,
            pid=None,
        )
        machine = MachineInfo(hostname="h", cpus=1, memory_bytes=1, memory_free_bytes=1, disk_free_bytes=1)
        beat = Heartbeat(
            boot_id=self._boot_id,
            store_id="store",
            url="http://127.0.0.1:1",
            version="0",
            machine=machine,
            devices=[],
            models=[],
            workers=[worker],
        )
        await self._post("heartbeat", encode_json(beat), "application/json")

    async def say(self, *lines: bytes) -> None:
        """Bring lines of the worker's standard output; acknowledged when this returns."""
        data = b"".join(line + b"\n" for line in lines)
        header = SourceHeader(source=f"{self.worker_id}/stdout", offset=self._offset, bytes=len(data))
        await self._post("events", encode_json(header) + b"\n" + data, "application/x-ndjson")
        self._offset += len(data)
        self.said += len(lines)

    async def _post(self, name: str, body: bytes, media: str) -> None:
        async with self._session.post(
            f"{self._base}/{name}", data=body, headers={"content-type": media}
        ) as response:
            response.raise_for_status()
