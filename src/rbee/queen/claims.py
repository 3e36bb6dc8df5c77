"""Whose event is it? Pure decisions about where a captured line goes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import partial
from operator import attrgetter

from msgspec import Struct

from rbee.contracts.events import (
    CapturedRun,
    NewEvent,
    SourceLine,
    captured_event,
    decode_plain_lines,
    decode_source_line,
    new_event,
)
from rbee.contracts.heartbeats import SourceHeader
from rbee.contracts.ids import is_id
from rbee.contracts.stretches import Piece
from rbee.jobs.records import Entry, Run

_BOOT = re.compile(r"[0-9A-Za-z_-]{1,64}")
_ACTION = re.compile(r"[a-z][a-z0-9_]{0,63}")


def is_file_of_hive(name: str) -> bool:
    """Tell whether a hive may call a file of its own narration so: by the id of a boot."""
    return bool(_BOOT.fullmatch(name)) and name not in ("stdout", "stderr")


class Speaker(Struct, frozen=True):
    """Who wrote a captured file, and which jobs it may speak of.

    Attributes:
        source: The file, such as `<worker id>/stdout`.
        log_id: The speaker's own log, where all else goes.
        is_hive: It is the hive's own file.
        placed: The running jobs placed on this worker, with their attempt.
        started_for: The job the worker was started for.
        handed: The jobs this hive was given commands for.
    """

    source: str
    log_id: str
    is_hive: bool
    placed: Mapping[str, int] = {}
    started_for: str | None = None
    handed: Collection[str] = ()

    @property
    def is_worker_stdout(self) -> bool:
        """Tell whether it is where a worker says its events."""
        return not self.is_hive and self.stream == "stdout"

    @property
    def stream(self) -> str:
        """`stdout` or `stderr`."""
        return "stderr" if self.source.endswith("/stderr") else "stdout"


class Heard(Struct, frozen=True):
    """A line after the decision.

    Attributes:
        entry: Where it goes.
        line: The event, when it was one that was believed.
        stray: The piece of an answer that nobody waits for from this worker.
    """

    entry: Entry
    line: SourceLine | None = None
    stray: SourceLine | None = None


def hear(piece: Piece, speaker: Speaker, observed_ts: int) -> Heard:
    """Decide where one line goes.

    An event is believed when it names no job, or a job that its speaker may speak of. Of a refused claim the
    speaker's log keeps action, kind, attempt and length, never text; what is no event is kept there as `raw`.
    """
    line = decode_source_line(piece.data) if piece.part is None and speaker.stream == "stdout" else None
    if line is None:
        return Heard(Entry(speaker.log_id, _raw(piece, speaker, observed_ts)))
    event = captured_event(piece.data, source=speaker.source, offset=piece.offset, observed_ts=observed_ts)
    if line.job_id is None:
        return Heard(Entry(speaker.log_id, event), line)
    refused = _refused(piece, line, speaker, observed_ts)
    if not _may_speak_of(line.kind, line.job_id, line.attempt, speaker):
        return Heard(Entry(speaker.log_id, refused), stray=line if _is_piece_of_answer(line) else None)
    return Heard(
        Entry(line.job_id, event, otherwise=(speaker.log_id, event if speaker.is_hive else refused)), line
    )


def _may_speak_of(kind: str, job_id: str, attempt: int | None, speaker: Speaker) -> bool:
    if speaker.is_hive:
        return kind == "narration" and job_id in speaker.handed
    if attempt is not None:
        return speaker.placed.get(job_id) == attempt
    return kind == "narration" and (job_id == speaker.started_for or job_id in speaker.placed)


class Chorus(Struct, frozen=True):
    """Many lines after the decision, all of them believed: the runs they make, and those somebody has to hear."""

    runs: list[Run]
    lines: list[SourceLine]


_claim_of = attrgetter("kind", "job_id", "attempt")


def hear_together(lines: list[bytes], offsets: list[int], speaker: Speaker, observed_ts: int) -> Chorus | None:
    """Decide about whole lines of a worker's stdout at once, where all are plain and of jobs it may speak of.

    None otherwise: then `hear` decides about each. Where both can decide, they decide the same.

    Args:
        lines: Without their newlines, which all had.
        offsets: Where each begins.
        speaker: Whose they are.
        observed_ts: When they were read.
    """
    said = decode_plain_lines(lines)
    if said is None:
        return None
    claims = dict(zip(map(_claim_of, said), said, strict=True))
    for kind, job_id, attempt in claims:
        if job_id is None or not _may_speak_of(kind, job_id, attempt, speaker):
            return None
    by_job: dict[str, tuple[list[bytes], list[int]]] = {}
    if len({job_id for _, job_id, _ in claims}) == 1:
        by_job[said[0].job_id or ""] = lines, offsets
    else:
        for data, at, line in zip(lines, offsets, said, strict=True):
            found = by_job.get(line.job_id or "")
            if found is None:
                found = by_job[line.job_id or ""] = [], []
            found[0].append(data)
            found[1].append(at)
    late = partial(_late, speaker)
    runs = [
        Run(job_id, CapturedRun(speaker.source, observed_ts, *own), speaker.log_id, late)
        for job_id, own in by_job.items()
    ]
    tokens = [line for line in claims.values() if line.kind == "token"]  # the last of each answer will do
    return Chorus(runs, [*tokens, *(line for line in said if line.kind == "narration")])


def _late(speaker: Speaker, run: CapturedRun) -> list[NewEvent]:
    """Return what is told of lines whose job has ended meanwhile."""
    said = decode_plain_lines(run.lines) or []
    return [
        _refused(Piece(offset, data), line, speaker, run.observed_ts)
        for data, offset, line in zip(run.lines, run.offsets, said, strict=True)
    ]


def _is_piece_of_answer(line: SourceLine) -> bool:
    return line.kind == "token" and line.attempt is not None and is_id("job", line.job_id or "")


def _raw(piece: Piece, speaker: Speaker, observed_ts: int) -> NewEvent:
    return new_event(
        "raw",
        {
            "src": {"id": speaker.source, "offset": piece.offset},
            "observed_ts": observed_ts,
            "ts": observed_ts,
            "stream": speaker.stream,
            "text": piece.data.decode("utf-8", "replace"),
            "part": piece.part,
        },
    )


def _refused(piece: Piece, line: SourceLine, speaker: Speaker, observed_ts: int) -> NewEvent:
    return new_event(
        "narration",
        {
            "src": {"id": speaker.source, "offset": piece.offset},
            "observed_ts": observed_ts,
            "ts": observed_ts,
            "actor": "queen",
            "action": "queen_refuse_line",
            "message": "A line spoke of a job that is not its speaker's, and was put aside.",
            "level": "warning",
            "fields": {
                "claimed": True,
                "action": line.action if line.action and _ACTION.fullmatch(line.action) else None,
                "kind": line.kind,
                "attempt": line.attempt,
                "length_bytes": len(piece.data),
            },
        },
    )


def lost_stretch(speaker: Speaker, offset: int, lost_bytes: int, lost_lines: int, observed_ts: int) -> list[Entry]:
    """Tell every log that may have had lines in a stretch that is lost."""
    gap = new_event(
        "gap",
        {
            "src": {"id": speaker.source, "offset": offset},
            "observed_ts": observed_ts,
            "ts": observed_ts,
            "reason": "overflow",
            "source": speaker.source,
            "lost_bytes": lost_bytes,
            "lost_lines": lost_lines,
        },
    )
    jobs = [*speaker.placed, *([speaker.started_for] if speaker.started_for else []), *speaker.handed]
    return [Entry(log_id, gap) for log_id in dict.fromkeys([speaker.log_id, *jobs])]


def refused_stretch(header: SourceHeader, end: int, observed_ts: int) -> NewEvent:
    """Tell in a hive's log that a file it brought is not one of its own, and was not read."""
    return new_event(
        "gap",
        {
            "observed_ts": observed_ts,
            "ts": observed_ts,
            "reason": "refused",
            "source": header.source[:128],
            "lost_bytes": end - header.offset,
            "lost_lines": header.lost_lines,
        },
    )
