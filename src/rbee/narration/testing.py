"""For tests of programs that narrate: `with captured_narration() as said: …; assert said.actions == […]`."""

from rbee.narration.emit import captured_narration
from rbee.narration.sinks import ListSink

__all__ = ["ListSink", "captured_narration"]
