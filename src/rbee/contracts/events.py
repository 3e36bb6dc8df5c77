"""Events: one JSON object on one line each, and how a line becomes an entry of a log.

Every program writes an event with `"v"` and `"kind"` first. A log gives each event its number by writing
`"seq"` (and, for a captured line, `"src"` and `"observed_ts"`) straight behind them, so the rest of the line
travels untouched: fields nobody here knows survive.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

MAX_LINE_BYTES = 16 * 1024
MAX_TOKEN_LINE_BYTES = 1024 * 1024

Level = Literal["debug", "info", "warning", "error"]
Kind = Literal["narration", "state", "token", "raw", "gap", "end"]

NARRATION_PREFIX = b'{"v":1,"kind":"narration",'
TOKEN_PREFIX = b'{"v":1,"kind":"token",'
_KIND_AT = len(b'{"v":1,"kind":"')
_PREFIX = re.compile(rb'\{"v":1,"kind":"([a-z]+)",')
_NUMBERED = re.compile(rb'\{"v":1,"kind":"([a-z]+)","seq":(\d+),')


class SourceLine(Struct, frozen=True):
    """A line that a process wrote about itself, as far as capture has to understand it."""

    v: Literal[1]
    kind: Literal["narration", "token"]
    ts: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    actor: str | None = None
    action: str | None = None
    message: str | None = None
    level: Level = "info"
    text: str | None = None
    tokens: int | None = None
    channel: str | None = None
    attempt: int | None = None
    job_id: str | None = None
    correlation_id: str | None = None
    fields: dict[str, Any] = {}


class _AnyLine(SourceLine, frozen=True):
    seq: Any | UnsetType = UNSET
    src: Any | UnsetType = UNSET
    observed_ts: Any | UnsetType = UNSET

    @property
    def is_plain(self) -> bool:
        """Tell whether the line leaves alone what only a log may write."""
        return self.seq is UNSET and self.src is UNSET and self.observed_ts is UNSET


class _TokenLine(SourceLine, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    kind: Literal["token"]
    text: str
    hive_id: str | None = None
    worker_id: str | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    chunk: Any = None


class _NarrationLine(SourceLine, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    kind: Literal["narration"]
    actor: Annotated[str, Meta(min_length=1)]
    action: Annotated[str, Meta(min_length=1)]
    message: str
    hive_id: str | None = None
    worker_id: str | None = None
    model: str | None = None


_line_decoder = msgspec.json.Decoder(_AnyLine)
_any_decoder = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder(enc_hook=repr)


def decode_source_line(line: bytes) -> SourceLine | None:
    """Read one line without its newline; None when it is no event a process may write."""
    if not line.startswith(b'{"v":1,'):
        return None
    try:
        decoded = _line_decoder.decode(line)
        _any_decoder.decode(line)  # fields nobody knows were not looked at: bad UTF-8, numbers out of range
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    prefix = _PREFIX.match(line)
    if prefix is not None and prefix[1] != decoded.kind.encode():
        return None  # it has a second `kind`, and readers would not agree which one counts
    whole = decoded.text is not None if decoded.kind == "token" else _says_something(decoded)
    return decoded if whole and decoded.is_plain else None


# The two forms that workers write, by how their lines begin: every field is known, so one look at each is enough.
_BEGINNING_BYTES = len(NARRATION_PREFIX)
_FORMS: dict[bytes, Callable[[bytes], SourceLine]] = {
    TOKEN_PREFIX + b'"ts"': msgspec.json.Decoder(_TokenLine).decode,
    NARRATION_PREFIX: msgspec.json.Decoder(_NarrationLine).decode,
}


def decode_plain_lines(lines: list[bytes]) -> list[SourceLine] | None:
    """Read lines that are all of the forms that workers write; None when one is not, whatever else it may be.

    What it reads, `decode_source_line` reads as well, and the lines may stand in a log as they are.
    """
    try:
        return [_FORMS[line[:_BEGINNING_BYTES]](line) for line in lines]
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _says_something(line: SourceLine) -> bool:
    return bool(line.actor and line.action and line.message is not None)


class NewEvent(Struct, frozen=True):
    """An event without a number yet: its kind, and the JSON behind it up to the closing brace."""

    kind: str
    tail: bytes

    def frames(self, first_seq: int) -> list[bytes]:
        """Return its frame in a stream, as the number `first_seq`."""
        return [_frame(first_seq, self.kind.encode(), self.numbered(first_seq))]

    def numbered(self, seq: int) -> bytes:
        """Return the event as it stands in a log, without a newline."""
        return b'{"v":1,"kind":"%b","seq":%d,%b' % (self.kind.encode(), seq, self.tail)


def new_event(kind: Kind, fields: dict[str, Any]) -> NewEvent:
    """Make an event of `fields` (at least one; `None` values are left out)."""
    present = {key: value for key, value in fields.items() if value is not None}
    return NewEvent(kind, _encoder.encode(present)[1:])


def captured_event(line: bytes, *, source: str, offset: int, observed_ts: int) -> NewEvent:
    """Make an event of a line that `decode_source_line` accepted, vouching for where it was read.

    Args:
        line: The line without its newline.
        source: The file it stands in, such as `<worker id>/stdout`.
        offset: The byte of the file it begins at.
        observed_ts: When it was read, in nanoseconds since 1970.
    """
    found = _PREFIX.match(line)
    if found is None or b"\r" in line:  # another order, or a line end inside that would end it for a reader
        fields = msgspec.json.decode(line)
        del fields["v"]
        kind = fields.pop("kind")
        return new_event(kind, {"src": {"id": source, "offset": offset}, "observed_ts": observed_ts, **fields})
    tail = b'"src":{"id":"%b","offset":%d},"observed_ts":%d,%b' % (
        source.encode(),
        offset,
        observed_ts,
        line[found.end() :],
    )
    return NewEvent(found[1].decode(), tail)


class CapturedRun(Struct, frozen=True, gc=False):
    """Lines of one file that `decode_plain_lines` read, on their way into one log without being looked at again.

    Attributes:
        source: The file.
        observed_ts: When they were read, in nanoseconds since 1970.
        lines: Without their newlines.
        offsets: The byte of the file that each begins at.
    """

    source: str
    observed_ts: int
    lines: list[bytes]
    offsets: list[int]

    def frames(self, first_seq: int) -> list[bytes]:
        """Return their frames in a stream, numbered from `first_seq` on."""
        token, narration = _frame_form(TOKEN_PREFIX, self.source), _frame_form(NARRATION_PREFIX, self.source)
        token_at, narration_at = len(TOKEN_PREFIX), len(NARRATION_PREFIX)
        is_token, ts = TOKEN_PREFIX[_KIND_AT], self.observed_ts
        numbered = zip(itertools.count(first_seq), self.lines, self.offsets, strict=False)
        return [
            token % (seq, seq, offset, ts, line[token_at:])
            if line[_KIND_AT] == is_token
            else narration % (seq, seq, offset, ts, line[narration_at:])
            for seq, line, offset in numbered
        ]


@lru_cache(1024)
def _frame_form(prefix: bytes, source: str) -> bytes:
    """Return the frame of a line of `source`, open for number, number, offset, time and the rest of the line."""
    event = b'%b"seq":%%d,"src":{"id":"%b","offset":%%d},"observed_ts":%%d,%%b' % (
        prefix,
        source.replace("%", "%%").encode(),
    )
    return b"id: %%d\nevent: %b\ndata: %b\n\n" % (prefix[_KIND_AT:-2], event)


def frames_of(events: list[bytes], first_seq: int) -> bytes:
    """Frame numbered events that follow one another in a log, the first of them numbered `first_seq`."""
    return b"".join(
        [
            _frame(seq, event[_KIND_AT : event.index(b'"', _KIND_AT)], event)
            for seq, event in enumerate(events, first_seq)
        ]
    )


def _frame(seq: int, kind: bytes, event: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, kind, event)


def events_in(frames: bytes) -> list[bytes]:
    """Return the events of frames, as they stand in a log, without newlines."""
    return [frame[frame.index(b"{") :] for frame in frames.split(b"\n\n")[:-1]]


def frames_from(frames: bytes, seq: int) -> bytes:
    """Return those frames that are numbered `seq` or more; `seq` is one of them, or the one behind them."""
    beginning = b"id: %d\n" % seq  # an event holds no newline, so behind one it begins a frame
    if frames.startswith(beginning):
        return frames
    at = frames.find(b"\n" + beginning)
    return frames[at + 1 :] if at >= 0 else b""


def seq_and_kind(event: bytes) -> tuple[int, str]:
    """Read number and kind off the front of a stored event."""
    found = _NUMBERED.match(event)
    if found is None:
        raise ValueError(f"not a stored event: {event[:80]!r}")
    return int(found[2]), found[1].decode()


def encode_json(value: Any) -> bytes:
    """Encode any contract value as JSON."""
    return _encoder.encode(value)
