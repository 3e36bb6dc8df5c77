"""Taking what hives read off the files of their workers: exactly once, by file and offset."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from rbee.contracts.events import SourceLine
from rbee.contracts.heartbeats import SourceHeader
from rbee.contracts.stretches import split
from rbee.errors import InvalidRequestError
from rbee.jobs import JobRegistry
from rbee.jobs.records import Entry, SourceBatch, WorkerRecord
from rbee.queen.claims import hear, lost_stretch
from rbee.queen.workers import WorkerBook

BATCH_BYTES_MAX = 4 * 1024 * 1024
_header = msgspec.json.Decoder(SourceHeader)


class Stretch(Struct, frozen=True):
    """One source's part of a batch."""

    header: SourceHeader
    data: bytes


class _Read(Struct):
    """One stretch, cut and judged: what to commit, and what to act on once it is."""

    batch: SourceBatch
    believed: list[tuple[str, SourceLine]]


def parse_batch(body: bytes) -> Iterator[Stretch]:
    """Cut a batch into its stretches: a header line each, and behind it as many bytes as it says.

    Raises:
        InvalidRequestError: The batch is not of that form.
    """
    position = 0
    while position < len(body):
        newline = body.find(b"\n", position)
        try:
            header = _header.decode(body[position : newline if newline >= 0 else len(body)])
        except msgspec.MsgspecError as error:
            raise InvalidRequestError(f"A stretch has no usable header: {error}.") from None
        data = body[newline + 1 : newline + 1 + header.bytes] if newline >= 0 else b""
        if len(data) != header.bytes or header.offset < 0:
            raise InvalidRequestError(f"The stretch of {header.source} has {len(data)} of {header.bytes} bytes.")
        yield Stretch(header, data)
        position = newline + 1 + header.bytes if newline >= 0 else len(body)


class Ingest:
    """Commits batches, one at a time for each hive, then acts on what was said."""

    def __init__(self, registry: JobRegistry, workers: WorkerBook) -> None:
        self._registry = registry
        self._workers = workers
        self._locks: dict[str, asyncio.Lock] = {}

    async def take(self, hive_id: str, body: bytes) -> dict[str, int]:
        """Commit a batch; returns the cursors of its sources: the acknowledgement.

        No line is refused with an error: what cannot be used goes to its speaker's log, and the cursor moves.
        """
        async with self._locks.setdefault(hive_id, asyncio.Lock()):
            return await self._take(hive_id, list(parse_batch(body)))

    async def _take(self, hive_id: str, stretches: list[Stretch]) -> dict[str, int]:
        observed_ts = time.time_ns()
        sources = {stretch.header.source for stretch in stretches}
        known = await self._registry.store.cursors(sources)
        reads: list[_Read] = []
        positions = dict(known)
        for stretch in stretches:
            read = self._read(stretch, hive_id, positions, observed_ts)
            if read is not None:
                positions[stretch.header.source] = (read.batch.next_cursor, read.batch.next_part)
                reads.append(read)
        cursors = {source: cursor for source, (cursor, _) in known.items()}
        cursors |= await self._registry.store.ingest([read.batch for read in reads])
        for read in reads:
            self._act(read)
        await self._workers.settle(observed_ts)
        return cursors

    def _read(
        self, stretch: Stretch, hive_id: str, positions: dict[str, tuple[int, int]], observed_ts: int
    ) -> _Read | None:
        """Cut a stretch at the cursor; None when it is a repeat, or lies beyond the cursor."""
        header, data = stretch.header, stretch.data
        cursor, part = positions.get(header.source, (header.offset, 0))
        speaker = self._workers.speaker(header.source, hive_id)
        if header.lost_bytes and header.offset <= cursor < header.offset + header.lost_bytes:
            end = header.offset + header.lost_bytes
            entries = lost_stretch(speaker, cursor, end - cursor, header.lost_lines, observed_ts)
            return _Read(SourceBatch(header.source, cursor, end, 0, entries), [])
        if header.offset > cursor or header.offset + len(data) <= cursor:
            return None
        found = split(data[cursor - header.offset :], offset=cursor, part=part, final=True)
        entries_heard: list[Entry] = []
        believed: list[tuple[str, SourceLine]] = []
        ended: list[WorkerRecord] = []
        for piece in found.pieces:
            heard = hear(piece, speaker, observed_ts)
            if speaker.is_hive and heard.line is not None and heard.line.action == "worker_exit":
                ended.append(self._workers.ended_record(piece.data))
                continue
            entries_heard.append(heard.entry)
            if heard.line is not None and heard.line.job_id is not None:
                believed.append((speaker.log_id, heard.line))
        batch = SourceBatch(header.source, cursor, found.offset, found.part, entries_heard, ended)
        return _Read(batch, believed)

    def _act(self, read: _Read) -> None:
        for speaker, line in read.believed:
            self._workers.heard(speaker, line)
        for record in read.batch.ended_workers:
            self._workers.exited(record)
