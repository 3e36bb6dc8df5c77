"""Taking what hives read off the files of their workers: exactly once, by file and offset."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator

import msgspec
from msgspec import Struct

from rbee.contracts.events import NewEvent, SourceLine
from rbee.contracts.heartbeats import SourceHeader
from rbee.contracts.stretches import Piece, split
from rbee.errors import InvalidRequestError
from rbee.jobs import JobRegistry
from rbee.jobs.records import SourceBatch
from rbee.queen.claims import Speaker, hear, lost_stretch, refused_stretch
from rbee.queen.worker_exits import kept_exit
from rbee.queen.workers import WorkerBook

BATCH_BYTES_MAX = 4 * 1024 * 1024
STRETCHES_MAX = 4096
_header = msgspec.json.Decoder(SourceHeader)


class Stretch(Struct, frozen=True):
    """One source's part of a batch."""

    header: SourceHeader
    data: bytes

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.header.offset + (self.header.lost_bytes or len(self.data))


class _Read(Struct):
    """One stretch, cut and judged: what to commit, and what to act on once it is."""

    batch: SourceBatch
    believed: list[tuple[str, SourceLine]] = []
    strays: list[tuple[str, SourceLine]] = []


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
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidRequestError(f"A stretch has no usable header: {error}.") from None
        data = body[newline + 1 : newline + 1 + header.bytes] if newline >= 0 else b""
        if len(data) != header.bytes:
            raise InvalidRequestError(f"A stretch has {len(data)} of the {header.bytes} bytes that it announces.")
        if header.bytes and header.lost_bytes:
            raise InvalidRequestError("A stretch has either `bytes` or `lost_bytes`.")
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
        stretches = list(itertools.islice(parse_batch(body), STRETCHES_MAX + 1))
        if len(stretches) > STRETCHES_MAX:
            raise InvalidRequestError(f"A batch has at most {STRETCHES_MAX} stretches.")
        async with self._locks.setdefault(hive_id, asyncio.Lock()):
            return await self._take(hive_id, stretches)

    async def _take(self, hive_id: str, stretches: list[Stretch]) -> dict[str, int]:
        observed_ts = time.time_ns()
        known = await self._registry.store.cursors({stretch.header.source for stretch in stretches})
        cursors: dict[str, int] = {}
        positions = dict(known)
        reads: list[_Read] = []
        refused: list[NewEvent] = []
        for stretch in stretches:
            source, speaker = stretch.header.source, self._workers.speaker(stretch.header.source, hive_id)
            if speaker is None:  # not this hive's to bring: it goes nowhere, and is not brought again
                cursors[source] = max(cursors.get(source, 0), stretch.end)
                refused.append(refused_stretch(stretch.header, stretch.end, observed_ts))
                continue
            if source in known:
                cursors.setdefault(source, known[source][0])
            read = _read(stretch, speaker, self._workers, positions.get(source), observed_ts)
            if read is not None:
                positions[source] = (read.batch.next_cursor, read.batch.next_part)
                reads.append(read)
        cursors |= await self._registry.store.ingest([read.batch for read in reads])
        if refused:
            await self._registry.append(hive_id, refused)
        self._act(hive_id, reads)
        await self._workers.settle()
        return cursors

    def _act(self, hive_id: str, reads: list[_Read]) -> None:
        if reads:
            self._workers.moved(hive_id)
        for read in reads:
            for speaker, line in read.believed:
                self._workers.heard(speaker, line)
            for worker_id, line in read.strays:
                self._workers.stray(worker_id, hive_id, line)
            for record in read.batch.ended_workers:
                self._workers.exited(record)


def _read(
    stretch: Stretch, speaker: Speaker, workers: WorkerBook, position: tuple[int, int] | None, observed_ts: int
) -> _Read | None:
    """Cut a stretch at the cursor; None when it is a repeat, or lies beyond the cursor."""
    header = stretch.header
    cursor, part = position or (header.offset, 0)
    if not header.offset <= cursor < stretch.end:
        return None
    if header.lost_bytes:
        entries = lost_stretch(speaker, cursor, stretch.end - cursor, header.lost_lines, observed_ts)
        return _Read(SourceBatch(header.source, cursor, stretch.end, 0, entries))
    found = split(stretch.data[cursor - header.offset :], offset=cursor, part=part, final=True)
    read = _Read(SourceBatch(header.source, cursor, found.offset, found.part, [], []))
    for piece in found.pieces:
        _judge(piece, read, speaker, workers, observed_ts)
    return read


def _judge(piece: Piece, read: _Read, speaker: Speaker, workers: WorkerBook, observed_ts: int) -> None:
    """Decide about a piece: where it goes, whether it is believed or astray, or an end that is kept back."""
    heard = hear(piece, speaker, observed_ts)
    if speaker.is_hive and heard.line is not None and heard.line.action == "worker_exit":
        kept = kept_exit(piece.data, source=speaker.source, offset=piece.offset, observed_ts=observed_ts)
        record = workers.ended_record(kept, speaker.log_id)
        if record is not None:
            read.batch.ended_workers.append(record)
            return
    read.batch.entries.append(heard.entry)
    if heard.line is not None and heard.line.job_id is not None and not speaker.is_hive:
        read.believed.append((speaker.log_id, heard.line))
    if heard.stray is not None and not speaker.is_hive:
        read.strays.append((speaker.log_id, heard.stray))
