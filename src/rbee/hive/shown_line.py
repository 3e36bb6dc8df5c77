"""What of a worker's line everybody on that worker may see: its last lines are told to every job it had."""

from __future__ import annotations

from rbee.contracts.events import TOKEN_PREFIX, decode_source_line

_EVENT = b'{"v":1'


def shown_line(line: bytes, *, is_narration: bool = True) -> str:
    """Show a narrated line as its sentence, another one as it is; '' for what is about one request.

    Nothing is shown of what begins like an event and is none (cut, or forged), nor of what begins in a hole.

    Args:
        line: Without its newline.
        is_narration: It stands where events stand; elsewhere none is one.
    """
    if line.startswith(TOKEN_PREFIX) or b"\0" in line or not line.strip():
        return ""
    decoded = decode_source_line(line) if is_narration else None
    if decoded is None:
        return "" if line.startswith(_EVENT) else line[:2000].decode("utf-8", "replace")
    if decoded.attempt is not None:
        return ""
    return f"{decoded.action}: {decoded.message}" if decoded.action else ""
