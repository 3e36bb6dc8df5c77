"""Narration: every program says, in human sentences with structure, what it is doing and for which job."""

from rbee.narration.emit import configure, narrate
from rbee.narration.lines import Narration, format_bracket, parse_bracket
from rbee.narration.redact import redact
from rbee.narration.scope import Scope, current_scope, run_in_scope, scope
from rbee.narration.sinks import FileSink, ListSink, Sink, TeeSink

__all__ = [
    "FileSink",
    "ListSink",
    "Narration",
    "Scope",
    "Sink",
    "TeeSink",
    "configure",
    "current_scope",
    "format_bracket",
    "narrate",
    "parse_bracket",
    "redact",
    "run_in_scope",
    "scope",
]
