"""Taking what hives read off the files of their workers: exactly once, by file and offset."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from itertools import accumulate

import msgspec
from msgspec import Struct

from rbee.contracts.events import MAX_LINE_BYTES, NewEvent, SourceLine
from rbee.contracts.heartbeats import SourceHeader
from rbee.contracts.stretches import Piece, split
from rbee.contracts.views import Progress
from rbee.errors import InvalidRequestError
from rbee.jobs import JobRegistry
from rbee.jobs.records import Entry, Run, SourceBatch, WorkerRecord
from rbee.queen.claims import Speaker, hear, hear_together, lost_stretch, refused_stretch
from rbee.queen.download_progress import note_progress, progress_of
from rbee.queen.worker_exits import kept_exit
from rbee.queen.workers import WorkerBook

BATCH_BYTES_MAX = 4 * 1024 * 1024
STRETCHES_MAX = 4096
TOGETHER_LINES = 128
POSITIONS_MAX = 4096
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
    progress: dict[str, Progress] = {}


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
        registry.hub.on_full = workers.overflowed
        self._locks: dict[str, asyncio.Lock] = {}
        self._positions: dict[str, tuple[int, int]] = {}

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
        known = await self._known({stretch.header.source for stretch in stretches})
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
        cursors |= await self._commit([read.batch for read in reads])
        self._act(hive_id, reads)  # whatever else fails: the batch will not come again
        for job_id, progress in [item for read in reads for item in read.progress.items()]:
            await note_progress(self._registry, job_id, progress)
        if refused:
            await self._registry.append(hive_id, refused)
        await self._workers.settle()
        return cursors

    async def _known(self, sources: set[str]) -> dict[str, tuple[int, int]]:
        """Return how far these files are committed; what this very object committed it knows by heart."""
        unknown = sources - self._positions.keys()
        if unknown:
            if len(self._positions) > POSITIONS_MAX:
                self._positions.clear()
                unknown = sources
            self._positions |= await self._registry.store.cursors(unknown)
        return {source: self._positions[source] for source in sources if source in self._positions}

    async def _commit(self, batches: list[SourceBatch]) -> dict[str, int]:
        if not batches:
            return {}
        for batch in batches:  # until this is on disk, nobody knows
            self._positions.pop(batch.source, None)
        cursors = await self._registry.store.ingest(batches)
        for batch in batches:
            if cursors[batch.source] == batch.next_cursor:
                self._positions[batch.source] = (batch.next_cursor, batch.next_part)
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
    judge = _Judge(speaker, workers, observed_ts)
    next_cursor, next_part = judge.take(stretch.data[cursor - header.offset :], cursor, part)
    batch = SourceBatch(header.source, cursor, next_cursor, next_part, judge.entries, judge.ended)
    return _Read(batch, judge.believed, judge.strays, judge.progress)


class _Judge:
    """Decides about the lines of one stretch: where each goes, what is believed, which ends are kept back."""

    def __init__(self, speaker: Speaker, workers: WorkerBook, observed_ts: int) -> None:
        self._speaker = speaker
        self._workers = workers
        self._observed_ts = observed_ts
        self.entries: list[Entry | Run] = []
        self.believed: list[tuple[str, SourceLine]] = []
        self.strays: list[tuple[str, SourceLine]] = []
        self.ended: list[WorkerRecord] = []
        self.progress: dict[str, Progress] = {}

    def take(self, data: bytes, offset: int, part: int) -> tuple[int, int]:
        """Decide about all of `data`; returns offset and part behind it."""
        lines = data[:-1].split(b"\n")
        is_plain = self._speaker.is_worker_stdout and not part and data.endswith(b"\n") and b"\r" not in data
        if not is_plain or max(map(len, lines)) > MAX_LINE_BYTES:
            found = split(data, offset=offset, part=part, final=True)
            self._each(found.pieces)
            return found.offset, found.part
        offsets = list(accumulate([len(line) + 1 for line in lines], initial=offset))
        end = offsets.pop()
        for start in range(0, len(lines), TOGETHER_LINES):
            some = slice(start, start + TOGETHER_LINES)
            self._together(lines[some], offsets[some])
        return end, 0

    def _together(self, lines: list[bytes], offsets: list[int]) -> None:
        chorus = hear_together(lines, offsets, self._speaker, self._observed_ts)
        if chorus is None:
            self._each(list(map(Piece, offsets, lines)))
        else:
            self.entries += chorus.runs
            self.believed += [(self._speaker.log_id, line) for line in chorus.lines]

    def _each(self, pieces: list[Piece]) -> None:
        speaker = self._speaker
        for piece in pieces:
            heard = hear(piece, speaker, self._observed_ts)
            is_exit = speaker.is_hive and heard.line is not None and heard.line.action == "worker_exit"
            if is_exit and self._keep_back(piece):
                continue
            self.entries.append(heard.entry)
            if heard.line is not None and heard.line.job_id is not None and not speaker.is_hive:
                self.believed.append((speaker.log_id, heard.line))
            if speaker.is_hive and heard.line is not None and (progress := progress_of(heard.line)) is not None:
                self.progress[heard.entry.log_id] = progress
            if heard.stray is not None and not speaker.is_hive:
                self.strays.append((speaker.log_id, heard.stray))

    def _keep_back(self, piece: Piece) -> bool:
        """Keep the end of a worker until it can be told; false when the line tells none."""
        source, observed_ts = self._speaker.source, self._observed_ts
        kept = kept_exit(piece.data, source=source, offset=piece.offset, observed_ts=observed_ts)
        record = self._workers.ended_record(kept, self._speaker.log_id)
        if record is not None:
            self.ended.append(record)
        return record is not None
